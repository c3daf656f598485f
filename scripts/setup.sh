# Sourced: makes .venv and installs the requirements if they are not there yet; sets PYTHON. Works from the repository root.
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 must be Python 3.11 or later" >&2; exit 2; }
if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "installing into .venv (about 6 GB with the GPU libraries that PyTorch brings)"
  python3 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi
export PYTHON=$PWD/.venv/bin/python
