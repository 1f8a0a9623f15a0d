"""The host against what the host has: appending a row against concatenating, and a decode step
with VMMCache against a preallocated buffer of huge pages.

    python benchmarks/bench_host.py [--out FOLDER]

append/N            a row of 16 KiB at N rows, within mapped rows and blocks alike
concatenate/N       numpy.concatenate of the same
cat/N               torch.cat of the same
step/T/N/CACHE      a step of a Llama of 4 layers (8 heads of 64) at N tokens in dtype T, all cores:
                    `preallocated`, a buffer of huge pages of the whole length that is written in
                    place and sliced; `vmm`, VMMCache that grows; `dynamic`, DynamicCache
step-cpu/T/N/CACHE  the same on one thread, in CPU time: other work on the machine shows less

The sides take turns, so a busy moment of the machine meets all of them, and samples are medians.
glibc is told to keep large blocks, else each concatenation would fault its pages in anew.
"""

# transformers' classes have no types where it is not installed.
# mypy: disable-error-code="misc"

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Read by glibc before anything runs.
KEEP_LARGE_BLOCKS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
if __name__ == "__main__" and not KEEP_LARGE_BLOCKS.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_LARGE_BLOCKS)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench import Bench, slug, timed  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

import pyvmm  # noqa: E402
from pyvmm.transformers import VMMCache  # noqa: E402

ROW_BYTES = 16 * 1024
LAYERS, HEADS, DIM = 4, 8, 64
STEPS, SKIPPED = 48, 4
HUGE_PAGE_BYTES = 2 << 20


def appends(bench: Bench) -> None:
    row = np.ones((1, ROW_BYTES // 4), np.float32)
    torch_row = torch.from_numpy(row)
    for rows in (1024, 8192, 32768):
        cache = np.ones((rows, ROW_BYTES // 4), np.float32)
        pair = (torch.from_numpy(cache), torch_row)
        samples: dict[str, list[float]] = {"concatenate": [], "cat": [], "append": []}
        with pyvmm.empty((0, ROW_BYTES // 4), "float32", axis=0, capacity=2 * rows) as t:
            t.append(cache)
            for i in range(60 if rows < 32768 else 24):
                concatenate = timed(lambda: np.concatenate((cache, row)))  # noqa: B023
                cat = timed(lambda: torch.cat(pair))  # noqa: B023
                append = [timed(lambda: t.append(torch_row)) for _ in range(8)]  # noqa: B023
                if i >= 4:
                    samples["concatenate"].append(concatenate)
                    samples["cat"].append(cat)
                    samples["append"] += append
        for name, of_one in samples.items():
            bench.report(f"{name}/{rows}", of_one, f"concatenate/{rows}")


def huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in huge pages, each touched."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=offset)
    return flat.zero_().view(dtype).view(shape)


class Preallocated(DynamicLayer):
    """Keys and values in one buffer of the whole length, as someone who knows it would."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.all_keys = huge_pages(shape, keys.dtype)
            self.all_values = huge_pages(shape, keys.dtype)
        begin, self.length = self.length, self.length + keys.shape[2]
        self.all_keys[:, :, begin : self.length].copy_(keys)
        self.all_values[:, :, begin : self.length].copy_(values)
        self.keys = self.all_keys[:, :, : self.length]
        self.values = self.all_values[:, :, : self.length]
        return self.keys, self.values


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=HEADS * DIM,
        intermediate_size=4 * HEADS * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=131_072,
    )


def filled(context: int, dtype: torch.dtype) -> dict[str, DynamicCache]:
    caches = {
        "preallocated": DynamicCache(config=config()),
        "vmm": VMMCache(config()),
        "dynamic": DynamicCache(config=config()),
    }
    caches["preallocated"].layers = [Preallocated(context + 2 * STEPS) for _ in range(LAYERS)]
    keys, values = torch.randn(2, 1, context, HEADS, DIM, dtype=dtype).transpose(2, 3)
    for cache in caches.values():
        for layer in range(LAYERS):
            cache.update(keys, values, layer)
    return caches


def steps(bench: Bench, kind: str, clock: Callable[[], int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(config()).to(dtype).eval()
        for context in (8192, 32768):
            caches = filled(context, dtype)
            samples: dict[str, list[float]] = {name: [] for name in caches}
            token = torch.tensor([[1]])
            for step in range(STEPS):
                logits = {}
                for name in caches if step % 2 else reversed(caches):
                    begin = clock()
                    logits[name] = model(input_ids=token, past_key_values=caches[name]).logits
                    if step >= SKIPPED:
                        samples[name].append(clock() - begin)
                if any(not torch.equal(of_one, logits["vmm"]) for of_one in logits.values()):
                    raise AssertionError("the caches differ")
            id = f"{kind}/{str(dtype).removeprefix('torch.')}/{context}"
            for name, of_one in samples.items():
                bench.report(f"{id}/{name}", of_one, f"{id}/preallocated")


def markdown(bench: Bench) -> str:
    p50 = {str(row["id"]): float(str(row["p50_ns"])) for row in bench.rows}
    lines = [
        f"# bench_host on {bench.machine}",
        "",
        f"pyvmm {pyvmm.__version__}, torch {torch.__version__}, numpy {np.__version__}; glibc "
        "keeps large blocks. Medians, the sides in turns; other jobs ran on the machine.",
        "",
        "## Appending a row of 16 KiB",
        "",
        "| rows | numpy.concatenate takes so many times longer | torch.cat | append, us |",
        "|---|---|---|---|",
    ]
    for rows in (1024, 8192, 32768):
        append = p50[f"append/{rows}"]
        lines.append(
            f"| {rows} | {p50[f'concatenate/{rows}'] / append:,.0f} | "
            f"{p50[f'cat/{rows}'] / append:,.0f} | {append / 1e3:.2f} |"
        )
    lines += [
        "",
        f"## A decode step, Llama of {LAYERS} layers, {HEADS} heads of {DIM}, batch 1",
        "",
        "Against a preallocated buffer of huge pages, written in place: its time is 1. The prompt "
        "came in one update. The rows of one thread are CPU time.",
        "",
        "| dtype, tokens, threads | VMMCache | DynamicCache | preallocated, ms |",
        "|---|---|---|---|",
    ]
    for kind, threads in (("step", str(os.cpu_count())), ("step-cpu", "1")):
        for dtype in ("float32", "bfloat16"):
            for context in (8192, 32768):
                id = f"{kind}/{dtype}/{context}"
                bound = p50[f"{id}/preallocated"]
                lines.append(
                    f"| {dtype}, {context}, {threads} | {p50[f'{id}/vmm'] / bound:.3f} | "
                    f"{p50[f'{id}/dynamic'] / bound:.2f} | {bound / 1e6:.2f} |"
                )
    lines += ["", f"Not measured: {bench.not_measured}.", ""]
    return "\n".join(lines)


def main() -> None:
    torch.manual_seed(0)
    bench = Bench(
        "bench_host",
        "prefill, prompts in pieces of less than 2 MiB a lane (small pages), larger batches",
    )
    with torch.inference_mode():
        appends(bench)
        steps(bench, "step", time.perf_counter_ns)
        torch.set_num_threads(1)
        steps(bench, "step-cpu", time.thread_time_ns)
    bench.close(torch=torch.__version__, numpy=np.__version__)
    path = bench.out / f"{bench.name}-{slug(bench.machine)}.md"
    path.write_text(markdown(bench))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
