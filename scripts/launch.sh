# Sourced by the launchers: `launch FLAGS...` runs train.py and `generate UNET FLAGS...` eval_generate.py, on every GPU of
# this machine or on the CPU. DATA=FOLDER trains on other pairs, GPUS=2 uses two GPUs; PYTHON=... names the interpreter.
# For several machines use `accelerate launch` with its own config file.
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python)}
command -v "$PYTHON" >/dev/null || { echo "error: PYTHON=$PYTHON is not a program: name a Python interpreter" >&2; exit 2; }
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "diffusers", "datasets"))))' || {
  echo "error: $PYTHON lacks what requirements.txt lists: run bash $ROOT/scripts/setup.sh, or name another with PYTHON=..." >&2
  exit 2
}
if [[ -n "${GPUS:-}" && ! "$GPUS" =~ ^[1-9][0-9]{0,3}$ ]]; then
  echo "error: GPUS=$GPUS is not a number of GPUs: give how many to use, or leave it out for all" >&2
  exit 2
fi

# The official recipe: 2048 pairs per update on 1, 2, 4, ... or 256 GPUs, learning rate scaled by them. What is not
# named is train.py's default.
RECIPE=(--dataset_name "${DATA:-yuvalkirstain/pickapic_v2}" --global_batch_size 2048 --train_batch_size 8 --scale_lr
  --dataloader_num_workers 16 --mixed_precision bf16 --allow_tf32 --use_winner_preserving)
SD15=("${RECIPE[@]}" --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --learning_rate 1e-8)
SDXL=("${RECIPE[@]}" --sdxl --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0
  --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --learning_rate 1e-9)

# The embedded default: a tiny base model and its own pictures, in one process.
TINY=(--pretrained_model_name_or_path "$ROOT/sdpo/tiny/base" --dataset_name "${DATA:-output/tiny/pairs}"
  --resolution 32 --no_hflip --train_batch_size 16 --max_train_steps 100 --lr_warmup_steps 20 --learning_rate 6e-4
  --lr_scheduler cosine --mixed_precision no --use_ema --ema_decay 0.95 --validation_pairs 400 --validation_steps 25
  --checkpointing_steps 0 --use_winner_preserving --seed 0)
tiny_pairs() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GPUS=${GPUS:-1} # more GPUs would make larger updates
  [[ -n "${DATA:-}" || -f output/tiny/pairs/train.parquet ]] ||
    PYTHONPATH=$ROOT "$PYTHON" -m sdpo.tiny.make_pairs --out output/tiny/pairs
}

on_gpus() { # SCRIPT FLAGS...: on every GPU of this machine, or on the CPU where there is none
  local gpus
  gpus=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
  if [ "$gpus" -gt 1 ]; then
    # seconds that ranks have, after a signal, to finish an update and write a checkpoint; 30 by default
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$gpus" --num_machines 1 \
      --mixed_precision no --dynamo_backend no "$@"
  fi
  exec "$PYTHON" "$@"
}
launch() { on_gpus "$ROOT/train.py" "$@"; }
generate() { # UNET FLAGS...: its images, from the base model that MODEL names
  if [[ -z "${1:-}" || "$1" == -* ]]; then
    echo "error: name the UNet first: $0 PATH/unet.pth [flags]" >&2
    exit 2
  fi
  on_gpus "$ROOT/eval_generate.py" --unet_path "$1" "${MODEL[@]}" "${@:2}"
}
