"""bench_append.c's twin: appending a row at 8192 rows from Python, against numpy.concatenate.

Ids as there; `concatenate/S` is numpy's, `cat/S` torch's where torch is installed. Sources
are NumPy arrays.
"""

import numpy as np
from bench import Bench, keep_large_blocks, timed

import pyvmm

ROWS = 8192
AHEAD = 2048


def baselines(bench: Bench, row: np.ndarray, size: str) -> None:
    cache = np.ones((ROWS, row.shape[1]), row.dtype)
    samples = []
    for _ in range(20):
        samples.append(timed(lambda: np.concatenate((cache, row))))
    bench.report(f"concatenate/{size}", samples[2:])
    try:
        import torch
    except ImportError:
        return
    pair = (torch.from_numpy(cache), torch.from_numpy(row))
    samples = [timed(lambda: torch.cat(pair)) for _ in range(20)]
    bench.report(f"cat/{size}", samples[2:], f"concatenate/{size}")


def appends(bench: Bench, row: np.ndarray, size: str) -> None:
    baseline = f"concatenate/{size}"
    width = row.shape[1]

    def empty() -> pyvmm.VTensor:
        return pyvmm.empty(
            (0, width), row.dtype, axis=0, capacity=ROWS + AHEAD, device=bench.device
        )

    with empty() as t, empty() as u:
        samples = []
        for tensor in (t, u):
            tensor.map(ROWS + AHEAD)
            tensor.grow(ROWS)
        for round in range(-1, 4):
            for _ in range(AHEAD):
                ns = timed(lambda: t.append(row))
                if round >= 0:
                    samples.append(ns)
            t.truncate(ROWS)
        bench.report(f"append/{size}", samples, baseline)
        samples = []
        for round in range(-1, 4):
            for _ in range(AHEAD):
                ns = timed(lambda: pyvmm.append_many([t, u], [row, row]))
                if round >= 0:
                    samples.append(ns)
            t.truncate(ROWS)
            u.truncate(ROWS)
        bench.report(f"append-many/2x{size}", samples, baseline)
    with empty() as t:
        samples = [timed(lambda: t.append(row)) for _ in range(4096)]
    bench.report(f"append/{size}/growing", samples, baseline)


def main() -> None:
    keep_large_blocks()
    bench = Bench("bench_append", "reading the tensor back; sources on a GPU: gpu_append.py")
    for size, n_bytes in (("256B", 256), ("4KiB", 4096), ("16KiB", 16384)):
        row = np.ones((1, n_bytes // 2), np.float16)
        if not bench.is_cuda:
            baselines(bench, row, size)
        appends(bench, row, size)
    bench.close()


if __name__ == "__main__":
    main()
