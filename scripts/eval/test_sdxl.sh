#!/usr/bin/env bash
# Images of the three official groups of prompts from an SDXL UNet, and their scores:
# test_sdxl.sh PATH/unet.pth [flags of eval_generate.py]
# Instead of PATH: a folder, sdpo-sdxl-diffusion-dpo, -dspo or -dmpo, or base. Run again, it makes what is missing.
# GPUS=2 uses two of them.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
MODEL=(--pretrain_path stabilityai/stable-diffusion-xl-base-1.0 --vae_path madebyollin/sdxl-vae-fp16-fix)
generate "$@"
