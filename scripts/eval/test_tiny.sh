#!/usr/bin/env bash
# Images of the captions that the tiny base was not trained on, and their scores:
# test_tiny.sh PATH/unet.pth [flags of eval_generate.py]; base instead of PATH is the tiny base itself.
# Guidance 1 is the conditional model without help: with more, the base already passes nearly every check of its pictures.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more wait for each other where other programs want the cores too
MODEL=(--pretrain_path "$ROOT/sdpo/tiny/base" --groups tiny --steps 20 --guidance standard --cfg 1 --noise per-prompt
  --dtype fp32 --metrics Pixels)
GPUS=1 generate "$@"
