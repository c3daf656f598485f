#!/usr/bin/env bash
# DMPO with the safeguard on SD1.5.
# Flags given to this script override its own: sd15_dmpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "${SD15[@]}" --train_method dmpo --beta_dpo 2000 --dmpo_alpha 0.01 --winner_preserving_mu 0.9 \
  --output_dir output/sd15-dmpo "$@"
