#!/usr/bin/env bash
# Install into .venv and run every check: linter, then tests. No GPU and no network beyond pip; tests of the HTML report
# are skipped without Chromium.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
"$PYTHON" -m pip install --quiet "pytest>=9" "pytest-xdist>=3.8" "ruff>=0.9" "playwright>=1.50" "hypothesis>=6.170"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q -rs -n 2 --dist loadfile --max-worker-restart 0 "$@"
