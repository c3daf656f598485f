#!/usr/bin/env bash
# DMPO with the safeguard on the tiny base model.
# Flags given to this script override its own: tiny_dmpo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
tiny_pairs
launch "${TINY[@]}" --train_method dmpo --beta_dpo 200 --dmpo_alpha 0.01 --winner_preserving_mu 0.9 \
  --output_dir output/tiny/dmpo "$@"
