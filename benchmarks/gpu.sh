#!/usr/bin/env bash
# The benchmarks that need a GPU, in one command and with no network:
#     benchmarks/gpu.sh OUT [KVCACHED]
# in order of importance, until TOTAL_S seconds (540) are over; one that fails or takes too long does
# not keep the next from running. It builds nothing but kvcached, in the folder KVCACHED (an unpacked
# sdist) where that is given: first `make PYTHON=python3 inplace bench-programs`, or BUILD=1.
#
# In OUT: gpu.txt, what this prints; must_show.md, target and figure of each promise; bench.md, all
# rows; results.tar.gz, the results as JSON, the Markdown of single ones, and a log of each step.
# Results go to $RESULTS while it runs (a temporary folder). The tests on such a machine: tests/gpu.sh.
set -uo pipefail
out=$(mkdir -p "${1:?the folder for results}" && cd "$1" && pwd)
kvcached=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
exec > >(tee "$out/gpu.txt") 2>&1
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
device=${DEVICE:-cuda:0}
results=${RESULTS:-$(mktemp -d)}
mkdir -p "$results"
SECONDS=0
status=0

step() { # name, limit in seconds, command...: its output goes to a log, its end to the screen
    local name=$1 limit=$2 begun=$SECONDS left=$((${TOTAL_S:-540} - 20 - SECONDS)) code
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        echo "== $name: not run, no time is left"
        status=1
        return
    fi
    timeout --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1
    code=$?
    ((code == 0 || code == 77)) || status=1
    case $code in 124 | 137) code="$code, stopped after $limit s" ;; esac
    echo "== $name: exit status $code, $((SECONDS - begun)) s"
    tail -n "${LINES_SHOWN:-3}" "$results/$name.log"
}

c() { # name, limit: build/benchmarks/bench_NAME
    step "$1-c" "$2" "build/benchmarks/bench_$1" "$device" --out "$results" ${QUICK:+--quick}
}
py() { # name, limit: its twin
    step "$1-python" "$2" python3 "benchmarks/bench_$1.py" "$device" --out "$results" ${QUICK:+--quick}
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[[ -z ${BUILD:-} ]] || step build 150 make -j"$(nproc)" PYTHON=python3 inplace bench-programs

c boundaries 40
c grow 30
c append 40
py append 60
py grow 30
step gpu_append 90 python3 benchmarks/gpu_append.py --device "$device" --out "$results"
c open 30
py open 30
step gpu_replay 60 python3 benchmarks/gpu_replay.py --device "$device" --out "$results"
c append_many 40
step peers 300 python3 benchmarks/peers.py "$device" --out "$results" ${QUICK:+--quick} \
    ${kvcached:+--kvcached "$kvcached"}
c slack 60
py boundaries 60
c read 30
py read 40
c driver 30
py length 60
c threads 40
py slack 60
py append_many 40
py driver 30
py threads 40

python3 benchmarks/run.py --out "$results" --summary >/dev/null
LINES_SHOWN=80 step must_show 15 python3 benchmarks/must_show.py "$results" --device "$device" \
    --points 1 2 3 4 5 6 7 --out "$out/must_show.md"
cp "$results"/bench-*.md "$out/bench.md" 2>/dev/null
tar -C "$results" -czf "$out/results.tar.gz" .
echo "== everything: $SECONDS s, results in $out"
exit $status
