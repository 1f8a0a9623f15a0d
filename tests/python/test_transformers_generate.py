"""generate() in every way, with VMMCache and with DynamicCache: the same tokens.

Each case runs twice, with a VMMCache that is given and with the one that generate() makes
after install(). On the CPU in float32 the values are the same bit for bit. On a GPU, kernels
may round by strides, so there benchmarks/hf_decode.py compares logits instead.
"""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import pyvmm.transformers as adapter  # noqa: E402
import transformers_models as models  # noqa: E402
from pyvmm.transformers import VMMCache, VMMLayer  # noqa: E402
from torch_places import skip_place  # noqa: E402
from transformers_models import generate, prompt  # noqa: E402

DynamicCache, EncoderDecoderCache = transformers.DynamicCache, transformers.EncoderDecoderCache
pytestmark = pytest.mark.frameworks

PLACE = "cpu"
MODELS = "llama", "qwen2", "mistral", "gemma3", "t5"


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    skip_place(PLACE)
    return models.model_of(request.param, PLACE)


@pytest.fixture
def installed():
    adapter.install()
    yield
    adapter.uninstall()


def make(kind, model, **options):
    """A cache of the class for the model."""

    def of_decoder():
        if kind is VMMCache:
            return VMMCache(model.config, **options)
        return DynamicCache(config=model.config.get_text_config(decoder=True))

    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(of_decoder(), of_decoder())
    return of_decoder()


def vmm_layers(cache):
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    return [layer for part in parts for layer in part.layers if isinstance(layer, VMMLayer)]


def n_full_layers(cache):
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    dynamic = transformers.cache_utils.DynamicLayer
    return sum(type(layer) is dynamic for part in parts for layer in part.layers)


def assert_same(model, input_ids, **options):
    """With a given cache, and, in another call, with one of generate()'s own."""
    theirs, ours = make(DynamicCache, model), make(VMMCache, model)
    expected = generate(model, input_ids, theirs, **options)
    assert torch.equal(generate(model, input_ids, ours, **options), expected)
    assert len(vmm_layers(ours)) == n_full_layers(theirs)
    counts = adapter.stats(ours)
    assert counts["moves"] == counts["intakes"] == counts["concatenations"] == 0
    assert (counts["used_bytes"] > 0) == (n_full_layers(theirs) > 0)
    return ours, theirs, expected


def test_greedy(model):
    ours, theirs, tokens = assert_same(model, prompt(PLACE))
    assert len(tokens.unique()) > 5  # or it would say little
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_caches_that_generate_makes(model, installed, options):
    adapter.uninstall()
    input_ids = prompt(PLACE, length=6).repeat(1, 3)
    expected = generate(model, input_ids, **options)
    adapter.install()
    result = generate(model, input_ids, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)
    assert len(vmm_layers(result.past_key_values)) == n_full_layers(make_uninstalled(model))


def make_uninstalled(model):
    adapter.uninstall()
    return make(DynamicCache, model)


def test_batch_with_left_padding(model):
    input_ids = prompt(PLACE, batch=3)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = mask[1, :1] = 0
    assert_same(model, input_ids, mask=mask)


def test_sampling(model):
    assert_same(model, prompt(PLACE, batch=2), do_sample=True, top_k=20)


def test_several_answers(model):
    assert_same(model, prompt(PLACE), do_sample=True, num_return_sequences=3)


def test_beam_search(model):
    assert_same(model, prompt(PLACE, batch=2), num_beams=3)


def test_beam_search_with_sampling_and_several_answers(model):
    assert_same(model, prompt(PLACE), num_beams=4, num_return_sequences=2, do_sample=True)


def test_prompt_lookup(model):
    assert_same(model, prompt(PLACE, length=6).repeat(1, 4), prompt_lookup_num_tokens=4)


def is_sliding(model):
    return getattr(model.config, "sliding_window", None) is not None


def test_assisted(model):
    # transformers' own sliding layers cannot be an assistant's past their window.
    is_t5 = model.config.is_encoder_decoder
    kind = "t5" if is_t5 else "qwen2" if model.config.model_type == "qwen2" else "llama"
    assert_same(model, prompt(PLACE), assistant_model=models.model_of(kind, PLACE, seed=1))


def test_assisted_by_itself(model):
    if is_sliding(model):
        pytest.skip("a model with sliding layers cannot be transformers' assistant")
    # Every candidate is right: nothing is cropped.
    assert_same(model, prompt(PLACE), assistant_model=copy.deepcopy(model))


