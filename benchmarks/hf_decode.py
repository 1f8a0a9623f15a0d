"""A decode step of transformers' Llama on a GPU, by cache: GPU time, and host time of update.

    python benchmarks/hf_decode.py --out FOLDER [--layout seq] [--only logits|steps] [--smoke]

Models of 7B (as many key/value heads as query heads) and 8B (8 of 32), random weights, bf16,
all layers; each built once. Contexts are set by filling the caches with random keys and
values, not by a pass over a prompt. The caches:

    DynamicCache  transformers' own: concatenates
    VMMCache      pyvmm's
    bound         one buffer of the final size, written in place and sliced, with the strides
                  of VMMCache: what the best cache of its kind could do
    StaticCache   transformers' own of the final size

GPU time of a step is the sum of its kernels' durations by torch.profiler: eager transformers
leaves the GPU idle between launches, so that events around a step would time the host, and a
captured step is not possible with a concatenation. Each step is profiled by itself; medians.

First, logits of small models are compared between VMMCache and DynamicCache under teacher
forcing. Other strides may choose other kernels, which round differently, so they agree within
a tolerance, which is printed: the largest difference over the largest logit.

--smoke runs all of it on the CPU with tiny shapes, where wall time stands for GPU time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import Bench, slug
from transformers.cache_utils import DynamicLayer

import pyvmm
from pyvmm.transformers import VMMCache

KINDS = "bound", "VMMCache", "DynamicCache", "StaticCache"
SHAPES: dict[str, dict[str, int]] = {
    "7B MHA": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "8B GQA": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
ROWS = (
    ("7B MHA", 1, 3072),
    ("7B MHA", 8, 3072),
    ("8B GQA", 8, 3072),
    ("8B GQA", 16, 8192),
    ("8B GQA", 1, 32768),
    ("8B GQA", 1, 100_000),
)
N_WARM, N_PROFILED, N_WALL, N_UPDATES = 2, 7, 5, 40
# Tokens that a cache grows by in all: StaticCache and the bound have room for them.
ROOM = N_WARM + N_PROFILED + N_WALL + N_UPDATES
# The largest difference of logits over the largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


class BoundLayer(DynamicLayer):
    """One buffer for each of K and V, allocated at once, with the strides of a VTensor."""

    def __init__(self, capacity: int, layout: str) -> None:
        super().__init__()
        self.capacity, self.layout, self.length = capacity, layout, 0

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        self.buffers = tuple(self._buffer(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        if self.layout == "seq":
            return states.new_empty(self.capacity, batch, heads, dim).permute(1, 2, 0, 3)
        if self.layout == "lane":
            return states.new_empty(batch, self.capacity, heads, dim).transpose(1, 2)
        return states.new_empty(batch, heads, self.capacity, dim)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end].copy_(states)
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def make_cache(kind: str, config: Any, length: int, layout: str | None) -> Any:
    if kind == "DynamicCache":
        return transformers.DynamicCache(config=config)
    if kind == "StaticCache":
        return transformers.StaticCache(config=config, max_cache_len=length)
    if kind == "VMMCache":
        return VMMCache(config, layout=layout)
    cache = transformers.DynamicCache(config=config)
    cache.layers = [BoundLayer(length, str(layout)) for _ in cache.layers]
    return cache


class Run:
    def __init__(
        self,
        options: argparse.Namespace,
        name: str = "hf_decode",
        not_measured: str = "a pass over a prompt; sampling; the time between a step's kernels",
    ) -> None:
        self.options = options
        self.smoke = options.smoke
        self.device = torch.device("cpu" if self.smoke else options.device)
        self.dtype = torch.float32 if self.smoke else torch.bfloat16
        self.layout = options.layout or ("c" if self.smoke else "seq")
        self.bench = Bench(
            name,
            not_measured,
            "host" if self.smoke else options.device,
            options.out,
        )
        self.rows: list[dict[str, Any]] = []
        self.logits: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            self.synchronize()
            torch.cuda.empty_cache()
            pyvmm.default_pool(str(self.device)).trim(wait=True)


# ---- steps ------------------------------------------------------------------------


def build(run: Run, shape: str) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=131_072,
        **SHAPES[shape],
    )
    if run.smoke:
        config.num_hidden_layers, config.vocab_size, config.intermediate_size = 2, 64, 64
        config.hidden_size, config.num_attention_heads, config.head_dim = 64, 4, 16
        config.num_key_value_heads = 4 if shape == "7B MHA" else 2
    with torch.device(run.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=run.dtype)
    return model.eval()


def random_states(run: Run, config: Any, batch: int, tokens: int) -> list[torch.Tensor]:
    """Keys and values as attention makes them: the keys copied by the rotation, the values
    (batch, tokens, heads, dim) seen as (batch, heads, tokens, dim)."""
    size = batch, tokens, config.num_key_value_heads, config.head_dim
    keys, values = (
        torch.randn(size, dtype=run.dtype, device=run.device).transpose(1, 2) for _ in range(2)
    )
    return [keys.contiguous(), values]


def gpu_time_ns(run: Run, step: Callable[[], object]) -> float:
    """The sum of the kernels, copies and fills of one step."""
    if run.device.type == "cpu":
        return wall_ns(run, step)
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        run.synchronize()
    return 1e3 * sum(
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )


def wall_ns(run: Run, step: Callable[[], object]) -> float:
    run.synchronize()
    begin = time.perf_counter_ns()
    step()
    run.synchronize()
    return time.perf_counter_ns() - begin


def measure(run: Run, model: Any, batch: int, context: int, kind: str) -> dict[str, list[float]]:
    config = model.config
    cache = make_cache(kind, config, context + ROOM, run.layout)
    for layer in range(config.num_hidden_layers):
        cache.update(*random_states(run, config, batch, context), layer)
    token = torch.ones(batch, 1, dtype=torch.long, device=run.device)

    def step() -> None:
        model(token, past_key_values=cache)

    for _ in range(N_WARM):
        step()
    samples = {
        "gpu": [gpu_time_ns(run, step) for _ in range(N_PROFILED)],
        "wall": [wall_ns(run, step) for _ in range(N_WALL)],
        "update": [],
    }
    one = random_states(run, config, batch, 1)
    for _ in range(N_UPDATES):
        run.synchronize()
        begin = time.perf_counter_ns()
        for layer in range(config.num_hidden_layers):
            cache.update(*one, layer)
        samples["update"].append(time.perf_counter_ns() - begin)
    if kind == "VMMCache":
        counts = cache.stats()
        if counts["moves"] or counts["intakes"] or counts["concatenations"]:
            run.failures.append(f"VMMCache left its place: {counts}")
    run.synchronize()
    return samples


def steps(run: Run) -> None:
    model: Any = None
    built = None
    for shape, batch, context in ROWS:
        if run.smoke:
            batch, context = min(batch, 2), min(context // 64, 200)
        if built != shape:
            model = None
            run.free()
            model, built = build(run, shape), shape
        row: dict[str, Any] = {"model": shape, "batch": batch, "context": context}
        name = f"{shape.replace(' ', '-')}/B{batch}/{context}"
        for kind in KINDS:
            run.free()
            try:
                samples = measure(run, model, batch, context, kind)
            except (torch.cuda.OutOfMemoryError, pyvmm.OutOfMemoryError) as error:
                run.failures.append(f"{name}, {kind}: {str(error).splitlines()[0]}")
                continue
            for what, values in samples.items():
                run.bench.report(f"{what}/{name}/{kind}", values, f"{what}/{name}/bound")
                row[f"{what}/{kind}"] = statistics.median(values)
        run.rows.append(row)


# ---- logits -----------------------------------------------------------------------


def small_models() -> dict[str, Any]:
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.1,
    }
    return {
        "Llama, GQA": transformers.LlamaConfig(**sizes),
        "Qwen2": transformers.Qwen2Config(**sizes),
        "Mistral, window 64": transformers.MistralConfig(**sizes, sliding_window=64),
        "T5": transformers.T5Config(
            vocab_size=1024, d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8
        ),
    }


def forced_logits(run: Run, model: Any, kind: str, ids: Any, n_steps: int, masked: bool) -> Any:
    """Logits of a pass over a prompt and of n_steps steps, each given the right token."""
    config = model.config
    given = {}
    name = "input_ids"
    n_prompt = ids.shape[1] - n_steps
    if config.is_encoder_decoder:
        cache = transformers.EncoderDecoderCache(
            *(make_cache(kind, config, 0, run.layout) for _ in range(2))
        )
        given, name, n_prompt = {"input_ids": ids[:, :100]}, "decoder_input_ids", 8
    else:
        cache = make_cache(kind, config, 0, run.layout)
    mask = torch.ones_like(ids)
    if masked:
        mask[0, : n_prompt // 2] = 0
    logits = []
    bounds = [0, *range(n_prompt, n_prompt + n_steps + 1)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if not config.is_encoder_decoder:
            given = {"attention_mask": mask[:, :end]}
        part = model(**given, **{name: ids[:, begin:end]}, past_key_values=cache).logits
        logits.append(part[:, -1].float())
    return torch.stack(logits)


def compare_logits(run: Run) -> None:
    n_prompt, n_steps = (40, 8) if run.smoke else (300, 64)
    for model_name, config in small_models().items():
        for dtype in (torch.float32,) if run.smoke else (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            auto = transformers.AutoModelForCausalLM
            if config.is_encoder_decoder:
                auto = transformers.AutoModelForSeq2SeqLM
            with torch.device(run.device):
                model = auto.from_config(config, dtype=dtype).eval()
            ids = torch.randint(2, 1024, (2, n_prompt + n_steps), device=run.device)
            for masked in (False, True):
                if masked and config.is_encoder_decoder:
                    continue
                theirs, again, ours = (
                    forced_logits(run, model, kind, ids, n_steps, masked)
                    for kind in ("DynamicCache", "DynamicCache", "VMMCache")
                )
                size = theirs.abs().max().item()
                row = {
                    "model": model_name + (", left-padded" if masked else ""),
                    "dtype": str(dtype).removeprefix("torch."),
                    "difference": (ours - theirs).abs().max().item() / size,
                    "same_tokens": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
                    "repeated": (again - theirs).abs().max().item() / size,
                }
                row["tolerance"] = TOLERANCE[row["dtype"]]
                run.logits.append(row)
                print(
                    f"logits {row['model']:<28} {row['dtype']:<9} {row['difference']:.2e} of "
                    f"{row['tolerance']}, same tokens {row['same_tokens']:.4f}",
                    flush=True,
                )
                if not row["difference"] <= row["tolerance"]:  # also where it is NaN
                    run.failures.append(f"logits differ: {row}")
            del model
            run.free()


# ---- report -----------------------------------------------------------------------


def markdown(run: Run) -> str:
    def number(row: dict[str, Any], key: str, unit_ns: float) -> str:
        return f"{row[key] / unit_ns:.2f}" if key in row else "-"

    def ratio(row: dict[str, Any], above: str, below: str) -> str:
        return f"{row[above] / row[below]:.3f}" if above in row and below in row else "-"

    what = "wall time (smoke)" if run.smoke else "GPU time"
    lines = [
        f"# A decode step of Llama by cache: {run.bench.machine}",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{str(run.dtype).removeprefix('torch.')}, random weights, layout {run.layout}; medians "
        "of one run.",
    ]
    if run.rows:
        lines += [
            "",
            f"## {what}, ms a step",
            "",
            "| model, batch, context | VMMCache / bound | DynamicCache / VMMCache | "
            "StaticCache / VMMCache | bound | VMMCache | DynamicCache | StaticCache |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in run.rows:
            ratios = (
                ratio(row, "gpu/VMMCache", "gpu/bound"),
                ratio(row, "gpu/DynamicCache", "gpu/VMMCache"),
                ratio(row, "gpu/StaticCache", "gpu/VMMCache"),
            )
            times = (number(row, f"gpu/{kind}", 1e6) for kind in KINDS)
            title = f"{row['model']}, {row['batch']}, {row['context']}"
            lines.append(f"| {' | '.join((title, *ratios, *times))} |")
        lines += [
            "",
            "## Host time of update, all layers, µs a step; and wall time of an eager step, ms",
            "",
            "| model, batch, context | update: VMMCache / DynamicCache | bound | VMMCache | "
            "DynamicCache | StaticCache | wall: VMMCache | DynamicCache |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in run.rows:
            cells = (
                f"{row['model']}, {row['batch']}, {row['context']}",
                ratio(row, "update/VMMCache", "update/DynamicCache"),
                *(number(row, f"update/{kind}", 1e3) for kind in KINDS),
                number(row, "wall/VMMCache", 1e6),
                number(row, "wall/DynamicCache", 1e6),
            )
            lines.append(f"| {' | '.join(cells)} |")
    if run.logits:
        lines += [
            "",
            "## Logits under teacher forcing, VMMCache against DynamicCache",
            "",
            "The largest difference over the largest logit; beside it that of DynamicCache "
            "against itself.",
            "",
            "| model | dtype | difference | tolerance | same tokens | itself |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['model']} | {row['dtype']} | {row['difference']:.2e} | {row['tolerance']} | "
            f"{row['same_tokens']:.4f} | {row['repeated']:.2e} |"
            for row in run.logits
        ]
    lines += ["", f"Not measured: {run.bench.not_measured}.", ""]
    if run.failures:
        lines += ["WRONG RESULTS:", "", *(f"- {failure}" for failure in run.failures), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layout", choices=("seq", "lane", "c"), help='"seq" on a GPU')
    parser.add_argument("--only", choices=("logits", "steps"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        print("hf_decode needs torch with CUDA and a GPU, or --smoke", file=sys.stderr)
        return 77
    run = Run(options)
    begin = time.perf_counter()
    with torch.inference_mode():
        if options.only != "steps":
            compare_logits(run)
        if options.only != "logits":
            steps(run)
    run.bench.close(
        steps=run.rows,
        logits=run.logits,
        failures=run.failures,
        layout=run.layout,
        torch=torch.__version__,
        transformers=transformers.__version__,
        seconds=time.perf_counter() - begin,
    )
    text = markdown(run)
    path = options.out / f"hf_decode-{slug(run.bench.machine)}.md"
    path.write_text(text)
    print(f"written: {path}\n\n{text}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
