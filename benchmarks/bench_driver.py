"""bench_driver.c's twin: what the driver's part costs from Python, by block size. Ids as
there; on the host base/numpy/S is a new array, touched."""

import numpy as np
from bench import Bench, timed

import pyvmm


def blocks(bench: Bench, block: int, size: str) -> None:
    times = bench.times(20 if block > 32 * 2**20 else 100)
    baseline = ""
    if not bench.is_gpu:
        baseline = f"base/numpy/{size}"
        arrays = [timed(lambda: np.ones(block, "uint8")) for _ in range(times + 1)]
        bench.report(baseline, arrays[1:], block_bytes=block)
    samples: dict[str, list[float]] = {"open": [], "trim": [], "reopen": [], "return": []}
    pool = pyvmm.Pool(bench.device, block_size=block)
    t = pyvmm.empty((0, block), "uint8", axis=0, capacity=4, device=bench.device, pool=pool)
    for round in range(-2, times):
        once = {
            "open": timed(lambda: t.map(1)),
            "trim": timed(t.trim),
            "reopen": timed(lambda: t.map(1)),
        }
        t.trim()
        once["return"] = timed(lambda: pool.trim(wait=True))
        if round >= 0:
            for name, ns in once.items():
                samples[name].append(ns)
    for name, values in samples.items():
        bench.report(f"block/{name}/{size}", values, baseline, block_bytes=block)
    t.close()
    pool.close()


def main() -> None:
    bench = Bench(
        "bench_driver", "use of the memory; several threads at once; the device at work meanwhile"
    )
    if not bench.is_gpu:
        blocks(bench, 64 * 2**10, "64KiB")
    for mib in (2, 16, 32, 128):
        blocks(bench, mib * 2**20, f"{mib}MiB")
    bench.close()


if __name__ == "__main__":
    main()