def test_prefill_in_chunks(model):
    if model.config.is_encoder_decoder:
        pytest.skip("transformers prefills encoder-decoder models at once")
    assert_same(model, prompt(PLACE, length=50), prefill_chunk_size=16)


def test_several_turns_with_crop(model):
    """The cache is cropped in between, by tokens that are then answered anew."""
    if model.config.is_encoder_decoder:
        pytest.skip("transformers begins each answer of such a model anew: see the logits' test")
    # Past their window, transformers' sliding layers refuse to be cropped.
    length, n_new, n_more, n_turns = (3, 3, 2, 2) if is_sliding(model) else (10, 8, 5, 4)
    answers = []
    for kind in (VMMCache, DynamicCache):
        cache, tokens = make(kind, model), prompt(PLACE, length=length)
        for turn in range(n_turns):
            answer = generate(model, tokens, cache, max_new_tokens=n_new)
            cache.crop(-2)
            assert cache.get_seq_length() == answer.shape[1] - 1 - 2
            tokens = torch.cat([answer, prompt(PLACE, length=n_more, seed=turn)], dim=1)
        answers.append(tokens)
    assert torch.equal(*answers)


def test_prefix_that_is_copied(model):
    """One pass over a long prefix, and from copies of its cache several answers."""
    if model.config.is_encoder_decoder:
        pytest.skip("an encoder's states belong to one text: test_greedy reads its cache")
    prefix = prompt(PLACE, length=30)
    answers = []
    for kind in (VMMCache, DynamicCache):
        cache = make(kind, model)
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        of_kind = []
        for seed in (1, 2, 3):
            question = torch.cat([prefix, prompt(PLACE, length=7, seed=seed)], dim=1)
            of_kind.append(generate(model, question, copy.deepcopy(cache)))
        assert cache.get_seq_length() == 30
        answers.append(torch.cat(of_kind))
    assert torch.equal(*answers)


def test_another_batch_size_after_reset(model):
    cache = make(VMMCache, model)
    for batch in (2, 1, 4):
        input_ids = prompt(PLACE, batch=batch, seed=batch)
        expected = generate(model, input_ids, make(DynamicCache, model))
        assert torch.equal(generate(model, input_ids, cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_outgrowing_the_capacity(model):
    """Thirteen tokens of capacity, and more of generation: each layer moves, and few times."""
    if model.config.is_encoder_decoder:
        ours = EncoderDecoderCache(
            VMMCache(model.config, capacity=13), VMMCache(model.config, capacity=13)
        )
    else:
        ours = VMMCache(model.config, capacity=13)
    expected = generate(model, prompt(PLACE), make(DynamicCache, model))
    assert torch.equal(generate(model, prompt(PLACE), ours), expected)
    assert n_full_layers(make(DynamicCache, model)) == len(vmm_layers(ours))
    for layer in vmm_layers(ours):
        assert layer.capacity == 13 * 2**layer.moves
        assert layer.get_seq_length() <= layer.capacity < 2 * max(layer.get_seq_length(), 13)
    counts = [layer.moves for layer in vmm_layers(ours)]
    assert not counts or max(counts) == (1 if model.config.is_encoder_decoder else 2)


def test_layouts(model):
    expected = generate(model, prompt(PLACE, batch=2), make(DynamicCache, model))
    for layout in ("seq", "lane", "c"):
        ours = make(VMMCache, model, layout=layout)
        assert torch.equal(generate(model, prompt(PLACE, batch=2), ours), expected)
        assert {layer.key_tensor.layout for layer in vmm_layers(ours)} <= {layout}


def test_logits_step_by_step(model):
    if model.config.is_encoder_decoder:
        ids = prompt(PLACE, batch=2, length=60)
        given = {"input_ids": prompt(PLACE, batch=2, seed=3)}
        name = "decoder_input_ids"
    else:
        ids, given, name = prompt(PLACE, batch=2, length=60), {}, "input_ids"
    ours, theirs = make(VMMCache, model), make(DynamicCache, model)
    with torch.no_grad():
        for begin, end in [(0, 20), (20, 26), (26, 27), (27, 40), (40, 60)]:
            a, b = (
                model(**given, **{name: ids[:, begin:end]}, past_key_values=cache).logits
                for cache in (ours, theirs)
            )
            assert torch.equal(a, b)
            if not is_sliding(model):
                ours.crop(-5)
                theirs.crop(-5)
