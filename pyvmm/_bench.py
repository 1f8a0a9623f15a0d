"""What `python -m pyvmm bench` measures: the tensor's own verbs on one device, each against what
one would do without it. Twins of the C benchmarks of the same names (benchmarks/bench_*.c), whose
ids they have; benchmarks/ has those that are about the library rather than about its use.

Times are those of the calling thread, except in `length`, which waits for the device.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pyvmm
from pyvmm import _demo
from pyvmm._measure import IN_FLIGHT, Bench, keep_large_blocks, timed

KIB, MIB, GIB = 2**10, 2**20, 2**30
ROW_SIZES = {"2KiB": 2 * KIB, "16KiB": 16 * KIB, "128KiB": 128 * KIB, "1MiB": MIB}
BLOCK_SIZES = {"2MiB": 2 * MIB, "16MiB": 16 * MIB, "32MiB": 32 * MIB, "128MiB": 128 * MIB}


@dataclass(frozen=True)
class Measurement:
    run: Callable[[Bench], None]
    not_measured: str


def empty(bench: Bench, row_bytes: int, capacity: int, **arguments: Any) -> pyvmm.VTensor:
    return pyvmm.empty(
        (0, row_bytes), "uint8", axis=0, capacity=capacity, device=bench.device, **arguments
    )


def each(
    bench: Bench, call: Callable[[], object], times: int, in_flight: int = IN_FLIGHT
) -> list[float]:
    """Each call's time; the device is waited for outside of them."""
    samples = []
    clock = time.perf_counter_ns
    for i in range(times):
        begin = clock()
        call()
        samples.append(float(clock() - begin))
        if i % in_flight == 0:
            bench.wait()
    bench.wait()
    return samples


def arrays(bench: Bench) -> list[_demo.Arrays]:
    """The array libraries to compare with: on the host NumPy, and torch where it is installed, with
    one thread, which is as fast where memory is what a copy waits for and does not depend on
    what else runs."""
    found, reason = _demo.find_arrays(bench.device)
    if found is None:
        print(f"nothing to compare with on {bench.device}: {reason}")
        return []
    libraries = [found]
    if not bench.is_gpu:
        try:
            libraries.append(_demo.torch_arrays("cpu"))
            import torch

            torch.set_num_threads(1)
        except ImportError:
            print("torch.cat is not compared with: torch is not installed")
    return libraries


