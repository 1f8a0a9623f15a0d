#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command and with no network:
#     benchmarks/gpu.sh OUT
# builds in place with the python3 on PATH, runs all tests, the device tests again with the
# PTX that CUDA 12 drivers would load, the memory checker over the kernel's tests, and the
# benchmarks. Logs and results are written to OUT; what it prints is there as gpu.txt.
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
LINES_SHOWN=40 step tests make -j"$(nproc)" PYTHON=python3 test-inplace
ptx_tests() {
    local failed=0 test
    for test in build/tests/c/test_*; do
        [[ -x $test && $test != *.d ]] || continue
        VMM_FORCE_PTX=1 "$test" cuda:0
        case $? in 0) echo "pass $test" ;; 77) echo "skip $test" ;; *) echo "FAIL $test" && failed=1 ;; esac
    done
    return $failed
}
step ptx ptx_tests
sanitize() {
    local tool
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
            build/tests/c/test_strided cuda:0 || return
        compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
            build/tests/c/test_model cuda:0 || return
    done
}
command -v compute-sanitizer >/dev/null && step sanitizer sanitize
LINES_SHOWN=60 step append python3 benchmarks/gpu_append.py --out "$out"
exit $status
