"""VMMCache against transformers' DynamicCache: the same tokens, the same keys and values."""

import contextlib
import copy
import gc
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import pyvmm  # noqa: E402
import pyvmm.transformers as adapter  # noqa: E402
import transformers_models as models  # noqa: E402
from pyvmm.transformers import VMMCache, VMMLayer  # noqa: E402
from torch_places import skip_place  # noqa: E402
from transformers_models import generate, prompt  # noqa: E402

DynamicCache = transformers.DynamicCache
DynamicLayer = transformers.cache_utils.DynamicLayer


@pytest.fixture(params=["cpu", "cuda:0"])
def place(request):
    """A device in torch's words."""
    skip_place(request.param)
    return request.param


@pytest.fixture
def llama(place):
    return models.model_of("llama", place)


def full_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, VMMLayer)]


# ---- a few ways of generating; frameworks/test_transformers_generate.py has all of them ------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}],
    ids=["greedy", "beams", "prompt lookup"],
)
def test_generate(place, kind, options):
    model = models.model_of(kind, place)
    ours, theirs = VMMCache(model.config), DynamicCache(config=model.config)
    n_full = sum(type(layer) is DynamicLayer for layer in theirs.layers)
    input_ids = prompt(place, length=6).repeat(1, 3)
    expected = generate(model, input_ids, theirs, **options)
    assert torch.equal(generate(model, input_ids, ours, **options), expected)
    assert len(full_layers(ours)) == n_full > 0
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_encoder_decoder(place):
    model = models.model_of("t5", place)
    cache = transformers.EncoderDecoderCache(VMMCache(model.config), VMMCache(model.config))
    input_ids = prompt(place, batch=2)
    tokens = generate(model, input_ids, cache)
    if place == "cpu":  # on a GPU, T5's products may round by the strides of their operands
        assert torch.equal(tokens, generate(model, input_ids))
    assert cache.self_attention_cache.layers[0].key_tensor.length == 24
    assert cache.cross_attention_cache.layers[0].key_tensor.length == 10
    assert adapter.stats(cache)["used_bytes"] == 2 * 3 * 2 * (24 + 10) * 64 * 4


def test_bfloat16(place):
    model = models.model_of("llama", place).to(torch.bfloat16)
    input_ids = prompt(place, batch=2)
    assert torch.equal(
        generate(model, input_ids, VMMCache(model.config)), generate(model, input_ids)
    )


def test_inference_mode_and_then_without(llama, place):
    expected = generate(llama, prompt(place, batch=2), None, num_beams=2)
    cache = VMMCache(llama.config)
    with torch.inference_mode():
        got = generate(llama, prompt(place, batch=2), cache, num_beams=2)
    assert torch.equal(got, expected)
    with torch.no_grad():
        llama(prompt(place, batch=4, length=1), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))


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
    assert (layer.get_seq_length(), layer.get_max_length(), layer.capacity) == (0, -1, 4096)
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


@pytest.mark.parametrize("pinned", ["key_tensor", "value_tensor"])
def test_crop_under_an_export(place, pinned):
    """The export keeps what it shows, and the layer goes on in new memory."""
    layer, k, v = filled(place)
    held = torch.from_dlpack(getattr(layer, pinned))
    expected = held.clone()
    layer.crop(-1)
    assert layer.get_seq_length() == layer.key_tensor.length == layer.value_tensor.length == 9
    assert layer.moves == 1
    layer.update(k, v)
    assert torch.equal(held, expected)
    assert torch.equal(layer.keys, torch.cat([k[:, :, :9], k], dim=2))
    assert torch.equal(layer.values, torch.cat([v[:, :, :9], v], dim=2))


def test_reset_keeps_the_memory(place):
    layer, k, v = filled(place)
    mapped = layer.key_tensor.mapped
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.key_tensor.mapped == mapped
    keys, values = layer.update(v, k)
    assert torch.equal(keys, v) and torch.equal(values, k)


