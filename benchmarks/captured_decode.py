"""Decode steps of transformers' models, captured and not, by cache: wall clock and GPU time.

    python benchmarks/captured_decode.py --out FOLDER [--parts steps,logits,memory,text]
        [--rows '7B.*'] [--kinds captured,DynamicCache] [--limit SECONDS] [--lock FILE] [--smoke]
    python benchmarks/captured_decode.py --out FOLDER --merge RESULT.json RESULT.json ...

steps   the rows of hf_decode.py, and 8B GQA at batch 1, 4, 16, 64 with 1k, 8k, 32k tokens where
        memory allows. Per step: wall clock with a synchronisation, as generate() has one; time
        between events; the sum of the kernels. The kinds:
            DynamicCache, VMMCache      eager
            captured, compiled          pyvmm.transformers.captured(), with compile=True
            StaticCache                 transformers' own, compiled as generate() compiles it
        and for those that record or compile, the time to their first token. Contexts are set by
        filling the caches with random keys and values.
logits  each architecture, padded and not, 512 steps under teacher forcing against DynamicCache
        in bfloat16; how often the tensors grew meanwhile.
memory  bytes committed against tokens used, and the largest batch that ends at 3072 + 1024 tokens
        for each cache: tried at the final length, so that fragmentation on the way, which
        DynamicCache has, is not counted; then all 1024 steps of the captured one.
text    3072 + 1024 tokens by generate(): tokens per second for each kind, after what is
        compiled has been.

Compiling takes most of the time, so several processes may share a GPU: with the same --lock
they take turns at all but that. --merge makes one result of theirs.

What comes first in a part matters most; --limit ends it between measurements. Results are
written after each row. --smoke runs it on the CPU with tiny shapes, where a graph is replaced by
the function that it would record, and wall time stands for GPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import slug
from hf_decode import ROWS, Run, build, forced_logits, gpu_time_ns, random_states, wall_ns

import pyvmm
from pyvmm import _captured, _graphs
from pyvmm.transformers import VMMCache

KINDS = "captured", "DynamicCache", "VMMCache", "compiled", "StaticCache"
MORE_ROWS = tuple(
    ("8B GQA", batch, context) for batch in (1, 4, 16, 64) for context in (1024, 8192, 32768)
)
N_WARM, N_PROFILED, N_WALL, N_EVENTS = 2, 3, 12, 12
ROOM = 64
N_PROMPT, N_NEW = 3072, 1024
TOLERANCE = 3e-2
OUT_OF_MEMORY = torch.OutOfMemoryError, pyvmm.OutOfMemoryError


class Time:
    def __init__(self, limit: float) -> None:
        self.end = time.perf_counter() + limit

    def is_up(self) -> bool:
        return time.perf_counter() > self.end


@contextlib.contextmanager
def alone(run: Run) -> Any:
    """While no other process with this --lock uses the GPU."""
    if run.options.lock is None:
        yield
        return
    with open(run.options.lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def graphs(run: Run) -> Any:
    return _graphs.EagerGraph if run.smoke else None


def block(run: Run, model: Any, kind: str) -> Any:
    if kind not in ("captured", "compiled"):
        return contextlib.nullcontext()
    return _captured.block(model, kind == "compiled", graphs(run))


def make_cache(run: Run, kind: str, config: Any, length: int) -> Any:
    if kind == "DynamicCache":
        return transformers.DynamicCache(config=config)
    if kind == "StaticCache":
        return transformers.StaticCache(config=config, max_cache_len=length)
    return VMMCache(config, layout=run.layout)


def fill(run: Run, cache: Any, config: Any, batch: int, context: int) -> None:
    for layer in range(config.num_hidden_layers):
        cache.update(*random_states(run, config, batch, context), layer)


def stepper(run: Run, model: Any, kind: str, cache: Any, batch: int) -> Any:
    token = torch.ones(batch, 1, dtype=torch.long, device=run.device)
    forward = model
    if kind == "StaticCache":
        forward = compiled_forward(model, run.smoke)
    return functools.partial(forward, input_ids=token, past_key_values=cache)


def compiled_forward(model: Any, smoke: bool) -> Any:
    config = transformers.CompileConfig()
    if smoke:
        config.mode = "default"
    return torch.compile(model.forward, **{**config.to_dict(), "fullgraph": True})


def events_ns(run: Run, step: Any) -> float:
    """Of the GPU's own clock, from the step's first work to its last."""
    if run.device.type == "cpu":
        return wall_ns(run, step)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run.synchronize()
    begin.record()
    step()
    end.record()
    run.synchronize()
    return 1e6 * begin.elapsed_time(end)


# ---- steps ------------------------------------------------------------------------


def measure(run: Run, model: Any, kind: str, batch: int, context: int) -> dict[str, list[float]]:
    with block(run, model, kind) as captured:
        cache = make_cache(run, kind, model.config, context + ROOM)
        with alone(run):
            fill(run, cache, model.config, batch, context)
        step = stepper(run, model, kind, cache, batch)
        samples = {"first": [wall_ns(run, step)]}
        with alone(run):
            for _ in range(N_WARM):
                step()
            samples["wall"] = [wall_ns(run, step) for _ in range(N_WALL)]
            samples["events"] = [events_ns(run, step) for _ in range(N_EVENTS)]
            samples["gpu"] = [gpu_time_ns(run, step) for _ in range(N_PROFILED)]
        if captured is not None and (captured.reasons or captured.n_captures > 2):
            run.failures.append(
                f"{kind}, {batch}, {context}: {captured.n_captures} captures, {captured.reasons}"
            )
    return samples


def steps(run: Run, clock: Time, write: Any) -> None:
    model = built = None
    rows = [
        row for row in (*ROWS, *MORE_ROWS) if re.search(run.options.rows, " ".join(map(str, row)))
    ]
    for shape, batch, context in dict.fromkeys(rows):
        if run.smoke:
            batch, context = min(batch, 2), min(context // 64, 200)
        if built != shape:
            model = None
            run.free()
            model, built = build(run, shape), shape
        row: dict[str, Any] = {"model": shape, "batch": batch, "context": context}
        run.rows.append(row)
        name = f"{shape.replace(' ', '-')}/B{batch}/{context}"
        for kind in run.options.kinds:
            if clock.is_up():
                return
            run.free()
            torch.compiler.reset()
            try:
                samples = measure(run, model, kind, batch, context)
            except OUT_OF_MEMORY as error:
                row[f"out of memory/{kind}"] = str(error).splitlines()[0]
                continue
            for what, values in samples.items():
                run.bench.report(f"{what}/{name}/{kind}", values, f"{what}/{name}/captured")
                row[f"{what}/{kind}"] = statistics.median(values)
            write()


# ---- logits -----------------------------------------------------------------------


def architectures(wide: bool) -> dict[str, Any]:
    """`wide`: with so many heads that a block holds few rows of one sequence, as padded batches,
    which lie in lanes, have them."""
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
    }
    if wide:
        sizes |= {
            "hidden_size": 1152,
            "num_attention_heads": 384,
            "num_key_value_heads": 192,
            "head_dim": 256,
        }
    window = {"sliding_window": 128}
    return {
        "Llama, GQA": transformers.LlamaConfig(**sizes),
        "Llama, MHA": transformers.LlamaConfig(
            **{**sizes, "num_key_value_heads": sizes["num_attention_heads"]}
        ),
        "Qwen2": transformers.Qwen2Config(**sizes),
        "Qwen3": transformers.Qwen3Config(**sizes),
        "Mistral": transformers.MistralConfig(**sizes, sliding_window=None),
        "Mistral, window 128": transformers.MistralConfig(**sizes, **window),
        "Gemma 3": transformers.Gemma3TextConfig(
            **sizes, **window, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    }


def compare_logits(run: Run, clock: Time, write: Any) -> None:
    n_prompt, n_steps = (40, 12) if run.smoke else (64, 512)
    cases = [
        (name, config, masked)
        for masked in (False, True)
        for name, config in architectures(wide=masked and not run.smoke).items()
    ]
    for name, config, masked in cases:
        if clock.is_up():
            return
        batch = 2 if run.smoke else 4 if masked else 96
        torch.manual_seed(0)
        with torch.device(run.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()
        ids = torch.randint(2, 1024, (batch, n_prompt + n_steps), device=run.device)
        theirs = forced_logits(run, model, "DynamicCache", ids, n_steps, masked)
        # In blocks as small as they come, so that the tensors grow as often as they can.
        pool = pyvmm.Pool(run.bench.device, block_size="2MiB")
        pyvmm.transformers.install(pool=pool)
        with _captured.block(model, False, graphs(run)) as captured:
            ours = forced_logits(run, model, "DynamicCache", ids, n_steps, masked)
        pyvmm.transformers.uninstall()
        size = theirs.abs().max().item()
        row = {
            "model": name + (", left-padded" if masked else ""),
            "difference": (ours - theirs).abs().max().item() / size,
            "same_tokens": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
            "steps": captured.n_replays,
            "growths": captured.n_growths,
        }
        run.logits.append(row)
        print(f"logits {row}", flush=True)
        if not row["difference"] <= TOLERANCE or captured.n_replays != n_steps:
            run.failures.append(f"logits: {row}, {captured.reasons}")
        del ours, theirs, model
        write()
        run.free()


# ---- memory -----------------------------------------------------------------------


def memory(run: Run, clock: Time, write: Any, shape: str = "7B MHA") -> None:
    n_prompt, n_new = (64, 32) if run.smoke else (N_PROMPT, N_NEW)
    model = build(run, shape)
    config = model.config
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row_bytes *= run.dtype.itemsize
    total = 1 << 30
    if run.device.type == "cuda":
        run.free()
        total = torch.cuda.mem_get_info(run.device)[0]
    bound = max(total // (row_bytes * (n_prompt + n_new)), 1)
    found: dict[str, Any] = {"model": shape, "free_bytes": total, "bound": bound}
    run.memory = found
    if run.smoke:
        bound = 2
    for kind in ("captured", "StaticCache", "DynamicCache"):
        for batch in range(bound, 0, -1):
            if clock.is_up():
                return
            run.free()
            if ends(run, model, kind, batch, n_prompt + n_new):
                found[kind] = batch
                break
        print(f"largest batch of {kind}: {found.get(kind)} of {bound}", flush=True)
        write()
    run.free()
    batch = found["captured"]
    static_bytes = batch * row_bytes * (n_prompt + n_new)
    with _captured.block(model, False, graphs(run)), contextlib.suppress(*OUT_OF_MEMORY):
        cache = make_cache(run, "captured", config, 0)
        fill(run, cache, config, batch, n_prompt)
        step = stepper(run, model, "captured", cache, batch)
        found["committed"] = []
        for i in range(n_new):
            if i % 64 and i < n_new - 1:
                step()
            else:
                counts, length = cache.stats(), cache.get_seq_length()
                found["committed"].append((length, counts["mapped_bytes"], counts["used_bytes"]))
                run.bench.report(
                    f"memory/captured/{length}",
                    [wall_ns(run, step)],
                    length=length,
                    mapped_bytes=counts["mapped_bytes"],
                    used_bytes=counts["used_bytes"],
                    static_bytes=static_bytes,
                )
        run.synchronize()
        found["finished"] = cache.get_seq_length()
    found["static_bytes"] = static_bytes
    write()


def ends(run: Run, model: Any, kind: str, batch: int, length: int) -> bool:
    """Do the last steps to this length fit?"""
    try:
        with block(run, model, kind):
            cache = make_cache(run, kind, model.config, length)
            fill(run, cache, model.config, batch, length - 2)
            token = torch.ones(batch, 1, dtype=torch.long, device=run.device)
            for _ in range(2):
                model(input_ids=token, past_key_values=cache)
            run.synchronize()
    except OUT_OF_MEMORY:
        return False
    return True


# ---- text -------------------------------------------------------------------------


def text(run: Run, clock: Time, write: Any) -> None:
    n_prompt, n_new = (64, 16) if run.smoke else (N_PROMPT, N_NEW)
    for shape, batch in (("7B MHA", 8), ("8B GQA", 8)):
        if not re.search(run.options.rows, f"{shape} {batch}"):
            continue
        model = None
        run.free()
        model = build(run, shape)
        row: dict[str, Any] = {"model": shape, "batch": batch, "new": n_new}
        run.texts.append(row)
        ids = torch.randint(2, model.config.vocab_size, (batch, n_prompt), device=run.device)
        for kind in run.options.kinds:
            if clock.is_up():
                return
            run.free()
            torch.compiler.reset()
            try:
                with block(run, model, kind):
                    if kind in ("compiled", "StaticCache"):
                        answer(run, model, kind, ids, 4, n_prompt + n_new)  # compiles
                    ns = wall_ns(
                        run,
                        functools.partial(answer, run, model, kind, ids, n_new, n_prompt + n_new),
                    )
            except OUT_OF_MEMORY as error:
                row[f"out of memory/{kind}"] = str(error).splitlines()[0]
                continue
            row[kind] = 1e9 * batch * n_new / ns
            print(f"text {shape}, {batch}, {kind}: {row[kind]:.1f} tokens/s", flush=True)
            write()


def answer(run: Run, model: Any, kind: str, ids: Any, n_new: int, length: int) -> None:
    options: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": length}
    if kind != "StaticCache":
        options = {"past_key_values": make_cache(run, kind, model.config, 0)}
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, **options)


# ---- report -----------------------------------------------------------------------


def number(row: dict[str, Any], key: str, unit: float, digits: int = 2) -> str:
    return f"{row[key] / unit:.{digits}f}" if key in row else "-"


def ratio(row: dict[str, Any], above: str, below: str) -> str:
    return f"{row[above] / row[below]:.2f}" if above in row and below in row else "-"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def merged(paths: list[Path]) -> dict[str, Any]:
    """One result of those of several processes of a run: what they have of one row is put
    together, in the order of the first."""
    result: dict[str, Any] = {}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        part = json.loads(path.read_text())
        if result and part["machine"] != result["machine"]:
            raise SystemExit(f"{path}: of {part['machine']}, not of {result['machine']}")
        for row in part["steps"]:
            rows.setdefault((row["model"], row["batch"], row["context"]), {}).update(row)
        if not result:
            result = part
            continue
        for key in ("rows", "logits", "texts", "failures"):
            result[key] += part[key]
        result["memory"] = result["memory"] or part["memory"]
    return {**result, "steps": list(rows.values())}


def markdown(result: dict[str, Any]) -> str:
    run = argparse.Namespace(**result)
    lines = [
        f"# Captured decode steps: {run.machine}",
        "",
        f"transformers {run.transformers}, torch {run.torch}, {run.dtype}, random weights, layout "
        f"{run.layout}; medians of one run.",
    ]
    if run.steps:
        lines += ["", "## Wall clock of a step, ms"]
        ratios = [
            ("DynamicCache / captured", "wall/DynamicCache", "wall/captured"),
            ("captured: wall / events", "wall/captured", "events/captured"),
            ("captured: wall / kernels", "wall/captured", "gpu/captured"),
            ("StaticCache / captured", "wall/StaticCache", "wall/captured"),
            ("StaticCache / compiled", "wall/StaticCache", "wall/compiled"),
        ]
        lines += table(
            ["model, batch, context", *(r[0] for r in ratios), *KINDS],
            [
                [
                    f"{row['model']}, {row['batch']}, {row['context']}",
                    *(ratio(row, above, below) for _, above, below in ratios),
                    *(
                        "out of memory"
                        if f"out of memory/{kind}" in row
                        else number(row, f"wall/{kind}", 1e6)
                        for kind in KINDS
                    ),
                ]
                for row in run.steps
            ],
        )
        lines += ["", "## Sum of kernels, ms; and time to the first token, s"]
        lines += table(
            ["model, batch, context", *KINDS, *(f"first: {kind}" for kind in KINDS)],
            [
                [
                    f"{row['model']}, {row['batch']}, {row['context']}",
                    *(number(row, f"gpu/{kind}", 1e6) for kind in KINDS),
                    *(number(row, f"first/{kind}", 1e9, 3) for kind in KINDS),
                ]
                for row in run.steps
            ],
        )
    if run.logits:
        lines += [
            "",
            "## Logits under teacher forcing, captured against DynamicCache",
            "",
            f"The largest difference over the largest logit; within {TOLERANCE} is right.",
        ]
        lines += table(
            ["model", "difference", "same tokens", "steps", "growths"],
            [
                [
                    row["model"],
                    f"{row['difference']:.2e}",
                    f"{row['same_tokens']:.4f}",
                    str(row["steps"]),
                    str(row["growths"]),
                ]
                for row in run.logits
            ],
        )
    if run.texts:
        lines += ["", "## generate(), tokens per second, the prompt's pass within"]
        lines += table(
            ["model, batch", "captured / DynamicCache", *KINDS],
            [
                [
                    f"{row['model']}, {row['batch']}",
                    ratio(row, "captured", "DynamicCache"),
                    *(number(row, kind, 1, 1) for kind in KINDS),
                ]
                for row in run.texts
            ],
        )
    if run.memory:
        found = run.memory
        lines += [
            "",
            f"## Memory, {found['model']}, to {N_PROMPT} + {N_NEW} tokens",
            "",
            f"Free beside the weights: {found['free_bytes'] / 2**30:.1f} GiB, of which keys and "
            f"values of {found['bound']} sequences would take all. Largest batch: "
            + ", ".join(f"{kind} {found.get(kind, '-')}" for kind in KINDS if kind in found)
            + ".",
        ]
        if "committed" in found:
            lines += [
                "",
                f"At batch {found['captured']}, which went on to {found.get('finished')} tokens; "
                f"StaticCache would commit {found.get('static_bytes', 0) / 2**30:.2f} GiB at once:",
            ]
            lines += table(
                ["tokens", "committed, GiB", "used, GiB"],
                [
                    [str(n), f"{mapped / 2**30:.2f}", f"{used / 2**30:.2f}"]
                    for n, mapped, used in found["committed"]
                ],
            )
    lines += ["", f"Not measured: {run.not_measured}.", ""]
    if run.failures:
        lines += ["WRONG RESULTS:", "", *(f"- {failure}" for failure in run.failures), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layout", choices=("seq", "lane", "c"), help='"seq" on a GPU')
    parser.add_argument("--parts", default="steps,logits,memory,text")
    parser.add_argument("--rows", default="", help='regular expression of "7B MHA 8 3072"')
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--lock", type=Path, help="a file that processes on one GPU share")
    parser.add_argument("--merge", type=Path, nargs="+", help="results; nothing is measured")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        return write(merged(options.merge), options.out)
    if not options.smoke and not torch.cuda.is_available():
        print("captured_decode needs torch with CUDA and a GPU, or --smoke", file=sys.stderr)
        return 77
    run: Any = Run(options, "captured_decode", "sampling; the pass over a prompt, but for text")
    run.texts, run.memory = [], {}
    clock = Time(options.limit)

    def write_so_far() -> None:
        close = {
            "steps": run.rows,
            "logits": run.logits,
            "texts": run.texts,
            "memory": run.memory,
            "failures": run.failures,
            "layout": run.layout,
            "dtype": str(run.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        write(json.loads(run.bench.close(**close).read_text()), options.out)

    parts = {"steps": steps, "logits": compare_logits, "memory": memory, "text": text}
    with torch.inference_mode():
        for part in options.parts.split(","):
            parts[part](run, clock, write_so_far)
            run.free()
    write_so_far()
    print(
        markdown(merged([options.out / f"captured_decode-python-{slug(run.bench.machine)}.json"]))
    )
    return 1 if run.failures else 0


def write(result: dict[str, Any], out: Path) -> int:
    name = slug(result["machine"])
    path = out / f"captured_decode-python-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_name(f"captured_decode-{name}.md").write_text(markdown(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
