"""bench_slack.c's twin: slack and driver calls of a decode step of 32 layers from Python, by block
size. Ids as there; on the host base/static is assignments to rows of arrays of the final size."""

import time
from typing import Any

import numpy as np
from bench import Bench

import pyvmm

TENSORS = 64
MIB = 2**20
MAPPING = ("create", "map", "set_access", "unmap", "release", "reserve", "free")


def static(bench: Bench, row_bytes: int, tokens: int) -> str:
    if bench.is_gpu:
        return ""
    buffers = [np.ones((tokens, row_bytes), "uint8") for _ in range(TENSORS)]
    row = np.ones((1, row_bytes), "uint8")
    samples = []
    for token in range(tokens):
        begin = time.perf_counter_ns()
        for buffer in buffers:
            buffer[token : token + 1] = row
        samples.append(time.perf_counter_ns() - begin)
    n_bytes = TENSORS * row_bytes * tokens
    bench.report(
        "base/static", samples, tokens=tokens, mapped_bytes=n_bytes, slack_bytes_mean=n_bytes / 2
    )
    return "base/static"


def decode(
    bench: Bench, n: int, row_bytes: int, tokens: int, block: int | str, base: str, id: str
) -> None:
    pool = pyvmm.Pool(bench.device, block_size=block)
    tensors = [
        pyvmm.empty(
            (0, row_bytes), "uint8", axis=0, capacity=tokens, device=bench.device, pool=pool
        )
        for _ in range(n)
    ]
    sources = [bench.source((1, row_bytes))] * n
    before: dict[str, int] = pool.stats()["driver_calls"]
    samples, slack = [], []
    try:
        for token in range(tokens):
            begin = time.perf_counter_ns()
            pyvmm.append_many(tensors, sources)
            samples.append(time.perf_counter_ns() - begin)
            if token % 64 == 63:
                bench.wait()
            if token % 16 == 15 or token + 1 == tokens:
                stats: Any = pool.stats()
                slack.append(stats["in_use_bytes"] - (token + 1) * n * row_bytes)
    except pyvmm.OutOfMemoryError as error:
        print(f"{id:<36} does not fit: {str(error).splitlines()[0]}")
    else:
        calls = {name: count - before[name] for name, count in stats["driver_calls"].items()}
        sizes = {} if block == "auto" else {"block_bytes": int(block)}
        bench.report(
            id,
            samples,
            base,
            **sizes,
            tokens=tokens,
            mapped_bytes=stats["in_use_bytes"],
            slack_bytes=slack[-1],
            slack_bytes_mean=sum(slack) / len(slack),
            slack_bytes_most=max(slack),
            blocks=sum(t.stats()["block_count"] for t in tensors),
            driver_calls_per_token=sum(calls[name] for name in MAPPING) / tokens,
            launches_per_token=(calls["launch"] + calls["copy"]) / tokens,
        )
    bench.wait()
    for t in tensors:
        t.close()
    pool.close()


def main() -> None:
    bench = Bench(
        "bench_slack", "attention over the rows: a cache with all layers in a row has strides"
    )
    row_bytes = (16 if bench.is_gpu else 2) * 2**10
    tokens = 64 if bench.quick else 4096 if bench.is_gpu else 2048
    base = static(bench, row_bytes, tokens)
    for size, block in {"auto": "auto", **{f"{n}MiB": n * MIB for n in (2, 16, 32, 128)}}.items():
        # On the host blocks are committed whole: not so many large ones.
        if bench.is_gpu or block == "auto" or int(block) <= 16 * MIB:
            decode(bench, TENSORS, row_bytes, tokens, block, base, f"separate/{size}")
        decode(bench, 1, TENSORS * row_bytes, tokens, block, base, f"together/{size}")
    bench.close()


if __name__ == "__main__":
    main()
