# Run or sourced: goes to the repository's root, makes .venv there and installs the requirements if they are not there;
# sets PYTHON, which may name the interpreter to make it with.
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/installed.txt; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python must be Python 3.11 or later: name another one with PYTHON=..." >&2; exit 2; }
  echo "installing into .venv (about 6 GB with the GPU libraries that PyTorch brings)"
  "$python" -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt &&
    cp requirements.txt .venv/installed.txt ||
    { echo "error: the installation failed; run the same command again" >&2; exit 2; }
fi
export PYTHON=$PWD/.venv/bin/python
