"""PaddleNLP's models, unchanged, on caches that grow in place: the tokens are those of PaddleNLP.
`make test-paddlenlp` runs this in an environment of its own."""

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import pyvmm
import pyvmm.paddle as vmm_paddle
import pyvmm.paddlenlp
from conftest import N_LAYERS, build, generate, prompt
from pyvmm import paddle_op

KINDS = {"Llama": (LlamaForCausalLM, LlamaConfig), "Qwen2": (Qwen2ForCausalLM, Qwen2Config)}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request):
    return build(*KINDS[request.param], use_flash_attention=False)


@pytest.fixture(scope="module")
def llama():
    return build(*KINDS["Llama"], use_flash_attention=False)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", [{}, {"decode_strategy": "beam_search", "num_beams": 3}])
def test_install(model, batch, options):
    expected = generate(model, batch, **options)
    assert len(np.unique(expected)) > 5
    pyvmm.paddlenlp.install()
    try:
        tokens = generate(model, batch, **options)
    finally:
        pyvmm.paddlenlp.uninstall()
    np.testing.assert_array_equal(tokens, expected)
    stats = pyvmm.concat_stats(reset=True)
    if not options:  # each step of beam search copies the cache by itself: nothing grows
        # The first concat is PaddleNLP's, the second takes in.
        assert stats["taken_in"] >= 2 * N_LAYERS
        assert stats["appended"] >= 2 * N_LAYERS * (expected.shape[1] - 3)
    np.testing.assert_array_equal(generate(model, batch, **options), expected)
    assert pyvmm.concat_stats()["appended"] == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_inplace_concat(model, batch):
    expected = generate(model, batch)
    with vmm_paddle.inplace_concat() as turned:
        tokens = generate(model, batch)
    np.testing.assert_array_equal(tokens, expected)
    assert turned.turned >= 2 * N_LAYERS * (expected.shape[1] - 2)


def test_logits_are_the_same_to_the_bit(llama):
    ids = prompt(4, 20)

    def logits():
        out, past = [], None
        with paddle.no_grad():
            for n in range(8, 20):
                step = ids[:, :8] if past is None else ids[:, n - 1 : n]
                mask = paddle.ones([4, n], "int64")
                result = llama(step, attention_mask=mask, past_key_values=past, use_cache=True)
                past = result[1]
                out.append(result[0].numpy())
        return np.concatenate(out, 1)

    expected = logits()
    pyvmm.paddlenlp.install()
    try:
        np.testing.assert_array_equal(logits(), expected)
    finally:
        pyvmm.paddlenlp.uninstall()


def test_installing_twice_and_uninstalling_leaves_it_as_it_was(llama):
    from paddlenlp.transformers.llama import modeling

    pyvmm.paddlenlp.install()
    pyvmm.paddlenlp.install(capacity=64)
    assert modeling.paddle is not paddle
    assert modeling.paddle.Tensor is paddle.Tensor
    pyvmm.paddlenlp.uninstall()
    pyvmm.paddlenlp.uninstall()
    assert modeling.paddle is paddle


@pytest.mark.parametrize("batch", [1, 2])
def test_sample_d2s(llama, batch):
    """PaddleNLP's decoding as one program: in place for one sequence; Paddle's own concat, and the
    right tokens, for more. Its top_p path is refused by the CPU wheel, with or without us."""
    expected = generate(llama, batch)[:, :12]
    before = paddle_op.stats()
    pyvmm.paddlenlp.install(static=True)
    try:
        tokens = sample(llama, batch, 12)
    finally:
        pyvmm.paddlenlp.uninstall()
    np.testing.assert_array_equal(tokens, expected)
    after = paddle_op.stats()
    counts = {name: after[name] - n for name, n in before.items() if after[name] != n}
    if batch == 1:
        assert counts == {"taken_in": 2 * N_LAYERS, "appended": 2 * N_LAYERS * 10}
    else:
        assert counts == {"left": 2 * N_LAYERS * 11}


def sample(llama, batch, n_tokens):
    numbers = paddle.static.InputSpec([None, None], "int64")
    one = paddle.static.InputSpec([1], "int64")
    spec = [numbers, numbers, numbers, None, one, 0, 1, one, 1.0, 1.0, 1]
    program = paddle.jit.to_static(llama.sample_d2s, input_spec=spec, full_graph=True)
    ids = prompt(batch)
    positions = paddle.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape)
    with paddle.no_grad():
        tokens, _ = program(
            ids,
            paddle.ones_like(ids),
            positions,
            None,
            paddle.to_tensor([n_tokens]),
            0,
            1,
            paddle.to_tensor([1]),
            1.0,
            1.0,
            1,
        )
    return tokens.numpy()
