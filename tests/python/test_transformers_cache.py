"""VMMCache against transformers' DynamicCache: the same tokens, the same keys and values."""

import copy
import gc
import os
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import pyvmm  # noqa: E402
from pyvmm.transformers import VMMCache, VMMLayer  # noqa: E402

DynamicCache = transformers.DynamicCache


@pytest.fixture(params=["cpu", "cuda:0"])
def place(request):
    """A device in torch's words."""
    if request.param == "cpu":
        if os.environ.get("PYVMM_TEST_DEVICE", "host") != "host":
            pytest.skip("the host is tested without PYVMM_TEST_DEVICE")
        return request.param
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's: torch cannot use it")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # else the answers are one token over and over
}


def config_of(kind):
    if kind == "llama":
        return transformers.LlamaConfig(**SIZES)
    if kind == "qwen2":
        return transformers.Qwen2Config(**SIZES)
    return transformers.Gemma3TextConfig(
        **SIZES,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )


def model_of(kind, place, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind))
    return model.to(place).eval()


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def model(request, place):
    return model_of(request.param, place)


@pytest.fixture
def llama(place):
    return model_of("llama", place)


def prompt(place, batch=1, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)
    return ids.to(place)


def generate(model, input_ids, cache, mask=None, **options):
    torch.manual_seed(7)
    if mask is None:
        mask = torch.ones_like(input_ids)
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)


def full_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, VMMLayer)]


def assert_same_contents(ours, theirs):
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def assert_same(model, input_ids, **options):
    ours, theirs = VMMCache(model.config), DynamicCache(config=model.config)
    expected = generate(model, input_ids, theirs, **options)
    assert torch.equal(generate(model, input_ids, ours, **options), expected)
    return ours, theirs


# ---- ways of generating ---------------------------------------------------------------------


def test_greedy(model, place):
    ours, theirs = assert_same(model, prompt(place))
    assert_same_contents(ours, theirs)
    n_full = sum(type(layer) is transformers.cache_utils.DynamicLayer for layer in theirs.layers)
    assert len(full_layers(ours)) == n_full > 0


def test_batch_with_left_padding(model, place):
    input_ids = prompt(place, batch=3)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = mask[1, :1] = 0
    assert_same(model, input_ids, mask=mask)


def test_sampling(model, place):
    assert_same(model, prompt(place, batch=2), do_sample=True, top_k=20)


def test_several_answers(model, place):
    assert_same(model, prompt(place), do_sample=True, num_return_sequences=3)


def test_beam_search(model, place):
    assert_same(model, prompt(place, batch=2), num_beams=3)


def test_prompt_lookup(llama, place):
    input_ids = prompt(place, length=6).repeat(1, 4)
    assert_same(llama, input_ids, prompt_lookup_num_tokens=4)


def test_assisted(llama, place):
    assert_same(llama, prompt(place), assistant_model=model_of("llama", place, seed=1))


def test_prefill_in_chunks(llama, place):
    assert_same(llama, prompt(place, length=50), prefill_chunk_size=16)


def test_bfloat16(place):
    assert_same(model_of("llama", place).to(torch.bfloat16), prompt(place, batch=2))


def test_several_turns(model, place):
    ours, theirs = VMMCache(model.config), DynamicCache(config=model.config)
    answers = []
    for cache in (ours, theirs):
        turn = prompt(place)
        for i in range(3):
            turn = generate(model, turn, cache, max_new_tokens=12)
            turn = torch.cat([turn, prompt(place, length=5, seed=i + 1)], dim=1)
        answers.append(turn)
    assert torch.equal(*answers)
    assert_same_contents(ours, theirs)


def test_every_layout(llama, place):
    expected = generate(llama, prompt(place, batch=2), DynamicCache(config=llama.config))
    for layout in ("seq", "lane", "c"):
        cache = VMMCache(llama.config, layout=layout)
        assert torch.equal(generate(llama, prompt(place, batch=2), cache), expected)
        assert full_layers(cache)[0].key_tensor.layout == layout


def test_inference_mode_and_then_without(llama, place):
    expected = generate(llama, prompt(place, batch=2), None, num_beams=2)
    cache = VMMCache(llama.config)
    with torch.inference_mode():
        got = generate(llama, prompt(place, batch=2), cache, num_beams=2)
    assert torch.equal(got, expected)
    with torch.no_grad():
        llama(prompt(place, batch=4, length=1), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))


def test_logits_step_by_step(llama, place):
    ours, theirs = VMMCache(llama.config), DynamicCache(config=llama.config)
    ids = prompt(place, batch=2, length=60)
    with torch.no_grad():
        for begin, end in [(0, 20), (20, 21), (21, 22), (22, 40), (40, 60)]:
            a, b = (
                llama(ids[:, begin:end], past_key_values=cache).logits for cache in (ours, theirs)
            )
            torch.testing.assert_close(a, b)


# ---- the layer by itself ---------------------------------------------------------------------


def states(place, n, batch=2, heads=3, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, dim, generator=generator).to(place, dtype)