def test_reset_of_a_cache_begins_anew(place):
    model = models.model_of("gemma3", place)
    cache = VMMCache(model.config)
    generate(model, prompt(place, seed=3), cache)
    address = full_layers(cache)[0].key_tensor.ptr
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompt(place), cache), generate(model, prompt(place)))
    assert full_layers(cache)[0].key_tensor.ptr == address


# What each method of a layer does to the tokens, on both classes.
METHODS = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "reorder to fewer": lambda layer: layer.reorder_cache(torch.tensor([1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "crop": lambda layer: layer.crop(-4),
    "crop to": lambda layer: layer.crop(3),
    "crop nothing": lambda layer: layer.crop(0),
    "crop by a tensor": lambda layer: layer.crop(-torch.tensor(2)),
    "offload": lambda layer: layer.offload(),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("n", [0, 10])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["seq", "lane", "c"])
def test_methods_as_dynamic_layer(place, layout, method, n):
    ours, theirs = VMMLayer(64, layout=layout), DynamicLayer()
    for layer in (ours, theirs):
        if n:
            layer.update(states(place, n, batch=3), states(place, n, batch=3, seed=1))
        elif layer is theirs:
            continue  # which does not bear all of them
        METHODS[method](layer)
        if n and method == "offload":
            assert layer.keys.device.type == "cpu"
            layer.prefetch()
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    batch = theirs.keys.shape[0] if n else 3
    for seed in (8, 9):  # with the new batch it goes on
        k, v = states(place, 2, batch, seed=seed), states(place, 2, batch, seed=seed + 10)
        for a, b in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert torch.equal(a, b)
    assert ours.keys is ours._pair.keys and ours.batch_size == batch
    assert ours.key_tensor.length == ours.value_tensor.length == theirs.get_seq_length()
    assert ours.concatenations == ours.intakes == ours.moves == 0


def test_early_initialization(llama, place):
    cache = VMMCache(llama.config)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device(place))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(llama, prompt(place), cache), generate(llama, prompt(place)))


def test_cache_speaks_as_a_cache(llama, place):
    cache = VMMCache(llama.config)
    assert cache.get_max_length() == -1
    assert {layer.capacity for layer in full_layers(cache)} == {512}
    assert cache.batch_size == -1
    with torch.no_grad():
        llama(prompt(place, batch=3), past_key_values=cache)
    assert len(cache) == 4
    assert cache.batch_size == 3
    assert cache.get_seq_length() == 10
    assert cache.get_mask_sizes(1, 0) == (11, 0)
    assert cache.is_croppable and not cache.is_compileable
    assert [keys.shape for keys, _, _ in cache] == [(3, 2, 10, 16)] * 4


# ---- growing further ------------------------------------------------------------------------


def test_past_the_capacity(place):
    layer, k, v = filled(place, capacity=12)
    old_keys = layer.keys
    keys, values = layer.update(k, v)
    assert torch.equal(keys, torch.cat([k, k], dim=2))
    assert torch.equal(values, torch.cat([v, v], dim=2))
    assert (layer.moves, layer.capacity) == (1, 24)
    assert torch.equal(old_keys, k)  # in the old memory
    more = states(place, 200)
    layer.update(more, more)
    assert (layer.moves, layer.capacity, layer.get_seq_length()) == (2, 384, 220)


def test_moving_takes_what_an_append_would(place):
    """States whose last dimension is not dense, and such as do not fit."""
    layer, k, v = filled(place, capacity=12)
    with pytest.raises(ValueError):
        layer.update(k[:1], v[:1])
    assert torch.equal(layer.keys, k) and (layer.moves, layer.capacity) == (0, 12)
    odd = states(place, 8, dim=5).transpose(2, 3)
    keys, _ = layer.update(odd, odd)
    assert torch.equal(keys, torch.cat([k, odd], dim=2)) and layer.moves == 1


def test_first_states_past_the_capacity(place):
    layer = VMMLayer(4)
    k = states(place, 10)
    keys, _ = layer.update(k, k)
    assert torch.equal(keys, k) and layer.capacity == 16


