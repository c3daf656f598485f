#!/usr/bin/env bash
# DSPO with the safeguard on the tiny base model.
# Flags given to this script override its own: tiny_dspo.sh --output_dir DIR --dataset_name DIR
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
tiny_pairs
launch "${TINY[@]}" --train_method dspo --beta_dpo 0.001 --winner_preserving_mu 0.2 \
  --output_dir output/tiny/dspo "$@"