def filled(place, n=10, capacity=64, **options):
    layer = VMMLayer(capacity, **options)
    k, v = states(place, n), states(place, n, seed=1)
    layer.update(k, v)
    return layer, k, v


def test_update_returns_views_of_what_was_given(place):
    layer = VMMLayer(4096)
    assert (layer.get_seq_length(), layer.get_max_length()) == (0, 4096)
    assert not layer.is_initialized
    all_k, all_v = [], []
    addresses = set()
    for i, n in enumerate([5, 1, 0, 1, 300, 1]):
        # As attention gives them: (batch, tokens, heads, dim) seen as (batch, heads, ...).
        k = states(place, 3, heads=n, seed=2 * i).transpose(1, 2)
        v = states(place, n, seed=2 * i + 1)
        all_k.append(k)
        all_v.append(v)
        keys, values = layer.update(k, v)
        assert keys is layer.keys and values is layer.values
        assert torch.equal(keys, torch.cat(all_k, dim=2))
        assert torch.equal(values, torch.cat(all_v, dim=2))
        addresses.add((keys.data_ptr(), values.data_ptr()))
    assert len(addresses) == 1
    assert addresses == {(layer.key_tensor.ptr, layer.value_tensor.ptr)}
    assert layer.get_seq_length() == layer.key_tensor.length == 308
    assert layer.get_mask_sizes(4) == (312, 0)
    assert layer.batch_size == 2
    assert "308" in repr(layer)


def test_values_of_another_width(place):
    layer = VMMLayer(64)
    k, v = states(place, 5, dim=8), states(place, 5, dim=16)
    keys, values = layer.update(k, v)
    assert torch.equal(keys, k) and torch.equal(values, v)


def test_earlier_views_stay_right(place):
    layer, k, _ = filled(place)
    keys = layer.keys
    layer.update(states(place, 20, seed=5), states(place, 20, seed=6))
    assert keys.shape[2] == 10
    assert torch.equal(keys, k)


@pytest.mark.parametrize("argument", [-3, -1, 0, 4, 10, 100, -10, -100])
def test_crop_as_dynamic_layer(place, argument):
    layer, k, v = filled(place)
    theirs = transformers.cache_utils.DynamicLayer()
    theirs.update(k, v)
    layer.crop(argument)
    theirs.crop(argument)
    assert layer.get_seq_length() == theirs.get_seq_length()
    assert layer.key_tensor.length == layer.value_tensor.length == theirs.get_seq_length()
    more = states(place, 3, seed=8)
    for a, b in zip(layer.update(more, more), theirs.update(more, more), strict=True):
        assert torch.equal(a, b)


def test_crop_before_the_first_update():
    layer = VMMLayer(64)
    layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_crop_under_an_export_changes_nothing(place):
    layer, k, v = filled(place)
    held = torch.from_dlpack(layer.key_tensor)
    with pytest.raises(BufferError):
        layer.crop(-1)
    assert layer.get_seq_length() == layer.value_tensor.length == 10
    del held
    layer.crop(-1)
    assert layer.get_seq_length() == 9
    # Pinned on the other side: the keys are cropped and the values are not, so the layer
    # refuses to go on.
    held = torch.from_dlpack(layer.value_tensor)
    with pytest.raises(BufferError):
        layer.crop(-1)
    del held
    with pytest.raises(RuntimeError, match="8 keys and 9 values"):
        layer.update(k, v)


def test_reset_keeps_the_memory(place):
    layer, k, v = filled(place)
    mapped = layer.key_tensor.mapped
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.key_tensor.mapped == mapped
    keys, values = layer.update(v, k)
    assert torch.equal(keys, v) and torch.equal(values, k)


def test_reset_of_a_cache_begins_anew(model, place):
    cache = VMMCache(model.config)
    generate(model, prompt(place, seed=3), cache)
    address = full_layers(cache)[0].key_tensor.ptr
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = generate(model, prompt(place), DynamicCache(config=model.config))
    assert torch.equal(generate(model, prompt(place), cache), expected)
    assert full_layers(cache)[0].key_tensor.ptr == address


def test_crop_of_a_cache(llama, place):
    ours, theirs = assert_same(llama, prompt(place))
    for cache in (ours, theirs):
        cache.crop(-7)
    assert ours.get_seq_length() == theirs.get_seq_length() == 42
    assert_same_contents(ours, theirs)


def test_reorder(place):
    layer, k, v = filled(place)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, k[[1, 1]])
    assert torch.equal(layer.values, v[[1, 1]])
    with pytest.raises(ValueError, match="batch"):
        layer.reorder_cache(torch.tensor([0, 1, 1]))


def test_early_initialization(llama, place):
    cache = VMMCache(llama.config)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device(place))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    expected = generate(llama, prompt(place), DynamicCache(config=llama.config))
    assert torch.equal(generate(llama, prompt(place), cache), expected)


