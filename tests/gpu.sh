#!/usr/bin/env bash
# All tests that only a machine with a GPU can run, in one command and with no network:
#     tests/gpu.sh OUT
# builds in place with the python3 on PATH, then asks the driver the conformance probes, runs
# the C tests on the GPU, the tests that take all of its memory and those of kernels in flight,
# the checkers of compute-sanitizer over the append kernel, and at last the whole suite.
# A step that fails or takes too long does not keep the next from running.
#
# In OUT: summary.txt, a log for each step, and conformance-<gpu>.txt, the driver's answers, to
# be kept as tests/conformance/<gpu>.txt. TOTAL_S=540 bounds the whole in seconds.
set -uo pipefail
out=$(mkdir -p "${1:?the folder for results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
exec > >(tee "$out/summary.txt") 2>&1
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
SECONDS=0
status=0

step() { # name, limit in seconds, command...
    local name=$1 limit=$2 begun=$SECONDS left=$((${TOTAL_S:-540} - SECONDS)) code
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        echo "== $name: not run, no time is left"
        status=1
        return
    fi
    export -f "$1" 2>/dev/null
    timeout --kill-after=10 "$limit" bash -c '"$@"' - "$@" >"$out/$name.log" 2>&1
    code=$?
    ((code == 0)) || status=1
    case $code in 124 | 137) code="$code, stopped after $limit s" ;; esac
    echo "== $name: exit status $code, $((SECONDS - begun)) s"
    grep -E '^(FAIL|FAILED|ERROR|[0-9]+ (passed|failed|skipped)|(C|Python) tests:|=+ (ERROR|RACECHECK) SUMMARY|-- )' \
        "$out/$name.log" | tail -n "${LINES_SHOWN:-25}"
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
slug=$(tr '[:upper:] ' '[:lower:]-' <<<"$gpu" | tr -cd 'a-z0-9.-')
export slug out
echo "$gpu, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)"
echo "$(nproc) cores, $(python3 --version), $(date -u +%F)"

build() {
    make -j"$(nproc)" PYTHON=python3 inplace && make -j"$(nproc)" --keep-going test-programs
}
step build 150 build

conformance() {
    build/tests/conformance/probes >"$out/conformance-$slug.txt" || return
    echo "-- $(grep -vc -e '^#' -e '^$' "$out/conformance-$slug.txt") probes answered"
    python3 -m pytest -q -rfE tests/python/test_conformance.py
}
LINES_SHOWN=4 step conformance 150 conformance

# Each with the kernels that this driver loads, and with the PTX that CUDA 12 drivers load.
c_tests() {
    local test name form passed=0 skipped=0 failed=0
    for test in tests/c/test_*.c; do
        grep -q 'main(int argc' "$test" || continue
        for form in 0 1; do
            name="$(basename "$test" .c), VMM_FORCE_PTX=$form"
            VMM_FORCE_PTX=$form timeout 90 "build/tests/c/$(basename "$test" .c)" cuda:0
            case $? in
            0) echo "pass $name" && passed=$((passed + 1)) ;;
            77) echo "skip $name" && skipped=$((skipped + 1)) ;;
            *) echo "FAIL $name" && failed=$((failed + 1)) ;;
            esac
        done
    done
    echo "-- $passed passed, $failed failed, $skipped skipped on the GPU"
    return $((failed > 0))
}
step c-tests 150 c_tests

# Each module in a process of its own, as frameworks do not always bear one another.
reliability() {
    local module failed=0
    export PYVMM_TEST_EXHAUST=1 PYVMM_TEST_DEVICE=cuda:0
    for module in test_out_of_memory test_in_flight test_handoff_pressure; do
        echo "-- $module"
        timeout 100 python3 -m pytest -q -rfEs --durations=3 "tests/python/$module.py" || failed=1
    done
    return $failed
}
step reliability 180 reliability

# The append kernel under the checkers, all at once: the GPU has room. racecheck is about shared
# memory, of which the kernel has none, and slow: three tests reach every form of the kernel.
sanitize() {
    local tool test job jobs=() failed=0
    command -v compute-sanitizer || { echo "-- compute-sanitizer not found" && return 1; }
    for tool in memcheck racecheck; do
        for test in test_strided test_model test_many $([ $tool = racecheck ] || echo test_zero); do
            compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
                "build/tests/c/$test" cuda:0 >"/tmp/sanitizer-$tool-$test.log" 2>&1 &
            jobs+=("$! $tool $test")
        done
    done
    for job in "${jobs[@]}"; do
        read -r pid tool test <<<"$job"
        wait "$pid" && echo "-- $tool $test: clean" && continue
        failed=1
        echo "FAIL $tool $test"
        tail -n 30 "/tmp/sanitizer-$tool-$test.log"
    done
    return $failed
}
step sanitizer 150 sanitize

# The Python suite on the GPU, and each framework in a process of its own. What needs no GPU is
# tested elsewhere.
# Each framework's modules in processes of their own, a few at once: most of their time is the host's.
framework() {
    local output code
    output=$(timeout 200 python3 -m pytest -q -rfE -m 'not frameworks' "$1" 2>&1)
    code=$?
    printf -- '-- %s\n%s\n' "$(basename "$1")" "$output"
    case $code in 0 | 5) ;; *) return 1 ;; esac
}
export -f framework

suite() {
    local failed=0
    PYVMM_TEST_DEVICE=cuda:0 timeout 240 python3 -m pytest -q -rfE tests/python \
        --ignore-glob='*/test_handoff_*' --ignore=tests/python/test_packaging.py \
        -m 'not frameworks' || failed=1
    # Pressure is above: it takes all of the memory.
    printf '%s\n' tests/python/test_handoff_*.py tests/python/test_transformers_*.py |
        grep -v pressure | xargs -P 4 -I{} bash -c 'framework {}' || failed=1
    return $failed
}
LINES_SHOWN=60 step suite 400 suite

echo "== everything: $([ $status = 0 ] && echo passed || echo FAILED), $SECONDS s"
exit $status
