#!/usr/bin/env bash
# The training benchmark on one GPU, in under 9 minutes and without a network: bash benchmarks/gpu.sh
# Needs torch, transformers and accelerate. DIFFUSERS_WHEEL=FILE.whl brings diffusers along where it is not installed;
# OUT=FOLDER takes the results; PYTHON=... names the interpreter; LIMIT=SECONDS ends the command. Flags are those of
# benchmarks/train.py and override the ones below.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -n "${DIFFUSERS_WHEEL:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$DIFFUSERS_WHEEL"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# both bases' blocks side by side; a cache that is not full only costs time
timeout $((${LIMIT:-538} / 2)) "$PYTHON" benchmarks/train.py --only_compile "$@" || true
# what was measured is on file even if the limit cuts the rest off
left=$((${LIMIT:-538} - SECONDS))
minutes=$("$PYTHON" -c "print(round(($left - 28) / 60, 2))")
timeout "$left" "$PYTHON" benchmarks/train.py --minutes "$minutes" --seconds 1 --out "${OUT:-benchmarks/results}" "$@"
