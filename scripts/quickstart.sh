#!/usr/bin/env bash
# Without GPU, hub or data set: install into .venv, train plain Diffusion-DPO, the safeguard and two controls on the
# embedded tiny model and compare them; then generate, score and compare pictures of the first two with the evaluation
# scripts. Results: output/quickstart/. Training and evaluation take the same path as the launchers for SD1.5 and SDXL.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
out=output/quickstart
mkdir -p "$out"
rm -rf "$out/references"
began=$SECONDS
trap 'kill $(jobs -p) 2>/dev/null && wait || true' EXIT # where one training fails, the one beside it ends too

# NAME FLAGS...: one training run, its console output in a file; the first two leave the reference's errors to the others
run() {
  local name=$1
  shift
  echo "training $name"
  rm -rf "${out:?}/$name" # of an earlier quickstart
  bash scripts/train/tiny_diffusion_dpo.sh --output_dir "$out/$name" --reference_cache "$out/references" "$@" \
    >"$out/$name.log" 2>&1 &
  trap "kill $!; wait; exit 1" TERM # which the trap above sends
  wait $! || { echo "training $name failed:"; tail -n 20 "$out/$name.log"; exit 1; }
}
export OMP_NUM_THREADS=1 # on so small a model two runs side by side are faster than one with two threads
source scripts/launch.sh && tiny_pairs
# the first to end is looked at, so that a failure ends the other; then each by its number, for `wait -n` forgets one of
# two that end together
run plain --use_winner_preserving false --winner_preserving_mu 0 & first=$!
run safeguard & second=$!
wait -n
wait "$first"
wait "$second"
run constant --use_winner_preserving false --winner_preserving_mu 0 --constant_loser_scale 0.2 & first=$!
run winner_only --use_winner_preserving false --winner_preserving_mu 0 --constant_loser_scale 0 & second=$!
wait -n
wait "$first"
wait "$second"

echo "sampling held-out captions"
"$PYTHON" -m sdpo.tiny.compare --out "$out" "plain DPO=$out/plain" "safeguard mu 0.9=$out/safeguard" \
  "constant 0.2=$out/constant" "winner only=$out/winner_only" &
compare=$!
for name in plain safeguard; do
  bash scripts/eval/test_tiny.sh "$out/$name/unet.pth" --output_path "$out/$name/eval" >"$out/$name-eval.log" 2>&1 ||
    { echo "evaluating $name failed:"; tail -n 20 "$out/$name-eval.log"; exit 1; }
done
wait "$compare"
echo "Compare the safeguard with the two controls before crediting its adaptive rule. The learning rate was chosen because it"
echo "shows the pathology (docs/quickstart)."
echo
group=tiny_seed0_32x32_20s_1.0cfg.json
bash scripts/eval/test_vs.sh --json_a "$out/safeguard/eval/$group" --json_b "$out/plain/eval/$group" \
  --label_a safeguard --label_b plain --metrics Pixels --outdir "$out/vs"
echo "took $((SECONDS - began)) s after the installation"
