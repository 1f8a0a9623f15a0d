"""bench_boundaries.c's twin: 100 000 appends from Python through more than 5 000 block boundaries,
look-ahead off and on, and paced. Ids, rows and blocks as there; on the host base/numpy is as many
assignments to rows of an array, on a GPU base/torch.copy_ as many copies into a slice, where torch
has it."""

import time

import numpy as np
from bench import Bench

import pyvmm
from pyvmm._measure import IN_FLIGHT

APPENDS = 100_000
PAUSE_NS = 10_000
MAPPING = ("create", "map", "set_access")


def mapping_calls(t: pyvmm.VTensor) -> int:
    calls = t.stats()["driver_calls"]
    return sum(calls[name] for name in MAPPING)


def work(ns: int) -> None:
    """Other work of this thread."""
    end = time.perf_counter_ns() + ns
    while ns and time.perf_counter_ns() < end:
        pass


def baseline(bench: Bench, row_bytes: int, n: int) -> str:
    clock = time.perf_counter_ns
    samples = []
    if not bench.is_gpu:
        row = np.ones((1, row_bytes), "uint8")
        target = np.ones((n, row_bytes), "uint8")
        for i in range(n):
            begin = clock()
            target[i : i + 1] = row
            samples.append(clock() - begin)
        bench.report("base/numpy", samples)
        return "base/numpy"
    try:
        import torch

        source = torch.ones((1, row_bytes), dtype=torch.uint8, device=bench.device)
    except Exception as error:  # whatever a torch without CUDA raises
        print(f"no baseline: {error}".splitlines()[0])
        return ""
    target = torch.empty((1024, row_bytes), dtype=torch.uint8, device=bench.device)
    for i in range(n):
        begin = clock()
        target[i % 1024 : i % 1024 + 1].copy_(source)
        samples.append(clock() - begin)
        if i % IN_FLIGHT == 0:
            torch.cuda.synchronize(bench.device)
    bench.report("base/torch.copy_", samples)
    return "base/torch.copy_"


def appends(bench: Bench, row_bytes: int, block: int, n: int, name: str, base: str) -> None:
    pause_ns = PAUSE_NS if name == "paced" else 0
    n_warm = n // 20  # at the pace of other work: look-ahead learns how fast they come
    pool = pyvmm.Pool(bench.device, block_size=block, lookahead=name != "off")
    t = pyvmm.empty(
        (0, row_bytes), "uint8", axis=0, capacity=n + n_warm, device=bench.device, pool=pool
    )
    source = bench.source((1, row_bytes))
    clock, append = time.perf_counter_ns, t.append
    for i in range(n_warm):
        work(PAUSE_NS)
        append(source)
        if i % IN_FLIGHT == 0:
            bench.wait()
    bench.wait()
    first = calls = mapping_calls(t)
    samples: dict[str, list[float]] = {"all": [], "within": [], "boundary": []}
    mapped_by_caller = 0
    for i in range(n):
        at_boundary = t.mapped == t.length
        work(pause_ns)
        begin = clock()
        append(source)
        taken = clock() - begin
        samples["all"].append(taken)
        samples["boundary" if at_boundary else "within"].append(taken)
        if at_boundary:
            now = mapping_calls(t)
            mapped_by_caller += now != calls
            calls = now
        if i % IN_FLIGHT == 0:
            bench.wait()
    bench.wait()
    for part, values in samples.items():
        bench.report(
            f"{name}/{part}",
            values,
            base,
            boundaries=len(samples["boundary"]),
            boundaries_mapped_by_caller=mapped_by_caller,
            mapping_calls_by_caller=calls - first,
            block_bytes=block,
            row_bytes=row_bytes,
        )
    t.close()
    pool.close()


def main() -> None:
    bench = Bench(
        "bench_boundaries",
        "decoding between the appends: milliseconds, in which look-ahead has more time",
    )
    row_bytes, block = (104 * 2**10, 2 * 2**20) if bench.is_gpu else (3328, 64 * 2**10)
    n = bench.times(APPENDS)
    base = baseline(bench, row_bytes, n)
    appends(bench, row_bytes, block, n, "off", base)
    appends(bench, row_bytes, block, n, "on", base)
    appends(bench, row_bytes, block, n, "paced", "")
    bench.close()


if __name__ == "__main__":
    main()
