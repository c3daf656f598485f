#!/usr/bin/env bash
# DSPO with the safeguard on SDXL.
# Flags given to this script override its own: sdxl_dspo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SDXL[@]}" --train_method dspo --beta_dpo 5000 --winner_preserving_mu 0.6 \
  --output_dir output/sdxl-dspo "$@"