def test_cache_speaks_as_a_cache(llama, place):
    cache = VMMCache(llama.config)
    assert cache.get_max_length() == 512
    assert VMMCache(llama.config, capacity=100).get_max_length() == 100
    assert cache.batch_size == -1
    with torch.no_grad():
        llama(prompt(place, batch=3), past_key_values=cache)
    assert len(cache) == 4
    assert cache.batch_size == 3
    assert cache.get_seq_length() == 10
    assert cache.get_mask_sizes(1, 0) == (11, 0)
    assert cache.is_croppable and not cache.is_compileable
    assert [keys.shape for keys, _, _ in cache] == [(3, 2, 10, 16)] * 4


# ---- what is refused ------------------------------------------------------------------------


def test_past_the_capacity(place):
    layer, k, v = filled(place, capacity=12)
    with pytest.raises(pyvmm.CapacityError):
        layer.update(k, v)
    assert layer.get_seq_length() == layer.key_tensor.length == 10
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)
    layer.update(k[:, :, :2], v[:, :, :2])
    assert layer.get_seq_length() == 12


@pytest.mark.parametrize("bad", ["tokens", "batch", "heads", "dim", "dtype"])
def test_states_that_do_not_fit(place, bad):
    layer, k, v = filled(place)
    new = states(place, 2)
    other = {
        "tokens": lambda: states(place, 3),
        "batch": lambda: states(place, 2, batch=3),
        "heads": lambda: states(place, 2, heads=4),
        "dim": lambda: states(place, 2, dim=9),
        "dtype": lambda: states(place, 2, dtype=torch.float16),
    }[bad]()
    for pair in ((new, other), (other, new)):
        with pytest.raises((TypeError, ValueError)):
            layer.update(*pair)
    assert layer.get_seq_length() == layer.key_tensor.length == layer.value_tensor.length == 10
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)


def test_gradients(llama, place):
    cache = VMMCache(llama.config)
    with pytest.raises(RuntimeError, match="no_grad"):
        llama(prompt(place), past_key_values=cache)
    layer = VMMLayer(64)
    k = states(place, 2).requires_grad_()
    with torch.no_grad():
        keys, _ = layer.update(k, k)
    assert torch.equal(keys, k) and not keys.requires_grad


def test_copies(place):
    layer, *_ = filled(place)
    for refused in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="clone"):
            refused(layer)
    cache = VMMCache(config_of("llama"))
    cache.layers[0].update(states(place, 2), states(place, 2))
    with pytest.raises(TypeError, match="clone"):
        copy.deepcopy(cache)


def test_what_is_not_supported_yet(place):
    layer, *_ = filled(place)
    for refused in (
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        layer.offload,
        layer.prefetch,
    ):
        with pytest.raises(NotImplementedError, match="DynamicCache"):
            refused()


def test_keys_replaced_from_outside(place):
    layer, k, v = filled(place)
    layer.keys = layer.keys[:, :, :-1]
    for refused in (lambda: layer.update(k, v), lambda: layer.crop(-1)):
        with pytest.raises(RuntimeError, match="replaced"):
            refused()


def test_tensor_changed_from_outside(place):
    layer, k, v = filled(place)
    layer.key_tensor.truncate(9)
    with pytest.raises(RuntimeError, match="9 keys"):
        layer.update(k, v)


def test_unknown_device():
    with pytest.raises(ValueError, match="meta"):
        VMMLayer(64).update(states("meta", 2), states("meta", 2))


def test_config_without_a_limit():
    config = transformers.PreTrainedConfig(num_hidden_layers=2)
    with pytest.raises(ValueError, match="capacity"):
        VMMCache(config)


# ---- memory -----------------------------------------------------------------------------


def test_memory_goes_with_the_cache(place, llama):
    pool = pyvmm.Pool("host" if place == "cpu" else place)
    cache = VMMCache(llama.config, pool=pool)
    generate(llama, prompt(place), cache)
    keys = cache.layers[0].keys
    expected = keys.clone()
    assert pool.stats()["in_use_bytes"] > 0
    del cache
    gc.collect()
    assert torch.equal(keys, expected)
    del keys
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.close()


def test_budget(place):
    pool = pyvmm.Pool("host" if place == "cpu" else place, max_bytes="16MiB")
    layer = VMMLayer(100_000, layout="seq", pool=pool)
    k = states(place, 4096)
    with pytest.raises(pyvmm.OutOfMemoryError):
        for _ in range(100):
            layer.update(k, k)
    n = layer.get_seq_length()
    assert n == layer.key_tensor.length == layer.value_tensor.length
    assert torch.equal(layer.keys[:, :, -4096:], k)
    del layer
    gc.collect()
    pool.close()


def test_streams():
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip") or not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    layer = VMMLayer(4096)
    stream = torch.cuda.Stream()
    k = torch.zeros(2, 3, 1, 8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(10):
            torch.cuda._sleep(5_000_000)
            k.fill_(i)
            keys, values = layer.update(k, k)
        totals = keys.sum(), values.sum()
    stream.synchronize()
    assert [total.item() for total in totals] == [45 * 48, 45 * 48]