def concatenates(
    bench: Bench, library: _demo.Arrays, n_rows: int, row_bytes: int, times: int
) -> list[float]:
    """The library's own concatenate of one row to n_rows, waited for."""
    cache = library.on_device(np.ones((1, n_rows, row_bytes // 2), np.float16))
    row = library.on_device(np.ones((1, 1, row_bytes // 2), np.float16))

    def concatenate() -> None:
        library.concatenate(cache, row)
        library.synchronize()

    # The first ones fault pages in that the allocator keeps from then on.
    warm_up = bench.times(8)
    return [timed(concatenate) for _ in range(times + warm_up)][warm_up:]


# ---- grow ---------------------------------------------------------------------------------------


class _Empty:
    def grow(self, n: int) -> None:
        pass


def grow(bench: Bench) -> None:
    """base/call: an empty method; base/numpy/S: a new array of S bytes, touched."""

    def calls(grow: Callable[[int], object], n: int) -> float:
        begin = time.perf_counter_ns()
        for _ in itertools.repeat(None, n):
            grow(1)
        return (time.perf_counter_ns() - begin) / n

    def within(id: str, row_bytes: int, n_lanes: int) -> None:
        n = min(256 * MIB // row_bytes, 50_000)
        shape = (n_lanes, 0, row_bytes)
        with pyvmm.empty(
            shape, "uint8", axis=1, capacity=n, device=bench.device, layout="lane"
        ) as t:
            t.map(n)
            samples = []
            for _ in range(bench.times(41) + 2):
                samples.append(calls(t.grow, n))
                t.truncate(0)
        bench.report(id, samples[2:], "base/call", row_bytes=row_bytes)

    method = _Empty().grow
    bench.report("base/call", [calls(method, 50_000) for _ in range(bench.times(41))])
    for size, row_bytes in ROW_SIZES.items():
        within(f"grow/within/{size}", row_bytes, 1)
    within("grow/within/2KiB/2-lanes", 2 * KIB, 2)

    row_bytes = 16 * KIB
    for size, block in BLOCK_SIZES.items():
        n = (256 if bench.quick else 512) * MIB // block
        if not bench.is_gpu:
            kept = []  # fresh memory each time
            samples = [timed(lambda: kept.append(np.ones(block, "uint8"))) for _ in range(n)]  # noqa: B023
            bench.report(f"base/numpy/{size}", samples)
            kept.clear()
        rest = block // row_bytes - 1
        with empty(bench, row_bytes, n * (rest + 1), block_size=block) as t:
            samples = []
            for _ in range(n):
                samples.append(timed(lambda: t.grow(1)))  # noqa: B023 (called at once)
                t.grow(rest)
        pyvmm.default_pool(bench.device).trim(wait=True)
        baseline = "" if bench.is_gpu else f"base/numpy/{size}"
        bench.report(f"grow/new-block/{size}", samples, baseline, block_bytes=block)


# ---- append -------------------------------------------------------------------------------------


def append(bench: Bench) -> None:
    """base/LIBRARY/S: its own concatenate."""
    libraries = arrays(bench)
    for size, row_bytes in ROW_SIZES.items():
        n_rows = min(8192, 128 * MIB // row_bytes)
        ahead = n_rows // 4
        baseline = ""
        for library in libraries:
            samples = concatenates(bench, library, n_rows, row_bytes, bench.times(20))
            id = f"base/{library.label}/{size}"
            bench.report(id, samples, baseline)
            baseline = baseline or id
        source = bench.source((1, row_bytes))
        sizes = {"row_bytes": row_bytes, "n_rows": n_rows}
        with empty(bench, row_bytes, n_rows + ahead) as t:
            t.map(n_rows + ahead)
            t.grow(n_rows)
            samples = []
            for round in range(-1, bench.times(8192 // ahead)):
                taken = each(bench, lambda: t.append(source), ahead)  # noqa: B023
                samples += taken if round >= 0 else []
                t.truncate(n_rows)
            bench.report(f"append/{size}", samples, baseline, **sizes)
        pyvmm.default_pool(bench.device).trim(wait=True)
        with empty(bench, row_bytes, n_rows) as t:
            samples = each(bench, lambda: t.append(source), n_rows)  # noqa: B023
        bench.report(f"append/{size}/growing", samples, baseline, **sizes)
        pyvmm.default_pool(bench.device).trim(wait=True)


def append_many(bench: Bench) -> None:
    """base/numpy/NxS: on the host, N assignments to rows of NumPy arrays."""
    for n, (size, row_bytes) in itertools.product((1, 2, 64), ROW_SIZES.items()):
        n_rows = min(2048, 256 * MIB // (n * row_bytes))
        times = n_rows if n_rows * n > 8192 else 8192 // n
        times = bench.times(min(times, GIB // (n * row_bytes)))
        source = bench.source((1, row_bytes))
        baseline = ""
        if not bench.is_gpu:
            places = [np.ones((16, row_bytes), "uint8") for _ in range(n)]
            turn = itertools.count()

            def assign() -> None:
                i = next(turn) % 16  # noqa: B023
                for place in places:  # noqa: B023
                    place[i : i + 1] = source  # noqa: B023

            baseline = f"base/numpy/{n}x{size}"
            bench.report(baseline, each(bench, assign, times + 8)[8:])
        tensors = [empty(bench, row_bytes, n_rows) for _ in range(n)]
        sources = [source] * n
        for t in tensors:
            t.map(n_rows)
        samples: list[float] = []
        while len(samples) < times + 8:
            stretch = min(n_rows, times + 8 - len(samples))
            samples += each(bench, lambda: pyvmm.append_many(tensors, sources), stretch)  # noqa: B023
            for t in tensors:
                t.truncate(0)
        launches = sum(t.stats()["driver_calls"]["launch"] for t in tensors)
        bench.report(
            f"append-many/{n}x{size}",
            samples[8:],
            baseline,
            row_bytes=row_bytes,
            tensors=n,
            launches_per_call=launches / len(samples),
        )
        for t in tensors:
            t.close()
        pyvmm.default_pool(bench.device).trim(wait=True)


# ---- open ---------------------------------------------------------------------------------------

_CALLS = "reserve create map set_access unmap release free event_record event_query fence".split()


def open(bench: Bench) -> None:
    """base/numpy: an array of the same size made, touched and dropped; base/torch.empty: on a GPU
    one of torch's, given back to the driver."""
    row_bytes = 64 * KIB
    n_bytes = GIB if bench.is_gpu else 64 * MIB
    n_rows = n_bytes // row_bytes
    times, many = bench.times(30 if bench.is_gpu else 20), bench.times(100)
    baseline = ""
    if not bench.is_gpu:
        baseline = "base/numpy"
        bench.report(
            baseline, [timed(lambda: np.ones(n_bytes, "uint8")) for _ in range(times + 2)][2:]
        )
    elif (library := next(iter(arrays(bench)), None)) and library.label == "torch.cat":
        import torch

        def make() -> None:
            torch.empty(n_bytes, dtype=torch.uint8, device=bench.device)
            torch.cuda.empty_cache()

        baseline = "base/torch.empty"
        bench.report(baseline, [timed(make) for _ in range(times + 2)][2:])

    pool = pyvmm.Pool(bench.device)
    samples: dict[str, list[float]] = {}
    most: dict[str, dict[str, int]] = {}

    def step(id: str, i: int, call: Callable[[], Any]) -> Any:
        before = pool.stats()["driver_calls"]
        begin = time.perf_counter_ns()
        made = call()
        taken = time.perf_counter_ns() - begin
        after = pool.stats()["driver_calls"]
        if i >= 0:
            samples.setdefault(id, []).append(taken)
            counts = most.setdefault(id, dict.fromkeys(_CALLS, 0))
            for name in _CALLS:
                counts[name] = max(counts[name], after[name] - before[name])
        return made

    def reserve() -> pyvmm.VTensor:
        return empty(bench, row_bytes, n_rows, pool=pool)

    for name, n in (("new", times), ("again", many)):
        for i in range(-2, n):
            if name == "new":
                pool.trim(wait=True)
            t = step(f"open/{name}", i, reserve)
            step(f"map/{name}", i, lambda: t.map(n_rows))  # noqa: B023
            step(f"close/{name}", i, t.close)
    source = bench.source((1, row_bytes))
    for i in range(-2, many):
        t = step("open/busy", i, reserve)
        t.append(source)
        t.close()
    bench.wait()
    for id, values in samples.items():
        calls = {f"calls_{name}": count for name, count in most[id].items()}
        bench.report(id, values, baseline, bytes=n_bytes, **calls)
    pool.close()


# ---- concat -------------------------------------------------------------------------------------


def concat(bench: Bench) -> None:
    """`concat/numpy/N` grows an array of (1, N, 8, 64) float32 by one row of 2 KiB, with memory
    mapped ahead; `base/numpy/N` is numpy.concatenate."""
    if bench.is_gpu:
        print("concat is measured on the host: NumPy's arrays lie there")
        return
    row = np.ones((1, 1, 8, 64), "float32")
    for n_rows in (1, 64, 1024, 8192):
        plain = np.ones((1, n_rows, 8, 64), "float32")
        times = 50 if n_rows < 1000 else 2
        samples = [
            timed(lambda: np.concatenate((plain, row), 1), times)  # noqa: B023
            for _ in range(bench.times(60) + 5)
        ]
        bench.report(f"base/numpy/{n_rows}", samples[5:], length=n_rows)
        t = pyvmm.empty((1, 0, 8, 64), "float32", axis=1, capacity=20_000, device="host")
        t.map(20_000)
        t.grow(n_rows)
        box = [np.asarray(t)]

        def step() -> None:
            box[0] = pyvmm.concat(box[0], row, 1)  # noqa: B023

        samples = [timed(step, 50) for _ in range(bench.times(60) + 5)]
        baseline = f"base/numpy/{n_rows}"
        bench.report(f"concat/numpy/{n_rows}", samples[5:], baseline, length=n_rows)


# ---- length -------------------------------------------------------------------------------------


def length(bench: Bench) -> None:
    """`append/N` and `base/LIBRARY/N` at N rows of 16 KiB (64 KiB on a GPU), a sample being the
    mean of some rows with the device waited for. extra: the memory behind each; a concatenate
    holds the old array and the new one, a static buffer of the last length always all."""
    row_bytes = (64 if bench.is_gpu else 16) * KIB
    lengths = [2**i * 1024 for i in range(6)]
    if bench.quick:
        lengths = [16, 64]
    static_bytes = lengths[-1] * row_bytes
    libraries = arrays(bench)
    source = bench.source((1, row_bytes))
    stretches = bench.times(7)
    with empty(bench, row_bytes, lengths[-1] + 64) as t:
        for n_rows in lengths:
            while t.length < n_rows:
                t.append(source)
            stats = t.stats()
            baseline = ""
            for library in libraries:
                times = bench.times(5 if n_rows > 8192 else 10)
                id = f"base/{library.label}/{n_rows}"
                bench.report(
                    id,
                    concatenates(bench, library, n_rows, row_bytes, times),
                    baseline,
                    length=n_rows,
                    mapped_bytes=(2 * n_rows + 1) * row_bytes,
                )
                baseline = baseline or id
            samples = []
            for round in range(-1, stretches):
                bench.wait()
                begin = time.perf_counter_ns()
                for _ in range(32):
                    t.append(source)
                bench.wait()
                if round >= 0:
                    samples.append((time.perf_counter_ns() - begin) / 32)
                t.truncate(n_rows)
            bench.report(
                f"append/{n_rows}",
                samples,
                baseline,
                length=n_rows,
                mapped_bytes=stats["mapped_bytes"],
                used_bytes=stats["used_bytes"],
                static_bytes=static_bytes,
            )


MEASUREMENTS = {
    "grow": Measurement(grow, "writing the rows; look-ahead"),
    "append": Measurement(append, "reading the tensor back; device time"),
    "append_many": Measurement(append_many, "tensors of different dtypes at once; device time"),
    "open": Measurement(open, "first touch of device memory; other geometries in the same pool"),
    "concat": Measurement(concat, "a GPU's time; memory that is mapped on the way"),
    "length": Measurement(length, "a model's step around the append"),
}


def measure(name: str, device: str, out: Path, quick: bool = False) -> Path:
    """Run one measurement; the path of its result."""
    keep_large_blocks()
    measurement = MEASUREMENTS[name]
    bench = Bench(f"bench_{name}", measurement.not_measured, device, out, quick)
    measurement.run(bench)
    return bench.close()


def run(device: str | None, out: Path, only: list[str], quick: bool) -> int:
    """The command. A measurement that fails does not keep the next from running."""
    device = device or _demo.find_device()
    unknown = [name for name in only if name not in MEASUREMENTS]
    if unknown:
        raise ValueError(f"no measurement {unknown[0]!r}: there are {', '.join(MEASUREMENTS)}")
    failed = []
    for name in only or MEASUREMENTS:
        try:
            measure(name, device, out, quick)
        except (pyvmm.VMMError, MemoryError) as error:
            print(f"bench_{name}: {error}", file=sys.stderr)
            failed.append(name)
        print()
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"pictures of these: python -m pyvmm plot {out} --out {out}")
    return 1 if failed else 0
