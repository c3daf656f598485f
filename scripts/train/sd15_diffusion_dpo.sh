#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on SD1.5.
# Flags given to this script override its own: sd15_diffusion_dpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SD15[@]}" --train_method diffusion-dpo --beta_dpo 5000 --winner_preserving_mu 0.9 \
  --output_dir output/sd15-diffusion-dpo "$@"
