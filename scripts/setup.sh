# Run or sourced from the repository root: makes .venv and installs the requirements if they are not there; sets PYTHON.
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: python3 must be Python 3.11 or later" >&2; exit 2; }
if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "installing into .venv (about 6 GB with the GPU libraries that PyTorch brings)"
  python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt &&
    cp requirements.txt .venv/installed.txt ||
    { echo "error: the installation failed; run the same command again" >&2; exit 2; }
fi
export PYTHON=$PWD/.venv/bin/python