def test_a_default_capacity_that_would_take_too_many_addresses():
    layer = VMMLayer()
    k = torch.zeros(1, 1, 1, 1 << 20, dtype=torch.float64).expand(4, 2, 1, 1 << 20)
    with torch.no_grad():
        layer.update(k[:1, :1], k[:1, :1])
    assert layer.capacity == (128 << 30) >> 23  # 8 MiB a token
    assert layer.key_tensor.stats()["reserved_bytes"] <= 128 << 30


def test_another_batch_once_it_is_empty(place):
    layer, k, v = filled(place)
    wide = states(place, 3, batch=5, dtype=torch.float16)
    layer.reset()
    keys, values = layer.update(wide, wide)
    assert torch.equal(keys, wide) and torch.equal(values, wide)
    assert layer.batch_size == 5 and layer.dtype == torch.float16
    layer.reset()
    long = states(place, 100, batch=1)  # past the capacity, too
    keys, _ = layer.update(long, long)
    assert torch.equal(keys, long) and layer.capacity == 128


def test_keys_replaced_from_outside(place):
    """As libraries do that prune a cache: the layer takes in what they left there."""
    layer, k, v = filled(place)
    layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
    assert layer.get_seq_length() == 7
    keys, values = layer.update(k, v)
    assert torch.equal(keys, torch.cat([k[:, :, 3:], k], dim=2))
    assert torch.equal(values, torch.cat([v[:, :, 3:], v], dim=2))
    assert layer.intakes == 1
    assert keys.data_ptr() == layer.key_tensor.ptr
    layer.keys, layer.values = keys[:1], values[:1]
    layer.crop(-1)
    assert layer.get_seq_length() == 16 and layer.batch_size == 1


def test_states_whose_last_dimension_is_not_dense(place):
    k = states(place, 8, dim=5).transpose(2, 3)
    layer = VMMLayer(64)
    for n in (1, 2):
        keys, _ = layer.update(k, k)
        assert torch.equal(keys, torch.cat([k] * n, dim=2))


def test_gradients(place):
    """Concatenated, as DynamicLayer does it; taken in when they are wanted no more."""
    model = models.model_of("llama", place)
    cache = VMMCache(model.config)
    logits = model(prompt(place), past_key_values=cache).logits
    logits = model(prompt(place, length=2), past_key_values=cache).logits
    logits.sum().backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    theirs = DynamicCache(config=model.config)
    model(prompt(place), past_key_values=theirs)
    model(prompt(place, length=2), past_key_values=theirs).logits.sum().backward()
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.grad, gradient)
    assert cache.stats()["concatenations"] == 8
    with torch.no_grad():
        a, b = (model(prompt(place, length=3), past_key_values=c).logits for c in (cache, theirs))
    torch.testing.assert_close(a, b)  # on a GPU, strides may choose the kernel
    assert cache.stats()["intakes"] == 4
    layer, k, _ = filled(place)
    with torch.no_grad():
        keys, _ = layer.update(k.clone().requires_grad_(), k.clone().requires_grad_())
    assert torch.equal(keys, torch.cat([k, k], dim=2)) and not keys.requires_grad


def test_sizes_of_zero(place):
    ours, theirs = VMMLayer(64), DynamicLayer()
    k, v = states(place, 3), states(place, 3, dim=0)
    for _ in range(2):
        for a, b in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert torch.equal(a, b)
    assert ours.concatenations == 2
    ours.crop(-1)
    assert ours.keys.shape == (2, 3, 5, 8) and ours.values.shape == (2, 3, 5, 0)


def test_default_layouts(place):
    layer, _, _ = filled(place)
    assert layer.key_tensor.layout == ("c" if place == "cpu" else "seq")
    if place == "cpu":
        for batch, heads, layout in ((64, 3, "lane"), (300, 1, "seq")):
            wide = torch.zeros(batch, heads, 1, 4)
            layer = VMMLayer(64)
            layer.update(wide, wide)
            assert layer.key_tensor.layout == layout


# ---- what is refused ------------------------------------------------------------------------


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


