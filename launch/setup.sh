#!/usr/bin/env bash
# Make .venv with everything in it: `bash launch/setup.sh [PYTHON]`. `make` calls it once; .venv/ready says that it has ended well.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
PATH=${PATH#"$PWD/.venv/bin:"} # never the interpreter of the .venv that is about to be replaced

# The data set is the demo's. mpirun starts ranks in the tests. All by apt where we may; the demo can also download the
# data set. Nothing is compiled.
missing=()
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
[ -d /usr/share/datasets/fashion-mnist ] || missing+=(dataset-fashion-mnist)
command -v mpirun >/dev/null || missing+=(openmpi-bin)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
        >/dev/null || echo "setup: apt-get could not install ${missing[*]}" >&2
fi
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer with venv: make PYTHON=python3.11, or apt-get install python3-venv" >&2
    exit 2
fi

echo "setup: installing into .venv (a minute or two; more where pip fetches a CUDA build of torch)"
"$python" -m venv --clear .venv # an interrupted installation starts over
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt 2>&1 | { grep -v '^WARNING' || true; }
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
touch .venv/ready
