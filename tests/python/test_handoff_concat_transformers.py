"""transformers' models with their own, unmodified DynamicCache inside inplace_cat: the same
tokens, and the concatenations turned into appends (make test-frameworks)."""

from __future__ import annotations

import copy
import os

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import pyvmm  # noqa: E402
import pyvmm.torch  # noqa: E402
from concat_arrays import Uncollected, in_use  # noqa: E402

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(
        os.environ.get("PYVMM_TEST_DEVICE", "host") != "host", reason="a test of the host"
    ),
]

N_LAYERS = 3
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # else the answers are one token over and over
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}


def config_of(kind):
    if kind == "llama":  # grouped-query attention
        return transformers.LlamaConfig(**GROUPED)
    if kind == "qwen2":
        return transformers.Qwen2Config(**GROUPED)
    if kind == "mistral":
        return transformers.MistralConfig(**GROUPED, sliding_window=None)
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(**SIZES)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=N_LAYERS,
            n_head=4,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.3,
        )
    return transformers.Gemma3TextConfig(
        **GROUPED,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        tie_word_embeddings=False,
    )


KINDS = ["llama", "qwen2", "mistral", "gpt_neox", "gpt2", "gemma3"]
# Layers that grow: of the others transformers slides a window over what it concatenates.
N_GROWING = dict.fromkeys(KINDS, N_LAYERS) | {"gemma3": 2}
N_TOKENS = 40


@pytest.fixture(autouse=True)
def one_thread():
    # Of models so small, threads only wait for each other.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    torch.manual_seed(5)
    config = config_of(kind)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def prompt():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, 128, (2, 12), generator=generator)


def answer(model, prompt, **options):
    torch.manual_seed(11)
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    options = {"max_new_tokens": N_TOKENS, "do_sample": False, **options}
    with torch.no_grad():
        return model.generate(prompt, attention_mask=mask, **options)


def test_greedy(kind, model, prompt):
    expected = answer(model, prompt)
    before = in_use("host")
    with Uncollected():
        with pyvmm.torch.inplace_cat() as turned:
            cache = transformers.DynamicCache(config=model.config)
            result = answer(model, prompt, past_key_values=cache)
        assert torch.equal(result, expected)
        assert type(cache) is transformers.DynamicCache
        assert in_use("host") > before
    # K and V of each growing layer: the prompt is concatenated to nothing, and each new token
    # but the last, which is not read, to what was there. The first of these begins with what
    # torch made; the rest append.
    n_steps = N_TOKENS - 1
    assert turned.turned >= 2 * N_GROWING[kind] * n_steps
    del cache


SITUATIONS = {
    "left-padded": lambda prompt: {
        "attention_mask": torch.cat(
            (torch.tensor([[0] * 5 + [1] * 7]), torch.ones(1, 12, dtype=torch.long))
        )
    },
    "sampled": lambda prompt: {"do_sample": True, "top_k": 20},
    "beams": lambda prompt: {"num_beams": 3},
    "prompt lookup": lambda prompt: {"prompt_lookup_num_tokens": 3},
    "chunked prefill": lambda prompt: {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(kind, model, prompt, situation):
    if situation == "prompt lookup":
        prompt = prompt[:1]
    try:
        expected = answer(model, prompt, **SITUATIONS[situation](prompt))
    except (NotImplementedError, ValueError) as error:
        pytest.skip(f"transformers itself: {error}")
    with pyvmm.torch.inplace_cat() as turned:
        result = answer(model, prompt, **SITUATIONS[situation](prompt))
    assert torch.equal(result, expected)
    assert turned.turned > N_TOKENS


def test_a_prefix_that_is_copied(kind, model, prompt):
    """deepcopy of a cache, the way to use a prefix again."""
    prefix, rest = prompt[:, :6], prompt

    def both():
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            cache = model(prefix, past_key_values=cache, use_cache=True).past_key_values
            for step in range(3):  # until it is one of results
                token = rest[:, 6 + step : 7 + step]
                cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        return [answer(model, rest, past_key_values=copy.deepcopy(cache)) for _ in range(2)]

    expected = both()
    with pyvmm.torch.inplace_cat():
        result = both()
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_an_encoder_and_a_decoder(prompt):
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=N_LAYERS,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=5.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    expected = answer(model, prompt)
    with pyvmm.torch.inplace_cat() as turned:
        result = answer(model, prompt)
    assert torch.equal(result, expected)
    assert turned.turned >= 2 * N_LAYERS * (N_TOKENS - 2)