def test_tensor_changed_from_outside(place):
    layer, k, v = filled(place)
    layer.key_tensor.truncate(9)
    with pytest.raises(RuntimeError, match="9 keys"):
        layer.update(k, v)


def test_unknown_device():
    with pytest.raises(ValueError, match="meta"):
        VMMLayer(64).update(states("meta", 2), states("meta", 2))


# ---- copies ---------------------------------------------------------------------------------


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": saved,
}


@pytest.mark.parametrize("method", COPIES)
def test_copies_grow_on_their_own(place, method):
    layer, k, v = filled(place)
    new = COPIES[method](layer)
    assert type(new) is VMMLayer
    assert (new.capacity, new.batch_size, new.get_seq_length()) == (64, 2, 10)
    a, b = states(place, 2, seed=5), states(place, 2, seed=6)
    layer.update(a, a)
    new.update(b, b)
    assert torch.equal(layer.keys, torch.cat([k, a], dim=2))
    assert torch.equal(new.keys, torch.cat([k, b], dim=2))
    assert torch.equal(new.values, torch.cat([v, b], dim=2))
    assert layer.key_tensor.ptr != new.key_tensor.ptr
    assert new.key_tensor.device == layer.key_tensor.device


@pytest.mark.parametrize("method", COPIES)
def test_copies_of_a_layer_without_tokens(place, method):
    new = COPIES[method](VMMLayer(64))
    k = states(place, 2)
    assert torch.equal(new.update(k, k)[0], k)


def test_copies_take_the_tokens_alone(place):
    """Of a reservation of 2 GiB and more, mostly not backed by memory."""
    pool = pyvmm.Pool("host" if place == "cpu" else place)
    layer, k, v = filled(place, n=100, capacity=20_000_000, pool=pool)
    assert layer.key_tensor.stats()["reserved_bytes"] > 2 << 30
    token_bytes = 2 * k.nbytes
    assert len(pickle.dumps(layer)) < token_bytes + 4096
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    assert buffer.tell() < token_bytes + 16_384
    before = pool.stats()["in_use_bytes"]
    new = copy.deepcopy(layer)
    assert pool.stats()["in_use_bytes"] == 2 * before  # from the same pool
    assert torch.equal(new.keys, k) and torch.equal(new.values, v)
    del layer, new
    pool.close()


def test_copies_of_a_cache(place):
    model = models.model_of("gemma3", place)
    cache = VMMCache(model.config)
    with torch.no_grad():
        model(prompt(place, length=20), past_key_values=cache)
        token = prompt(place, length=1)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), saved(cache)]
        expected = model(token, past_key_values=cache).logits
        for new in copies:
            assert torch.equal(model(token, past_key_values=new).logits, expected)
            new.reset()
            assert new.get_seq_length() == 0


# ---- install and uninstall ------------------------------------------------------------------


@contextlib.contextmanager
def installed(**options):
    adapter.install(**options)
    try:
        yield
    finally:
        adapter.uninstall()


MAPPING = transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING


def test_install_and_uninstall(llama, place):
    before = dict(MAPPING)
    expected = generate(llama, prompt(place))
    adapter.uninstall()  # without an install(), nothing
    with installed(capacity=999, layout="lane"):
        adapter.install(capacity=777, layout="lane")  # again: other parameters
        result = generate(llama, prompt(place), return_dict_in_generate=True)
        assert torch.equal(result.sequences, expected)
        layers = full_layers(result.past_key_values)
        assert len(layers) == 4
        assert {(layer.capacity, layer.key_tensor.layout) for layer in layers} == {(777, "lane")}
        assert type(VMMCache(llama.config).layers[0]) is VMMLayer
        # A layer of these that was copied or saved does not need an install() any more.
        made = layers[0]
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert isinstance(copied, VMMLayer) and torch.equal(copied.keys, made.keys)
        # Every layer is given what any of a model's needs.
        gemma = models.config_of("gemma3")
        kinds = [isinstance(layer, VMMLayer) for layer in DynamicCache(config=gemma).layers]
        assert kinds == [False, True] * 2
    assert MAPPING == before
    assert type(DynamicCache(config=llama.config).layers[0]) is DynamicLayer


