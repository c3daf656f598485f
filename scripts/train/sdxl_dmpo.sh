#!/usr/bin/env bash
# DMPO with the safeguard on SDXL.
# Flags given to this script override its own: sdxl_dmpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SDXL[@]}" --train_method dmpo --beta_dpo 6000 --dmpo_alpha 0.01 --winner_preserving_mu 0.6 \
  --output_dir output/sdxl-dmpo "$@"
