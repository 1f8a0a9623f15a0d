"""What the tests of libraries over Paddle share."""

import gc

import numpy as np
import paddle
import pytest

import pyvmm

N_NEW = 32
N_LAYERS = 2
# Of a model that is small and does not repeat one token.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
}


def build(kind, config, **options):
    """A model of that kind with random weights, the same each time."""
    paddle.set_device("cpu")
    paddle.seed(3)
    model = kind(config(**SIZES, **options))
    model.eval()
    return model


def prompt(batch, n_tokens=9):
    ids = np.random.default_rng(batch).integers(3, SIZES["vocab_size"], (batch, n_tokens))
    return paddle.to_tensor(ids)


def generate(model, batch, **options):
    """The tokens that follow the prompt, greedily unless `options` say otherwise."""
    ids = prompt(batch)
    with paddle.no_grad():
        tokens, _ = model.generate(
            ids,
            attention_mask=paddle.ones_like(ids),
            max_new_tokens=N_NEW,
            use_cache=True,
            eos_token_id=1,
            pad_token_id=0,
            **{"decode_strategy": "greedy_search", **options},
        )
    return tokens.numpy()


def in_use():
    return pyvmm.default_pool("host").stats()["in_use_bytes"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    pyvmm.concat_stats(reset=True)
    gc.collect()
    before = in_use()
    yield
    gc.collect()
    assert in_use() == before