def test_uninstall_leaves_what_others_registered():
    before = MAPPING["full_attention"]
    adapter.install()
    MAPPING["full_attention"] = theirs = type("Theirs", (DynamicLayer,), {})
    with pytest.raises(RuntimeError, match="Theirs"):
        adapter.uninstall()
    assert MAPPING["full_attention"] is theirs
    MAPPING["full_attention"] = adapter._InstalledLayer
    adapter.uninstall()
    assert MAPPING["full_attention"] is before


def test_training_after_install(place):
    model = models.model_of("llama", place).train()
    with installed():
        output = model(prompt(place), labels=prompt(place))
        output.loss.backward()
    assert full_layers(output.past_key_values)[0].concatenations == 1
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


# ---- memory -----------------------------------------------------------------------------


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing(call, *arguments):
    with contextlib.suppress(ValueError):
        call(*arguments)
        raise AssertionError("did not fail")


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, k: None,
        lambda layer, k: layer.crop(-3),
        lambda layer, k: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer, k: layer.batch_repeat_interleave(2),
        lambda layer, k: [layer.update(k, k) for _ in range(9)],  # past the capacity
        lambda layer, k: copy.deepcopy(layer),
        lambda layer, k: pickle.dumps(layer),
        lambda layer, k: setattr(layer, "keys", layer.keys.clone()),
        lambda layer, k: layer.offload(),
        lambda layer, k: layer.update(k.clone().requires_grad_(), k),
        lambda layer, k: failing(layer.update, k[:1], k),
        lambda layer, k: failing(layer.update, k, k[:, :, :1]),
    ],
    ids=(
        "none crop reorder repeat move deepcopy pickle replace offload gradients batch tokens"
    ).split(),
)
def test_memory_goes_without_the_collector(place, without_gc, use):
    pool = pyvmm.Pool("host" if place == "cpu" else place)
    layer, k, _ = filled(place, pool=pool)
    use(layer, k)
    del layer
    assert pool.stats()["in_use_bytes"] == 0
    pool.close()


def test_memory_goes_with_the_cache(place, llama, without_gc):
    pool = pyvmm.Pool("host" if place == "cpu" else place)
    cache = VMMCache(llama.config, pool=pool)
    with torch.no_grad():
        llama(prompt(place), past_key_values=cache)
        llama(prompt(place, length=1), past_key_values=cache)
    keys = cache.layers[0].keys
    expected = keys.clone()
    assert pool.stats()["in_use_bytes"] > 0
    del cache
    assert torch.equal(keys, expected)  # a view keeps its own tensor alive, and no other
    assert pool.stats()["in_use_bytes"] > 0
    del keys
    assert pool.stats()["in_use_bytes"] == 0
    pool.close()


def test_offloading(place):
    """A cache that generate() keeps in host memory but for the layer at work."""
    if place == "cpu":
        pytest.skip("there is nowhere to offload host memory to")
    model = models.model_of("llama", place)
    expected = generate(model, prompt(place, batch=2))
    pool = pyvmm.Pool(place)
    cache = VMMCache(model.config, pool=pool, offloading=True)
    assert torch.equal(generate(model, prompt(place, batch=2), cache), expected)
    assert {layer.keys.device.type for layer in cache.layers} == {"cpu", "cuda"}
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    theirs = DynamicCache(config=model.config)
    generate(model, prompt(place, batch=2), theirs)
    theirs.crop(-3)
    theirs.reorder_cache(torch.tensor([1, 0]))
    theirs.batch_repeat_interleave(2)
    for ours, layer in zip(cache.layers, theirs.layers, strict=True):
        ours.prefetch()
        assert torch.equal(ours.keys, layer.keys) and torch.equal(ours.values, layer.values)
    with installed():
        again = generate(model, prompt(place, batch=2), cache_implementation="offloaded")
    assert torch.equal(again, expected)


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
    skip_place("cuda:0")
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
