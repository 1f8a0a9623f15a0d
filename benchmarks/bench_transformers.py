"""pyvmm.transformers.VMMCache against DynamicCache on the host: what a step's update costs,
how fast attention reads each layout, and a decode step of a small Llama at a long context against
one buffer of the final size with huge pages (`step/N/bound`), which no cache can beat.

    python benchmarks/bench_transformers.py [--out FOLDER] [--quick]

update and attend are CPU time of one thread, which another process on the machine does not
disturb; step is wall clock, with as many threads as torch takes. Its model has 4 layers and as many
key/value heads as query heads, 8 of 128, so that the cache is most of what a step reads; caches
take turns, and contexts are set by filling them, not by a pass over a prompt.
"""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import Bench, keep_large_blocks
from hf_decode import BoundLayer
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from pyvmm.transformers import VMMCache

LAYERS, KV_HEADS, HEADS, DIM = 32, 8, 32, 128
STEPS = 25


def timed(call: Callable[[], object]) -> int:
    """Nanoseconds of this thread's CPU time."""
    begin = time.thread_time_ns()
    call()
    return time.thread_time_ns() - begin


def config() -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_size=HEADS * DIM,
        max_position_embeddings=131_072,
    )


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As attention makes them: (batch, tokens, heads, dim) seen as (batch, heads, ...), the
    keys copied by the rotation."""
    keys, values = torch.randn(2, batch, tokens, KV_HEADS, DIM).transpose(2, 3)
    return keys.contiguous(), values


def update(bench: Bench) -> None:
    """All layers' update with one token, as one step of decoding makes them."""
    for batch in (1, 8):
        for context in (16, 128, 1024) if batch == 1 else (16, 128):
            baseline = f"update/B{batch}/{context}/DynamicCache"
            for name in ("DynamicCache", "VMMCache"):
                samples: list[float] = []
                for _ in range(2):
                    cache = (
                        DynamicCache(config=config())
                        if name == "DynamicCache"
                        else VMMCache(config())
                    )
                    prompt, token = states(batch, context), states(batch, 1)
                    for layer in range(LAYERS):
                        cache.update(*prompt, layer)

                    def step(cache: DynamicCache = cache, token: tuple = token) -> None:
                        for layer in range(LAYERS):
                            cache.update(*token, layer)

                    step()
                    samples += [timed(step) for _ in range(STEPS)]
                bench.report(f"update/B{batch}/{context}/{name}", samples, baseline)


def attend(bench: Bench) -> None:
    """One layer's attention of one token over a cache in each layout; grouped heads."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, context in ((1, 4096), (8, 1024)):
            query = torch.randn(batch, HEADS, 1, DIM, dtype=dtype)
            prompt = [part.to(dtype) for part in states(batch, context)]
            kind = f"attend/{str(dtype).removeprefix('torch.')}/B{batch}/{context}"
            made = {}
            for layout in ("seq", "lane", "c"):
                made[layout] = VMMCache(config(), layout=layout)
                made[layout].update(*prompt, 0)
            # In turns: a busy moment of the machine meets all of them.
            samples: dict[str, list[float]] = {layout: [] for layout in made}
            for i in range(STEPS):
                for layout, cache in made.items():
                    keys, values = cache.layers[0].keys, cache.layers[0].values
                    attention = functools.partial(
                        torch.nn.functional.scaled_dot_product_attention,
                        *(query, keys, values),
                        enable_gqa=True,
                    )
                    if i >= 3:
                        samples[layout].append(timed(attention))
            for layout in made:
                bench.report(f"{kind}/{layout}", samples[layout], f"{kind}/seq")


class HugePages(BoundLayer):
    """The bound of a host: huge pages, and all of it touched before."""

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        shape = batch, heads, self.capacity, dim
        memory = mmap.mmap(-1, batch * heads * self.capacity * dim * states.element_size())
        memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=states.dtype).fill_(0).view(shape)


def step(bench: Bench) -> None:
    small = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=2816,
        vocab_size=1000,
        max_position_embeddings=131_072,
    )
    model = AutoModelForCausalLM.from_config(small).eval()
    token = torch.ones(1, 1, dtype=torch.long)
    n_steps = bench.times(31)
    for context in (64,) if bench.quick else (8192, 32768):
        caches: dict[str, Any] = {
            "bound": DynamicCache(config=small),
            "VMMCache": VMMCache(small),
            "DynamicCache": DynamicCache(config=small),
        }
        caches["bound"].layers = [
            HugePages(context + n_steps + 8, "c") for _ in range(small.num_hidden_layers)
        ]
        for layer in range(small.num_hidden_layers):
            for begin in range(0, context, 1024):
                new = torch.randn(2, 1, 8, min(1024, context - begin), 128)
                for cache in caches.values():
                    cache.update(*new, layer)
        samples: dict[str, list[float]] = {name: [] for name in caches}
        for i in range(-3, n_steps):
            for name, cache in caches.items():
                begin_ns = time.perf_counter_ns()
                model(token, past_key_values=cache)
                if i >= 0:
                    samples[name].append(time.perf_counter_ns() - begin_ns)
        for name in caches:
            bench.report(f"step/{context}/{name}", samples[name], f"step/{context}/DynamicCache")


def main() -> None:
    keep_large_blocks()
    torch.manual_seed(0)
    bench = Bench(
        "bench_transformers", "prefill; models with grouped heads; batches of a whole step"
    )
    with torch.inference_mode():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if not bench.quick:
            update(bench)
            attend(bench)
        torch.set_num_threads(threads)
        step(bench)
    bench.close(torch=torch.__version__, layers=LAYERS)


if __name__ == "__main__":
    main()
