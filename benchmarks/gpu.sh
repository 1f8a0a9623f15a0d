#!/usr/bin/env bash
# The benchmarks that need a GPU, in one command and with no network:
#     benchmarks/gpu.sh OUT
# builds in place with the python3 on PATH and runs them. Logs and results are written to OUT;
# what it prints is there as gpu.txt. The tests on such a machine: tests/gpu.sh.
set -uo pipefail
out=$(mkdir -p "${1:?the folder for results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
exec > >(tee "$out/gpu.txt") 2>&1
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
status=0
step() { # name, command...: its output goes to a log, its end to the screen
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1
    local code=$?
    ((code == 0)) || status=1
    echo "== $name: exit status $code"
    tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
LINES_SHOWN=3 step build make -j"$(nproc)" PYTHON=python3 inplace
LINES_SHOWN=60 step append python3 benchmarks/gpu_append.py --out "$out"
exit $status
