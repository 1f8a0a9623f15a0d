"""bench_read.c's twin: reading memory that was mapped block by block. Ids as there: on the host
numpy.sum() over 8-byte words, on a GPU torch's copy into another tensor. And, where torch is
installed, torch/attention/LAYOUT: attention of one token (SDPA) over a cache that grew, against
torch/attention/LAYOUT/plain over torch.empty memory with the same strides."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench import Bench

import pyvmm

MIB = 2**20


def in_turns(calls: list[Callable[[], object]], times: int) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(-2, times):
        for call, taken in zip(calls, samples, strict=True):
            begin = time.perf_counter_ns()
            call()
            if i >= 0:
                taken.append(time.perf_counter_ns() - begin)
    return samples


def read(bench: Bench, torch: Any, n_bytes: int, block: int, size: str) -> None:
    pool = pyvmm.Pool(bench.device, block_size=block)
    n_rows = n_bytes // (64 * 1024)
    t = pyvmm.empty(
        (0, 64 * 1024), "uint8", axis=0, capacity=n_rows, device=bench.device, pool=pool
    )
    while t.length < n_rows:
        t.grow(1)
    calls: list[Callable[[], object]]
    if bench.is_gpu:
        ours = torch.from_dlpack(t).view(-1)
        plain, target = (torch.ones_like(ours) for _ in range(2))
        ours.fill_(1)

        def copy(source: Any) -> None:
            target.copy_(source)
            torch.cuda.synchronize(bench.device)

        calls = [lambda: copy(plain), lambda: copy(ours)]
    else:
        ours = np.asarray(t).reshape(-1)
        ours[:] = 1
        words = [np.ones(n_bytes, "uint8").view("uint64"), ours.view("uint64")]
        calls = [words[0].sum, words[1].sum]
    theirs, mine = in_turns(calls, bench.times(100 if bench.is_gpu else 20))
    baseline = f"base/{'torch.empty' if bench.is_gpu else 'numpy'}/{size}"
    for id, samples, base in ((baseline, theirs, ""), (f"read/{size}", mine, baseline)):
        rate = n_bytes * 1e9 / sorted(samples)[len(samples) // 2]
        bench.report(id, samples, base, bytes=n_bytes, bytes_per_second=rate)
    # The tensor's memory goes with the arrays over it, the pool's when it is collected.


def attention(bench: Bench, torch: Any) -> None:
    batch, heads, dim = (8, 32, 128) if bench.is_gpu else (1, 8, 128)
    length = 64 if bench.quick else 4096
    dtype = torch.bfloat16 if bench.is_gpu else torch.float32
    device = torch.device(bench.device if bench.is_gpu else "cpu")
    query = torch.randn(batch, heads, 1, dim, device=device, dtype=dtype)
    for layout in ("seq", "lane"):
        ours = []
        for _ in "kv":
            t = pyvmm.empty(
                (batch, 0, heads, dim),
                str(dtype).removeprefix("torch."),
                axis=1,
                capacity=length,
                device=bench.device,
                layout=layout,
            )
            new = torch.randn(batch, 16, heads, dim, device=device, dtype=dtype)
            while t.length < length:  # as it grows: block after block
                t.append(new)
            ours.append(torch.from_dlpack(t))
        plain = [
            torch.empty_strided(c.shape, c.stride(), dtype=dtype, device=device).copy_(c)
            for c in ours
        ]

        def attend(caches: list[Any]) -> Any:
            keys, values = (cache.transpose(1, 2) for cache in caches)
            out = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
            if bench.is_gpu:
                torch.cuda.synchronize(device)
            return out

        if not torch.equal(attend(plain), attend(ours)):
            raise SystemExit(f"attention differs in layout {layout}")
        calls = [lambda: attend(plain), lambda: attend(ours)]  # noqa: B023 (called at once)
        theirs, mine = in_turns(calls, bench.times(100))
        base = f"torch/attention/{layout}/plain"
        bench.report(base, theirs)
        bench.report(f"torch/attention/{layout}", mine, base)


def main() -> None:
    bench = Bench("bench_read", "several readers at once")
    try:
        import torch

        if bench.is_gpu:
            torch.zeros(1, device=bench.device)
    except Exception as error:  # not installed, or whatever a torch without CUDA raises
        torch = None
        print(f"no torch here: {error}".splitlines()[0])
    if torch is None and bench.is_gpu:
        print("bench_read needs torch to read a GPU's memory")
        return
    n_bytes = (64 if bench.quick else 1024 if bench.is_gpu else 256) * MIB
    read(bench, torch, n_bytes, 2 * MIB, "2MiB")
    read(bench, torch, n_bytes, 32 * MIB, "32MiB")
    if torch is not None:
        attention(bench, torch)
    bench.close()


if __name__ == "__main__":
    main()
