"""PaddleFormers' models with VMMLayer, and with their own cache inside inplace_concat(): the
tokens are those of DynamicCache. `make test-paddleformers` runs this in an environment of its
own."""

import functools
import gc

import numpy as np
import paddle
import pytest
from paddleformers.transformers import LlamaConfig, LlamaForCausalLM
from paddleformers.transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import pyvmm
import pyvmm.paddle as vmm_paddle
import pyvmm.paddleformers
from conftest import N_LAYERS, build, generate, in_use
from pyvmm.paddleformers import VMMLayer


@pytest.fixture(scope="module")
def model():
    # The fused norm has no kernel for the CPU.
    return build(LlamaForCausalLM, LlamaConfig, fuse_rms_norm=False)


def layers_alone():
    return Cache(layer_class_to_replicate=VMMLayer)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "make",
    [layers_alone, pyvmm.paddleformers.cache, lambda: pyvmm.paddleformers.cache(capacity=16)],
    ids=["class", "cache", "moving"],
)
def test_tokens(model, batch, make):
    expected = generate(model, batch)
    assert len(np.unique(expected)) > 5
    pyvmm.concat_stats(reset=True)
    cache = make()
    np.testing.assert_array_equal(generate(model, batch, past_key_values=cache), expected)
    stats = pyvmm.concat_stats()
    assert stats["taken_in"] == 2 * N_LAYERS and stats["fell_back"] == 0
    assert stats["appended"] + stats["moved"] == 2 * N_LAYERS * (expected.shape[1] - 1)
    assert cache.get_seq_length() == 9 + expected.shape[1] - 1


@pytest.mark.parametrize("batch", [1, 4])
def test_sampling(model, batch):
    options = {"decode_strategy": "sampling", "top_k": 5, "temperature": 1.5}
    paddle.seed(11)
    expected = generate(model, batch, past_key_values=DynamicCache(), **options)
    paddle.seed(11)
    np.testing.assert_array_equal(
        generate(model, batch, past_key_values=layers_alone(), **options), expected
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_inplace_concat_with_their_own_cache(model, batch):
    expected = generate(model, batch)
    with vmm_paddle.inplace_concat() as turned:
        tokens = generate(model, batch)
    np.testing.assert_array_equal(tokens, expected)
    assert turned.turned >= 2 * N_LAYERS * (expected.shape[1] - 1)


def states(batch, n, seed):
    paddle.seed(seed)
    return paddle.randn([batch, 2, n, 8]), paddle.randn([batch, 2, n, 8])


OPERATIONS = {
    "crop": lambda layer: layer.crop(5),
    "crop by": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(paddle.to_tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(paddle.to_tensor([1, 2])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_every_operation_is_as_in_dynamic_layer(operation):
    ours, theirs = VMMLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(3, 7, 1))
        layer.update(*states(3, 1, 2))
        OPERATIONS[operation](layer)
        batch = layer.keys.shape[0]
        for step in range(3):
            keys, values = layer.update(*states(batch, 1, step))
            assert keys is layer.keys and values is layer.values
    np.testing.assert_array_equal(ours.keys.numpy(), theirs.keys.numpy())
    np.testing.assert_array_equal(ours.values.numpy(), theirs.values.numpy())
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(paddle.arange(2)) == theirs.get_mask_sizes(paddle.arange(2))


def test_what_was_returned_stays_and_two_go_on_from_one_prefix():
    layer = VMMLayer()
    layer.update(*states(2, 5, 1))
    keys, values = layer.update(*states(2, 1, 2))
    was = keys.numpy().copy()
    other = VMMLayer()
    other.update(keys, values)
    layer.update(*states(2, 3, 3))
    other.update(*states(2, 3, 4))
    np.testing.assert_array_equal(keys.numpy(), was)
    np.testing.assert_array_equal(layer.keys[:, :, :6].numpy(), was)
    np.testing.assert_array_equal(other.keys[:, :, :6].numpy(), was)
    assert not np.array_equal(layer.keys.numpy(), other.keys.numpy())


def test_a_pool_that_runs_out_loses_nothing():
    with pyvmm.Pool("host", max_bytes="64KiB") as pool:
        layer = VMMLayer(1000, pool=pool)
        layer.update(*states(2, 5, 1))
        was = layer.keys.numpy().copy()
        with pytest.raises(pyvmm.OutOfMemoryError):
            layer.update(*states(2, 900, 2))
        np.testing.assert_array_equal(layer.keys.numpy(), was)
        layer.update(*states(2, 1, 3))
        assert layer.get_seq_length() == 6
        del layer


def test_memory_goes_without_the_collector(model):
    before = in_use()
    gc.disable()
    try:
        cache = pyvmm.paddleformers.cache()
        generate(model, 2, past_key_values=cache)
        assert in_use() > before
        del cache
        assert in_use() == before
    finally:
        gc.enable()


def test_gradients_make_it_concatenate_as_paddle_does():
    layer = functools.reduce(
        lambda layer, seed: (layer.update(*states(2, 2, seed)), layer)[1], range(3), VMMLayer()
    )
    keys, values = states(2, 1, 9)
    keys.stop_gradient = False
    longer, _ = layer.update(keys, values)
    longer.sum().backward()
    assert (keys.grad.numpy() == 1).all()
    assert pyvmm.concat_stats()["reasons"] == {"gradients": 1}
