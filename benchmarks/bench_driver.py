"""bench_driver.c's twin: what the driver's part costs from Python, by block size. Ids as there."""

import time

from bench import Bench, timed

import pyvmm


def tensors(bench: Bench) -> None:
    opened, closed = [], []
    for _ in range(500):
        begin = time.perf_counter_ns()
        t = pyvmm.empty((0, 1024), "uint8", axis=0, capacity=2**20, device=bench.device)
        opened.append(time.perf_counter_ns() - begin)
        closed.append(timed(t.close))
    bench.report("tensor/open", opened)
    bench.report("tensor/close", closed)


def blocks(bench: Bench, block: int, size: str) -> None:
    samples: dict[str, list[float]] = {"open": [], "trim": [], "reopen": [], "return": []}
    pool = pyvmm.Pool(bench.device, block_size=block)
    t = pyvmm.empty((0, block), "uint8", axis=0, capacity=4, device=bench.device, pool=pool)
    for round in range(-2, 20 if block > 32 * 2**20 else 100):
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
        baseline = f"block/open/{size}" if name == "reopen" else ""
        bench.report(f"block/{name}/{size}", values, baseline)
    t.close()
    pool.close()


def main() -> None:
    bench = Bench(
        "bench_driver", "use of the memory; several threads at once; the device at work meanwhile"
    )
    tensors(bench)
    if not bench.is_cuda:
        blocks(bench, 64 * 2**10, "64KiB")
    blocks(bench, 2 * 2**20, "2MiB")
    blocks(bench, 32 * 2**20, "32MiB")
    blocks(bench, 128 * 2**20, "128MiB")
    bench.close()


if __name__ == "__main__":
    main()
