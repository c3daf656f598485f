#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on SDXL.
# Flags given to this script override its own: sdxl_diffusion_dpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SDXL[@]}" --train_method diffusion-dpo --beta_dpo 5000 --winner_preserving_mu 0.6 \
  --output_dir output/sdxl-diffusion-dpo "$@"
