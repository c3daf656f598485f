#!/usr/bin/env bash
# Our HPSv2 and ImageReward scores against the packages' own code, on a manifest's first images:
# check_scorers.sh MANIFEST.json [--images 16] [--weights METRIC.PART=SOURCE ...]
# The packages need old versions of what they build on and get an environment of their own, .venv-reference (about 6 GB),
# on the first run.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
if [[ ! -f "${1:-}" ]]; then
  echo "error: name a manifest first, the .json file beside the folder of images: $0 MANIFEST.json [flags]" >&2
  exit 2
fi
requirements=$ROOT/requirements-reference.txt reference=$ROOT/.venv-reference
if ! cmp -s "$requirements" "$reference/installed.txt"; then
  echo "installing into .venv-reference (about 6 GB with the GPU libraries that PyTorch brings)"
  "$PYTHON" -m venv "$reference"
  "$reference/bin/pip" install --quiet -r "$requirements"
  packages=$(echo "$reference"/lib/python*/site-packages)
  cp "$packages/clip/bpe_simple_vocab_16e6.txt.gz" "$packages/hpsv2/src/open_clip/" # hpsv2's wheel lacks it
  cp "$requirements" "$reference/installed.txt"
fi
PYTHONPATH=$ROOT exec "$PYTHON" "$ROOT/scripts/eval/check_scorers.py" --reference_python "$reference/bin/python" "$@"
