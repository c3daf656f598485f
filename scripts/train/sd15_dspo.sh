#!/usr/bin/env bash
# DSPO with the safeguard on SD1.5.
# Flags given to this script override its own: sd15_dspo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SD15[@]}" --train_method dspo --beta_dpo 0.001 --winner_preserving_mu 0.2 \
  --output_dir output/sd15-dspo "$@"
