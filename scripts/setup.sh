# Sourced: makes .venv and installs the requirements if they are not there yet; sets PYTHON. Works from the repository root.
if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "installing into .venv (about 6 GB with the GPU libraries that PyTorch brings)"
  python3 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi
export PYTHON=$PWD/.venv/bin/python
