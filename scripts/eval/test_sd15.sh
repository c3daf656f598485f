#!/usr/bin/env bash
# Images of the three official groups of prompts from a Stable Diffusion 1.5 UNet: test_sd15.sh PATH/unet.pth [flags of eval_generate.py]
# Instead of PATH: a folder, sdpo-sd1.5-diffusion-dpo, -dspo or -dmpo, or base. Run again, it makes what is missing. GPUS=2 uses two of them.
source "$(dirname "${BASH_SOURCE[0]}")/../train/launch.sh"

generate() { # UNET FLAGS...: eval_generate.py on every GPU of this machine, or on the CPU where there is none
  if [[ -z "${1:-}" || "$1" == -* ]]; then
    echo "error: name the UNet first: $0 PATH/unet.pth [flags]" >&2
    exit 2
  fi
  local unet=$1 gpus=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
  set -- "$ROOT/eval_generate.py" --unet_path "$unet" "${MODEL[@]}" "${@:2}"
  if [ "$gpus" -gt 1 ]; then
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$gpus" --num_machines 1 --mixed_precision no --dynamo_backend no "$@"
  fi
  exec "$PYTHON" "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  MODEL=(--pretrain_path stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512)
  generate "$@"
fi
