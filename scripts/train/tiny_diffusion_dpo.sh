#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on the tiny base model.
# Flags given to this script override its own: tiny_diffusion_dpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
tiny_pairs
launch "${TINY[@]}" --train_method diffusion-dpo --beta_dpo 200 --winner_preserving_mu 0.9 \
  --output_dir output/tiny/diffusion-dpo "$@"
