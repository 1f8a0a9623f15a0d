"""pyvmm.transformers.VMMCache against DynamicCache on the host: what a step's update costs,
and how fast attention reads each layout.

    python benchmarks/bench_transformers.py [--out FOLDER]

All of it is CPU time of one thread, which another process on the machine does not disturb.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from bench import Bench, keep_large_blocks
from transformers import DynamicCache, LlamaConfig

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


def main() -> None:
    keep_large_blocks()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(
        "bench_transformers", "prefill, and the rest of a model's step; CPU time of one thread"
    )
    with torch.inference_mode():
        update(bench)
        attend(bench)
    bench.close(torch=torch.__version__, layers=LAYERS)


if __name__ == "__main__":
    main()
