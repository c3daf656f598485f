#!/usr/bin/env bash
# Win rates of two runs on one group of prompts:
# test_vs.sh --json_a A.json --json_b B.json --label_a A --label_b B [flags of eval_vs.py]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
exec "$PYTHON" "$ROOT/eval_vs.py" "$@"
