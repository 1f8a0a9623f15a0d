"""bench_threads.c's twin: one pool under 1 to 16 Python threads. Ids as there. The interpreter's
lock is given up around what may reach the driver, so threads are as parallel as that makes them."""

import mmap
import threading
import time

import numpy as np
from bench import Bench

import pyvmm

BLOCKS = 4
ROW = 4096
PER_THREAD = 2  # the stream's name in CUDA and DLPack


def operations(bench: Bench, kind: str, pool: pyvmm.Pool, source: object):
    """What one thread does over and over; and what it does after 64 of them, and at its end."""
    block = 2 * 2**20 if bench.is_gpu else 256 * 2**10
    if kind == "base/mmap-cycle":

        def from_the_kernel() -> None:
            with mmap.mmap(-1, BLOCKS * block) as memory:
                touched = np.frombuffer(memory, "uint8")[::4096]
                touched[:] = 1
                del touched

        return from_the_kernel, lambda: None, lambda: None
    if kind == "cycle":
        n_rows = BLOCKS * block // ROW

        def cycle() -> None:
            t = pyvmm.empty(
                (0, ROW),
                "uint8",
                axis=0,
                capacity=n_rows,
                device=bench.device,
                pool=pool,
                block_size=block,
            )
            for _ in range(BLOCKS):
                t.grow(n_rows // BLOCKS)
            t.close()

        return cycle, lambda: None, lambda: None
    t = pyvmm.empty((0, ROW), "uint8", axis=0, capacity=1024, device=bench.device, pool=pool)
    t.map(1024)
    stream = PER_THREAD if bench.is_cuda else None
    host = np.ones((1, ROW), "uint8")

    def settle() -> None:
        if bench.is_gpu:  # a host source has been read on return, so all before it is done
            t.append(host, stream=stream)
        t.truncate(0)

    return lambda: t.append(source, stream=stream), settle, t.close


def run_threads(bench: Bench, kind: str, n: int, baseline: str) -> None:
    times = bench.times((1600 if "cycle" in kind else 32000) // n)
    pool = pyvmm.Pool(bench.device)
    source = bench.source((1, ROW))
    bench.wait()
    gate = threading.Barrier(n)
    samples: list[float] = []
    spans: list[tuple[int, int]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            operation, settle, end = operations(bench, kind, pool, source)
            clock = time.perf_counter_ns
            taken = []
            gate.wait()
            began = clock()
            for i in range(times):
                begin = clock()
                operation()
                taken.append(clock() - begin)
                if i % 64 == 63:
                    settle()
            spans.append((began, clock()))
            settle()
            end()
            samples.extend(taken[times // 10 :])  # the first tenth is warm-up
        except BaseException as error:  # told by the main thread
            failures.append(error)
            gate.abort()

    threads = [threading.Thread(target=work) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    seconds = (max(end for _, end in spans) - min(begin for begin, _ in spans)) / 1e9
    bench.report(
        f"{kind}/{n}", samples, baseline, threads=n, operations_per_second=n * times / seconds
    )
    pool.close()


def main() -> None:
    bench = Bench(
        "bench_threads", "work between the calls; threads that share a tensor, which they may not"
    )
    for n in (1, 2, 4, 8, 16):
        base = "" if bench.is_gpu else f"base/mmap-cycle/{n}"
        if base:
            run_threads(bench, "base/mmap-cycle", n, "")
        run_threads(bench, "cycle", n, base)
        run_threads(bench, "append", n, "")
    bench.close()


if __name__ == "__main__":
    main()
