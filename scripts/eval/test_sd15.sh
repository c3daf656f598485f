#!/usr/bin/env bash
# Images of the three official groups of prompts from a Stable Diffusion 1.5 UNet, and their scores:
# test_sd15.sh PATH/unet.pth [flags of eval_generate.py]
# Instead of PATH: a folder, sdpo-sd1.5-diffusion-dpo, -dspo or -dmpo, or base. Run again, it makes what is missing.
# GPUS=2 uses two of them.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
MODEL=(--pretrain_path stable-diffusion-v1-5/stable-diffusion-v1-5)
generate "$@"
