"""Captured steps of transformers: generate() in every way, logits, fallbacks, attention.

On the CPU a graph is replaced by one that runs the recorded function again over the same static
buffers (EagerGraph), with attention in plain torch: all that surrounds a graph is the same. On a
GPU it is what users run. Graphs of any loop are in test_handoff_graphs.py."""

import copy
import functools
import gc
import os
import pickle
import threading
import warnings
import weakref
from contextlib import nullcontext as quiet

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import pyvmm  # noqa: E402
import pyvmm.torch  # noqa: E402
import pyvmm.transformers as adapter  # noqa: E402
import transformers_models as models  # noqa: E402
from pyvmm import _attention, _captured, _captured_step, _graphs  # noqa: E402
from pyvmm._torch_kv import KVPair  # noqa: E402
from pyvmm.transformers import VMMCache  # noqa: E402
from support import run_python  # noqa: E402
from torch_places import graphs_of, skip_place  # noqa: E402
from transformers_models import generate, prompt  # noqa: E402

DynamicCache = transformers.DynamicCache
MODELS = "llama", "qwen2", "qwen3", "mistral", "gemma3"
# `make test` takes one of full and one of both kinds of layers, `make test-frameworks` all.
OF_MAKE_TEST = "llama", "gemma3"


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def place(request):
    skip_place(request.param)
    return request.param


@pytest.fixture(
    scope="module",
    params=[
        kind if kind in OF_MAKE_TEST else pytest.param(kind, marks=pytest.mark.frameworks)
        for kind in MODELS
    ],
)
def model(request, place):
    return models.model_of(request.param, place)


@pytest.fixture
def llama(place):
    return models.model_of("llama", place)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    # So that a short text passes several.
    for name in ("_LEAST_BUCKET", "_LEAST_STEP"):
        monkeypatch.setattr(_captured_step, name, 16)


def captured(model, compile=False):
    return _captured.block(model, compile, graphs_of(model.device.type))


def padded(input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, :4] = mask[1, :1] = 0
    return mask


def is_sliding(model):
    return getattr(model.config, "sliding_window", None) is not None


def assert_same(model, input_ids, mask=None, assisted=False, **options):
    """As with DynamicCache, twice: the second time over memory that the first has left."""
    expected = generate(model, input_ids, mask=mask, **options)
    with captured(model) as block:
        for _ in range(2):
            assert torch.equal(generate(model, input_ids, mask=mask, **options), expected)
    if not assisted:
        assert block.n_replays > 0
        assert not block.reasons
    assert "forward" not in model.__dict__
    return block


# ---- generate ---------------------------------------------------------------------


def test_greedy(model):
    block = assert_same(model, prompt(model.device, batch=2), max_new_tokens=60)
    assert block.n_replays == 2 * 59
    assert block.n_captures == 5  # lengths up to 16, 32, 48, 64, 80; and none for the second


def test_left_padding(model):
    input_ids = prompt(model.device, batch=3)
    assert_same(model, input_ids, padded(input_ids), max_new_tokens=60)


def test_sampling(model):
    assert_same(model, prompt(model.device, batch=2), do_sample=True, top_k=20)


def test_several_answers(model):
    assert_same(model, prompt(model.device), do_sample=True, num_return_sequences=3)


def test_beam_search(model):
    input_ids = prompt(model.device, batch=2)
    assert_same(model, input_ids, num_beams=3)
    assert_same(model, input_ids, padded(input_ids), num_beams=3)


def test_assisted(model):
    assistant = models.model_of("llama", model.device, seed=1)
    check = pytest.warns(RuntimeWarning, match="records its past") if is_sliding(model) else quiet()
    with check:
        assert_same(model, prompt(model.device), assisted=True, assistant_model=assistant)


def test_assisted_by_one_that_is_captured(llama):
    assistant = models.model_of("llama", llama.device, seed=1)
    with captured(assistant) as block:
        assert_same(llama, prompt(llama.device), assisted=True, assistant_model=assistant)
    assert block.n_replays > 0


def test_prompt_lookup(model):
    input_ids = prompt(model.device, length=6).repeat(1, 4)
    check = pytest.warns(RuntimeWarning, match="records its past") if is_sliding(model) else quiet()
    with check:
        assert_same(model, input_ids, assisted=True, prompt_lookup_num_tokens=4)


def test_prefill_in_chunks(model):
    assert_same(model, prompt(model.device, length=50), prefill_chunk_size=16)


def test_processors_criteria_and_a_streamer(llama):
    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    def last_is_seven(input_ids, scores):
        return input_ids[:, -1] == 7

    def no_threes(input_ids, scores):
        return scores.index_fill(1, torch.tensor([3], device=scores.device), -torch.inf)

    heard = []
    for block in (None, captured(llama)):
        streamer = Streamer()
        with block or quiet():
            tokens = generate(
                llama,
                prompt(llama.device),
                max_new_tokens=40,
                streamer=streamer,
                logits_processor=[no_threes],
                stopping_criteria=[last_is_seven],
                repetition_penalty=1.1,
            )
        heard.append((tokens.tolist(), streamer.tokens))
    assert heard[0] == heard[1]


def test_scores_and_the_cache_are_returned(model):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs = generate(model, prompt(model.device), **options)
    with captured(model):
        ours = generate(model, prompt(model.device), **options)
        other = generate(model, prompt(model.device, seed=1))  # must not take ours' memory
        assert len(other)
    for a, b in zip(ours.logits + ours.scores, theirs.logits + theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_cache(ours.past_key_values, theirs.past_key_values)


def assert_same_cache(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)
        assert a.get_mask_sizes(1) == b.get_mask_sizes(1)


def test_views_that_outlive_their_cache(llama):
    """The next answer must not take memory that someone still sees."""
    with captured(llama):
        result = generate(llama, prompt(llama.device), return_dict_in_generate=True)
        keys = result.past_key_values.layers[0].keys
        before = keys.clone()
        del result
        gc.collect()
        generate(llama, prompt(llama.device, seed=1))
    assert torch.equal(keys, before)


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_several_turns(model, masked):
    """A cache of the caller's through several turns, each a prefill over what is there."""
    answers = []
    for block in (None, captured(model)):
        cache = DynamicCache(config=model.config)
        tokens = prompt(model.device, batch=2)
        mask = padded(tokens) if masked else torch.ones_like(tokens)
        with block or quiet():
            for turn in range(3):
                answer = generate(model, tokens, cache, mask, max_new_tokens=12)
                more = prompt(model.device, batch=2, length=5, seed=turn)
                tokens = torch.cat([answer, more], dim=1)
                n_more = tokens.shape[1] - mask.shape[1]
                mask = torch.nn.functional.pad(mask, (0, n_more), value=1)
        answers.append(tokens)
    assert torch.equal(*answers)


def test_crop_between_turns(llama):
    answers = []
    for block in (None, captured(llama)):
        cache = DynamicCache(config=llama.config)
        tokens = prompt(llama.device)
        with block or quiet():
            for turn in range(3):
                answer = generate(llama, tokens, cache, max_new_tokens=12)
                cache.crop(-4)
                tokens = torch.cat([answer, prompt(llama.device, length=5, seed=turn)], dim=1)
        answers.append(tokens)
    assert torch.equal(*answers)


def test_a_vmm_cache_of_the_callers(model):
    expected = generate(model, prompt(model.device, batch=2))
    with captured(model) as block:
        for layout in ("seq", "lane"):
            cache = VMMCache(model.config, layout=layout)
            assert torch.equal(generate(model, prompt(model.device, batch=2), cache), expected)
            counts = cache.stats()
            assert counts["moves"] == counts["intakes"] == counts["concatenations"] == 0
    assert block.n_replays == 2 * 23


def test_padding_in_layout_seq_moves_to_lanes(llama):
    input_ids = prompt(llama.device, batch=3)
    mask = padded(input_ids)
    expected = generate(llama, input_ids, mask=mask)
    cache = VMMCache(llama.config, layout="seq")
    with captured(llama) as block:
        assert torch.equal(generate(llama, input_ids, cache, mask), expected)
    assert block.n_replays == 23
    assert {layer.key_tensor.layout for layer in cache.layers} == {"lane"}


def test_outgrowing_the_capacity(llama):
    expected = generate(llama, prompt(llama.device), max_new_tokens=60)
    cache = VMMCache(llama.config, capacity=13)
    with captured(llama) as block:
        assert torch.equal(
            generate(llama, prompt(llama.device), cache, max_new_tokens=60), expected
        )
    assert all(layer.capacity >= 69 for layer in cache.layers)
    assert block.n_replays > 50


def test_another_batch_size(model):
    with captured(model):
        for batch in (2, 1, 4, 2):
            input_ids = prompt(model.device, batch=batch, seed=batch)
            result = generate(model, input_ids)
            with torch.no_grad():
                expected = generate_without(model, input_ids)
            assert torch.equal(result, expected)


def generate_without(model, input_ids, mask=None):
    """With the model's own forward, inside a block."""
    forward = model.__dict__.pop("forward")
    try:
        return generate(model, input_ids, mask=mask)
    finally:
        model.forward = forward


def test_copies_of_the_cache(model):
    prefix = prompt(model.device, length=30)
    answers = []
    for block in (None, captured(model)):
        cache = DynamicCache(config=model.config)
        with block or quiet():
            generate(model, prefix, cache, max_new_tokens=5)
            tokens = torch.cat([prefix, prompt(model.device, length=8, seed=1)], dim=1)
            copied = copy.deepcopy(cache)
            first = generate(model, tokens, copied, max_new_tokens=12)
            second = generate(model, tokens, pickle.loads(pickle.dumps(cache)), max_new_tokens=12)
            third = generate(model, tokens, cache, max_new_tokens=12)
        answers.append(torch.cat([first, second, third]))
    assert torch.equal(*answers)


def test_an_exception_in_the_middle(model):
    class Stop(Exception):
        pass

    def fail(input_ids, scores):
        if input_ids.shape[1] > 15:
            raise Stop
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    input_ids = prompt(model.device, batch=2)
    expected = generate(model, input_ids)
    with captured(model):
        with pytest.raises(Stop):
            generate(model, input_ids, stopping_criteria=[fail])
        assert torch.equal(generate(model, input_ids), expected)
    with pytest.raises(Stop), captured(model):
        generate(model, input_ids, stopping_criteria=[fail])
    assert torch.equal(generate(model, input_ids), expected)


def in_threads(work, n):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_over_one_model_and_over_several(place):
    of_all = [models.model_of(kind, place) for kind in ("llama", "llama", "gemma3")]
    of_all[1] = of_all[0]
    prompts = [prompt(place, batch=2, seed=seed) for seed in range(3)]
    expected = [generate(*pair) for pair in zip(of_all, prompts, strict=True)]
    results = [[] for _ in of_all]

    def answer(i):
        with captured(of_all[i]):
            for _ in range(3):
                results[i].append(generate(of_all[i], prompts[i]))

    in_threads(answer, 3)
    for of_thread, right in zip(results, expected, strict=True):
        assert len(of_thread) == 3
        assert all(torch.equal(tokens, right) for tokens in of_thread)
    assert all("forward" not in model.__dict__ for model in of_all)


class Recorder(_graphs.EagerGraph):
    """Lets another thread try to come in between the warm-up and the end of a capture."""

    def record(self, run, warm_up, pools):
        super().record(run, warm_up, pools)
        if threading.current_thread() is self.thread and not self.begun.is_set():
            self.begun.set()
            assert self.is_about_to.wait(60)
            self.was_in = self.is_in.wait(0.5)
            type(self).seen.append(self.was_in)


@pytest.fixture
def recorder():
    class OfTest(Recorder):
        thread = threading.current_thread()
        begun, is_about_to, is_in = (threading.Event() for _ in range(3))
        seen = []

    return OfTest


def do_prefill(model, recorder, cache):
    model(prompt(model.device), use_cache=True)


def do_crop(model, recorder, cache):
    cache.crop(-2)


def do_capture(model, recorder, cache):
    t = pyvmm.empty((0, 4), capacity=100, device="host")

    def step(x):
        recorder.is_in.set()
        t.append(x)

    pyvmm.torch._capture(step, t, recorder)(torch.ones(1, 4))


@pytest.mark.parametrize("work", [do_prefill, do_crop, do_capture])
def test_a_capture_is_apart_from_eager_work(monkeypatch, recorder, work):
    model = models.model_of("llama", "cpu")
    forward, truncate = model.forward, KVPair.truncate

    @functools.wraps(forward)
    def eager(*args, **kwargs):
        if threading.current_thread() is other:
            recorder.is_in.set()
        return forward(*args, **kwargs)

    def truncated(*args):
        if threading.current_thread() is other:
            recorder.is_in.set()
        return truncate(*args)

    cache = DynamicCache(config=model.config)
    failed = []

    def beside():
        try:
            assert recorder.begun.wait(60)
            recorder.is_about_to.set()
            with torch.no_grad():
                work(model, recorder, cache)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=beside)
    monkeypatch.setattr(KVPair, "truncate", truncated)
    monkeypatch.setattr(model, "forward", eager)
    with _captured.block(model, False, recorder):
        with torch.no_grad():
            for ids in (prompt("cpu"), prompt("cpu")):
                model(ids, past_key_values=cache)
        other.start()
        generate(model, prompt("cpu", seed=1))
        other.join(60)
    assert not failed
    assert recorder.seen == [False]
    assert recorder.is_in.is_set()  # afterwards


def test_replays_take_no_lock(llama):
    """Another thread is at a capture all the while."""
    holds, is_done = threading.Event(), threading.Event()

    def hold():
        with _graphs.CAPTURE:
            holds.set()
            is_done.wait(60)

    other = threading.Thread(target=hold)
    ids = prompt(llama.device, length=40)
    theirs, _ = forced_logits(llama, ids, None, 17)
    with torch.no_grad(), captured(llama) as block:
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :17], past_key_values=cache)
        llama(ids[:, 17:18], past_key_values=cache)
        other.start()
        assert holds.wait(60)
        logits = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(18, 32)]
        assert other.is_alive()  # it waits for us, not we for it
        assert not is_done.is_set()
        is_done.set()
        other.join()
    assert block.n_replays == 15
    ours = torch.cat(logits)[:, -1].float()
    torch.testing.assert_close(ours, theirs[2:16, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_holds_the_locks():
    """The child has not that thread, nor what it would let go of."""
    run_python("""
        import os, signal, threading, torch
        import transformers_models as models
        from pyvmm import _captured, _graphs

        model = models.model_of("llama", "cpu")
        prompt = models.prompt("cpu")
        holds, is_done = threading.Event(), threading.Event()

        def hold(captured):
            with _graphs.CAPTURE, _captured._open_lock, captured._lock:
                holds.set()
                is_done.wait()

        def answer():
            with _captured.block(model, False, _graphs.EagerGraph) as block:
                tokens = models.generate(model, prompt)
            assert block.n_replays >= 23, block.reasons
            return tokens

        with _captured.block(model, False, _graphs.EagerGraph) as block:
            expected = models.generate(model, prompt)  # whose memory waits for the next
            thread = threading.Thread(target=hold, args=(block,))
            thread.start()
            holds.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends it
                os._exit(0 if torch.equal(answer(), expected) else 3)
            is_done.set()
            thread.join()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert torch.equal(answer(), expected)
    """)


def test_inference_mode(model):
    expected = generate(model, prompt(model.device, batch=2))
    with torch.inference_mode(), captured(model) as block:
        assert torch.equal(generate(model, prompt(model.device, batch=2)), expected)
        assert not block.reasons


# ---- buckets ----------------------------------------------------------------------


def test_buckets_waste_an_eighth_at_most(monkeypatch):
    monkeypatch.undo()
    buckets = set()
    least, step = _captured_step._LEAST_BUCKET, _captured_step._LEAST_STEP
    for length in range(1, 140_000):
        bucket = _captured_step.bucket_for(length)
        assert bucket >= length
        assert bucket == _captured_step.bucket_for(bucket)
        assert bucket - length < max(least, step, length / 8)
        buckets.add(bucket)
    of_short = [512, *range(1024, 16 * 1024, 1024)]
    assert sorted(buckets)[:20] == [*of_short, 16384, 18432, 20480, 22528]
    assert len(buckets) == 17 + 3 * 8 + 1  # 41 graphs to 128k tokens, and one more


def test_only_the_last_graphs_are_kept(llama, monkeypatch):
    monkeypatch.setattr(_captured_step, "_MOST_GRAPHS", 3)
    ids = prompt(llama.device, batch=2, length=120)
    theirs, _ = forced_logits(llama, ids, None, 12)
    with captured(llama) as block:
        ours, cache = forced_logits(llama, ids, None, 12)
        steps = block._runs[cache].steps
        assert list(steps.graphs) == [96, 112, 128]
        assert block.n_captures == 8
        # A crop goes back to a length whose graph has gone.
        cache.crop(20)
        with torch.no_grad():
            for i in range(20, 120):
                again = llama(ids[:, i : i + 1], past_key_values=cache).logits[:, -1].float()
                torch.testing.assert_close(again, theirs[i - 11], rtol=1e-4, atol=2e-4)
        assert list(steps.graphs) == [96, 112, 128]
        assert block.n_captures == 15
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


# ---- logits under teacher forcing -------------------------------------------------


def forced_logits(model, ids, mask, n_prompt):
    cache = DynamicCache(config=model.config)
    bounds = [0, *range(n_prompt, ids.shape[1] + 1)]
    logits = []
    with torch.no_grad():
        for begin, end in zip(bounds, bounds[1:], strict=False):
            given = {} if mask is None else {"attention_mask": mask[:, :end]}
            positions = None
            if mask is not None:
                positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
            part = model(
                ids[:, begin:end], position_ids=positions, past_key_values=cache, **given
            ).logits
            logits.append(part[:, -1].float())
    return torch.stack(logits), cache


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_logits(model, masked):
    ids = prompt(model.device, batch=3, length=120)
    mask = padded(ids) if masked else None
    theirs, their_cache = forced_logits(model, ids, mask, 12)
    with captured(model) as block:
        ours, our_cache = forced_logits(model, ids, mask, 12)
    assert block.n_replays == 108
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    if not masked:  # else the rows of padding differ, which nobody reads
        assert_same_cache(our_cache, their_cache)


def test_positions_are_the_lengths_where_none_are_given(llama):
    ids = prompt(llama.device, length=20)
    with torch.no_grad(), captured(llama):
        cache = None
        for i in range(20):
            out = llama(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    with torch.no_grad():
        expected = llama(ids).logits[:, -1:]
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)


def test_memory_that_waits_is_given_up(llama):
    """What is kept for the next answer is the first to go when memory is short."""
    device = "host" if llama.device.type == "cpu" else "cuda:0"
    pool = pyvmm.Pool(device, block_size="2MiB", max_bytes="200MiB")
    adapter.install(pool=pool, layout="seq")
    try:
        with captured(llama):
            expected = generate(llama, prompt(llama.device))
            assert pool.stats()["in_use_bytes"] > 0
            rest = pyvmm.empty((0, 1 << 20), "uint8", capacity=200, device=device, pool=pool)
            rest.map(198)
            rest.close()
            assert torch.equal(generate(llama, prompt(llama.device)), expected)
    finally:
        adapter.uninstall()


# ---- what runs eagerly ------------------------------------------------------------


def reasons_of(model, input_ids, **options):
    expected = generate(model, input_ids, **options)
    with pytest.warns(RuntimeWarning, match="steps run eagerly") as said, captured(model) as block:
        result = generate(model, input_ids, **options)
        assert torch.equal(result, expected)
    assert len([w for w in said if "run eagerly" in str(w.message)]) == len(block.reasons) == 1
    assert block.n_replays == 0
    return block.reasons.pop()


def test_outputs_of_layers(llama):
    input_ids = prompt(llama.device)
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.warns(RuntimeWarning, match="output_hidden_states"), captured(llama):
        result = generate(llama, input_ids, **options)
    assert len(result.hidden_states) == 24
    # transformers leaves idle hooks behind, which are no reason.
    assert_same(llama, input_ids)


def test_hooks(llama):
    seen = []
    handle = llama.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
    assert "hooks" in reasons_of(llama, prompt(llama.device))
    assert len(seen) == 2 * 24
    handle.remove()
    # A hook of the model itself runs around a replay.
    handle = llama.register_forward_hook(lambda *args: seen.append(2))
    assert_same(llama, prompt(llama.device))
    assert seen.count(2) == 3 * 24
    handle.remove()


def test_masks_with_holes(llama):
    input_ids = prompt(llama.device, batch=2)
    mask = torch.ones_like(input_ids)
    mask[1, 3] = 0
    assert "padding on the left" in reasons_of(llama, input_ids, mask=mask)


def test_gradients(llama):
    ids = prompt(llama.device)
    with captured(llama), pytest.warns(RuntimeWarning, match="gradients"):
        cache = llama(ids, use_cache=True).past_key_values
        out = llama(ids[:, :1], past_key_values=cache)
    out.logits.sum().backward()
    assert llama.lm_head.weight.grad is not None


def test_other_caches(llama):
    cache = transformers.StaticCache(config=llama.config, max_cache_len=64)
    expected = generate(llama, prompt(llama.device))
    with pytest.warns(RuntimeWarning, match="StaticCache"), captured(llama) as block:
        assert torch.equal(generate(llama, prompt(llama.device), cache), expected)
    assert block.n_replays == 0


def test_another_model(place):
    config = transformers.GPTNeoXConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(place).eval()
    assert "GPTNeoXForCausalLM" in reasons_of(model, prompt(place))


def test_a_step_that_cannot_be_captured(place, monkeypatch):
    """An operation that fails, or synchronises: said by name, and the text is the same."""
    model = models.model_of("llama", place)
    is_first = []

    def attend(*args, **kwargs):
        is_first.append(1)
        if place == "cuda":
            return args[1].cpu()
        raise RuntimeError("an operation that a capture prohibits")

    monkeypatch.setattr(_attention, "merge", attend)
    try:
        raise KeyError("something else")
    except KeyError:
        reason = reasons_of(model, prompt(place))
    assert "cannot be captured" in reason
    assert "test_handoff_captured.py" in reason or place == "cuda"
    assert len(is_first) == 1


def test_the_cpu_is_told_once():
    model = models.model_of("mistral", "cpu")
    expected = generate(model, prompt("cpu"))
    with pytest.warns(RuntimeWarning, match="CUDA devices") as said, adapter.captured(model):
        for _ in range(2):
            assert torch.equal(generate(model, prompt("cpu")), expected)
    assert len(said) == 1


def test_blocks_of_another_kind(llama):
    with captured(llama), pytest.raises(ValueError, match="compile=False"):  # noqa: SIM117
        with captured(llama, compile=True):
            pass
    assert "forward" not in llama.__dict__


@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
def test_weights_go_with_the_model(place, compiler, compile):
    """At once: what waits for the garbage collector is not there for the next model."""
    model = models.model_of("llama", place)
    weight = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    gc.collect()
    gc.disable()
    try:
        with captured(model, compile) as block:
            generate(model, prompt(place))
        assert block.n_replays == 23
        compiler.graphs.clear()
        del model, block
        assert weight() is None
    finally:
        gc.enable()


# ---- compiled ---------------------------------------------------------------------


def test_a_twin_is_the_models_own(llama):
    """It calls no forward of the model's modules, whatever was set on them."""
    called = []

    def backend(graph, inputs):
        called.append(graph)
        return graph.forward

    expected = generate(llama, prompt(llama.device))
    llama.model.layers[1].compile(backend=backend)
    with captured(llama) as block:
        result = generate(llama, prompt(llama.device), max_new_tokens=24)
    assert torch.equal(result, expected)
    assert block.n_replays == 23
    assert called  # by the prefill


@pytest.mark.frameworks
def test_compiled(model):
    expected = generate(model, prompt(model.device, batch=2), max_new_tokens=40)
    with captured(model, compile=True) as block:
        result = generate(model, prompt(model.device, batch=2), max_new_tokens=40)
    assert torch.equal(result, expected)
    assert block.n_replays == 39
    assert not block.reasons


class Compiler:
    """What torch.compile hands to its backend, which here runs it as it is."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def n_graphs(self):
        """(of layers, of other modules); of layers are those that append."""
        n = sum(
            any("append_and_attend" in str(node.target) for node in graph.graph.nodes)
            for graph in self.graphs
        )
        return n, len(self.graphs) - n


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, **options: compile(fn, backend=compiler, **options)
    )
    return compiler


def deep_model(kind, place, n_layers=32, seed=0):
    config = models.config_of(kind)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        kinds = config.layer_types[:2]
        config.layer_types = [kinds[i % len(kinds)] for i in range(n_layers)]
    config.initializer_range = 0.1
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).to(place).eval()


# Of layers, and of the last norm and the rotary embedding, of which Gemma 3 has two. What tells
# its two kinds of layers apart is the operator's and not in the graph.
N_GRAPHS = {"llama": (1, 2), "qwen2": (1, 2), "qwen3": (1, 2), "mistral": (1, 2), "gemma3": (1, 3)}


@pytest.mark.parametrize(
    "kind",
    [k if k in OF_MAKE_TEST else pytest.param(k, marks=pytest.mark.frameworks) for k in MODELS],
)
def test_layers_of_one_kind_are_compiled_once(place, compiler, kind):
    """32 of them; and no other bucket, length, padding or cache compiles anything again. That
    nothing is left to eager code inside of them fullgraph sees to."""
    model = deep_model(kind, place)
    expected = generate(model, prompt(place, batch=2), max_new_tokens=40)
    with captured(model, compile=True) as block:
        for _ in range(2):
            result = generate(model, prompt(place, batch=2), max_new_tokens=40)
            assert torch.equal(result, expected)
        assert compiler.n_graphs() == N_GRAPHS[kind]
        assert block.n_captures > 2
        generate(model, prompt(place, batch=2, length=100), max_new_tokens=10)
        generate(model, prompt(place, batch=2), VMMCache(model.config, layout="lane"))
        input_ids = prompt(place, batch=3)
        mask = padded(input_ids)
        with torch.inference_mode():
            generate(model, input_ids[:2], mask=mask[:2])
        assert compiler.n_graphs() == N_GRAPHS[kind]
        generate(model, input_ids, mask=mask)
        assert compiler.n_graphs() == tuple(2 * n for n in N_GRAPHS[kind])
        generate(model, prompt(place, batch=2))
        assert compiler.n_graphs() == tuple(2 * n for n in N_GRAPHS[kind])
        assert not block.reasons


def test_many_batch_sizes_stay_compiled(place, compiler, monkeypatch):
    """More than torch.compile's recompile_limit, over two models of one class."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    n = 4
    for seed in range(2):
        model = models.model_of("llama", place, seed)
        with captured(model, compile=True) as block:
            for batch in range(1, n + 1):
                input_ids = prompt(place, batch=batch)
                expected = generate_without(model, input_ids)
                assert torch.equal(generate(model, input_ids), expected)
                assert compiler.n_graphs()[0] == seed * n + batch
        assert block.n_replays == 23 * n
        assert not block.reasons


def test_another_number_of_chunks_is_compiled_anew(monkeypatch, compiler):
    """It is a shape: padding may lead to another backend, which cuts the keys in another way."""
    model = models.model_of("llama", "cpu")

    def chunks_for(backend, case, n_processors):
        return 4 if case.is_cut else 2

    monkeypatch.setattr(_attention, "chunks_for", chunks_for)
    input_ids = prompt("cpu", batch=2)
    mask = padded(input_ids)
    with captured(model, compile=True) as block:
        for given, n in ((None, 1), (mask, 2), (None, 2)):
            expected = generate_without(model, input_ids, given)
            assert torch.equal(generate(model, input_ids, mask=given), expected)
            assert compiler.n_graphs()[0] == n
    assert block.n_replays == 3 * 23


def test_threads_compile(place, compiler):
    """Two over one model with different batch sizes, one over another."""
    first, other = models.model_of("llama", place), models.model_of("gemma3", place)
    work = [(first, 1), (first, 2), (other, 2)]
    expected = [generate(model, prompt(place, batch)) for model, batch in work]
    results = [[] for _ in work]

    def answer(i):
        model, batch = work[i]
        with captured(model, compile=True):
            for _ in range(2):
                results[i].append(generate(model, prompt(place, batch)))

    in_threads(answer, 3)
    for of_thread, right in zip(results, expected, strict=True):
        assert len(of_thread) == 2
        assert all(torch.equal(tokens, right) for tokens in of_thread)
    assert compiler.n_graphs() == (2 + 1, 4 + 3)


def test_what_cannot_be_compiled_is_captured_as_it_is(place, monkeypatch):
    def breaks(*args, **kwargs):
        torch._dynamo.graph_break()
        return merge(*args, **kwargs)

    merge = _attention.merge
    monkeypatch.setattr(_attention, "merge", breaks)
    model = models.model_of("llama", place)
    expected = generate(model, prompt(place))
    with pytest.warns(RuntimeWarning, match="captured uncompiled") as said:  # noqa: SIM117
        with captured(model, compile=True) as block:
            for _ in range(2):
                assert torch.equal(generate(model, prompt(place)), expected)
    assert len([w for w in said if "uncompiled" in str(w.message)]) == len(block.reasons) == 1
    assert "torch.compile failed" in block.reasons.pop()
    assert block.n_replays == 2 * 23


# ---- attention --------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("n_chunks", [1, 2, 4, 8])
def test_chunks_against_sdpa(window, n_chunks):
    """Lengths as data, memory past them that must not be read, empty chunks."""
    torch.manual_seed(0)
    batch, heads, kv_heads, dim, capacity = 3, 4, 2, 16, 64
    keys, values = (torch.randn(batch, kv_heads, capacity, dim) for _ in range(2))
    query = torch.randn(batch, heads, 1, dim)
    keys[:, :, 21:] = values[:, :, 21:] = torch.nan
    first = torch.tensor([0, 3, 19], dtype=torch.int32)
    cursor = torch.full((3,), 20, dtype=torch.int32)
    plan = _attention.plan(cursor, first, window, n_chunks)
    reads = _attention.Reads(*plan, -(-32 // n_chunks), keys, "lane")
    prepared = _attention.Plain.prepare(reads)
    parts, lse = _attention.Plain.attend(query, keys, values, reads, prepared, 0.25)
    out = _attention.merge(parts, lse)
    for b in range(batch):
        begin = max(first[b].item(), 21 - window if window else 0)
        k, v = (x[b, :, begin:21].repeat_interleave(2, 0) for x in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(query[b], k, v, scale=0.25)
        torch.testing.assert_close(out[b], expected[:, 0])


def varlen_by_definition(queries, keys, values, begins_q, begins_k, *_, scale, seqused_k):
    """What torch's operator does for sequences of one query, on CUDA only: (sequences, heads,
    dim) and the logsumexp, (heads, sequences), which is +inf where nothing is read."""
    assert begins_q.tolist() == list(range(len(queries) + 1))
    assert len(begins_k) == len(begins_q)
    assert len(seqused_k) == len(queries)
    repeats = queries.shape[1] // keys.shape[1]
    out, lse = torch.zeros_like(queries), torch.full(queries.shape[:2], torch.inf)
    for i, (begin, n) in enumerate(zip(begins_k.tolist(), seqused_k.tolist(), strict=False)):
        if n:
            k, v = (x[begin : begin + n].repeat_interleave(repeats, 1) for x in (keys, values))
            scores = torch.einsum("hd,shd->hs", queries[i], k) * scale
            lse[i] = scores.logsumexp(-1)
            out[i] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    return out, lse.T, None, None, None


@pytest.mark.parametrize("layout", ["seq", "lane"])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("n_chunks", [1, 4])
def test_what_torchs_operator_is_given(monkeypatch, layout, heads, window, n_chunks):
    monkeypatch.setattr(_attention, "_VARLEN", varlen_by_definition)
    torch.manual_seed(0)
    batch, kv_heads, dim, n_rows = 3, 2, 8, 21
    states = torch.empty(batch, kv_heads, 0, dim)
    pair = KVPair.reserve(states, states, 5000, layout, None)
    pair.append(*torch.randn(2, batch, kv_heads, n_rows, dim))
    query = torch.randn(batch, heads, 1, dim)
    first = torch.tensor([2] if layout == "seq" else [0, 5, 20], dtype=torch.int32)
    plan = _attention.plan(torch.full_like(first, n_rows - 1), first, window, n_chunks)
    reads = _attention.Reads(*plan, -(-32 // n_chunks), pair.reserved[0], layout)
    results = []
    for backend in (_attention.Varlen, _attention.Plain):
        parts, lse = backend.attend(query, *pair.reserved, reads, backend.prepare(reads), 0.3)
        assert parts.shape == (batch, n_chunks, heads, dim)
        assert lse is None or lse.shape == (batch, heads, n_chunks)
        results.append(_attention.merge(parts, lse))
    torch.testing.assert_close(*results)


@pytest.fixture
def cuda():
    skip_place("cuda")
    return torch.device("cuda:0")


def test_replays_on_several_streams_take_turns(cuda):
    """Each on another stream than the one before, which is late, and no event of ours."""
    model = models.model_of("llama", cuda)
    ids = prompt(cuda, length=60)
    theirs, _ = forced_logits(model, ids, None, 12)
    streams = [torch.cuda.Stream() for _ in range(3)]
    logits = []
    with torch.no_grad(), captured(model) as block:
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], past_key_values=cache)
        torch.cuda.synchronize()
        for i in range(12, 60):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(1_000_000)
                step = model(ids[:, i : i + 1], past_key_values=cache)
                logits.append(step.logits[:, -1].float())
        torch.cuda.synchronize()
    assert block.n_replays == 48
    torch.testing.assert_close(torch.stack(logits), theirs[1:], rtol=1e-4, atol=2e-4)


def test_buffers_that_are_freed_under_a_replay(cuda):
    """Their memory goes to nobody before it is over, also where it is on another stream."""
    model = models.model_of("llama", cuda)
    ids = prompt(cuda, length=20)
    theirs, _ = forced_logits(model, ids, None, 18)
    late = torch.cuda.Stream()
    with torch.no_grad():
        with captured(model) as block:
            cache = DynamicCache(config=model.config)
            model(ids[:, :18], past_key_values=cache)
            model(ids[:, 18:19], past_key_values=cache)
            torch.cuda.synchronize()
            with torch.cuda.stream(late):
                torch.cuda._sleep(200_000_000)
                ours = model(ids[:, 19:20], past_key_values=cache).logits[:, -1].float()
            assert block.n_replays == 2
            del cache
            gc.collect()
        others = [torch.full((1, 1), 7, device=cuda) for _ in range(256)]
        torch.cuda.synchronize()
    assert all(other.item() == 7 for other in others)
    torch.testing.assert_close(ours, theirs[2], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("layout", ["seq", "lane"])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("n_chunks", [1, 8])
def test_flash_attention_against_plain(cuda, dim, layout, kv_heads, window, n_chunks):
    """torch's operator over reservations that are mapped for a part, at every kind of length."""
    torch.manual_seed(0)
    batch, heads, most = 3, 8, 2048
    pair = KVPair.reserve(
        *[torch.empty(batch, kv_heads, 0, dim, dtype=torch.bfloat16, device=cuda)] * 2,
        65536,
        layout,
        None,
    )
    for length in (1, 7, 63, 64, 65, 255, 1023, 1500):
        new = torch.randn(
            2, batch, kv_heads, length - pair.length, dim, dtype=torch.bfloat16, device=cuda
        )
        pair.append(*new)
        query = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device=cuda)
        pads = [0] if layout == "seq" else [0, min(5, length - 1), length - 1]
        first = torch.tensor(pads, dtype=torch.int32, device=cuda)
        cursor = torch.full_like(first, length - 1)
        plan = _attention.plan(cursor, first, window, n_chunks)
        whole = pair.reserved
        reads = _attention.Reads(*plan, -(-most // n_chunks), whole[0], layout)
        results = [
            _attention.merge(
                *backend.attend(query, *whole, reads, backend.prepare(reads), dim**-0.5)
            ).float()
            for backend in (_attention.Varlen, _attention.Plain)
        ]
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", [*MODELS, "llama-mha"])
def test_logits_in_bfloat16(cuda, kind, masked):
    """What users run: flash attention under capture, through growths of every tensor, no further
    from the same weights in float32 than DynamicCache is in bfloat16."""
    config = models.config_of(kind.removesuffix("-mha"))
    config.hidden_size, config.head_dim = 256, 64
    config.max_position_embeddings = 4096
    config.initializer_range = 0.1
    if kind == "llama-mha":
        config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to(cuda).eval()
    ids = prompt(cuda, batch=48, length=700)
    mask = padded(ids) if masked else None
    theirs, _ = forced_logits(model, ids, mask, 40)
    with captured(model) as block:
        ours, cache = forced_logits(model, ids, mask, 40)
    assert block.n_replays == 660
    assert not block.reasons
    full = [layer for layer in cache.layers if layer.window is None]
    assert all(layer.key_tensor.stats()["block_count"] > 1 for layer in full)
    true, _ = forced_logits(model.float(), ids, mask, 40)
    apart, allowed = (ours - true).abs(), (theirs - true).abs()
    assert apart.max().item() < 1.5 * allowed.max().item()
    assert apart.square().mean().sqrt().item() < 1.2 * allowed.square().mean().sqrt().item()


def test_an_empty_chunk_says_inf_in_flash_attention():
    parts = torch.stack([torch.ones(1, 4, 8), torch.full((1, 4, 8), 7.0)], dim=1)
    lse = torch.zeros(1, 4, 2)
    lse[:, :, 1] = torch.inf
    assert torch.equal(_attention.merge(parts, lse), torch.ones(1, 4, 8))


def case(**changes):
    of_llama = {
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "batch": 8,
        "heads": 32,
        "kv_heads": 8,
        "dim": 128,
        "layout": "lane",
        "is_cut": False,
        "lane_rows": 131_072,
    }
    return _attention.Case(**{**of_llama, **changes})


def test_backends_in_order(monkeypatch):
    installed = {"flash_attn", "flashinfer.decode"}
    monkeypatch.setattr(_attention, "_function", lambda module, name: module in installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_attention, "_is_right", lambda backend, case: True)
    assert _attention.choose(case()) is _attention.FlashAttn
    installed.remove("flash_attn")
    assert _attention.choose(case()) is _attention.FlashInfer
    assert _attention.choose(case(is_cut=True)) is _attention.Varlen
    assert _attention.choose(case(layout="seq")) is _attention.Varlen
    installed.clear()
    assert _attention.choose(case()) is _attention.Varlen
    assert _attention.choose(case(lane_rows=0)) is _attention.Plain
    assert _attention.choose(case(layout="seq", lane_rows=0)) is _attention.Varlen
    assert _attention.choose(case(dtype=torch.float32)) is _attention.Plain
    assert _attention.choose(case(dim=320)) is _attention.Plain
    assert _attention.choose(case(device=torch.device("cpu"))) is _attention.Plain


def flash_attn_by_definition(q, k, v, cache_seqlens, cache_leftpad, softmax_scale):
    """flash_attn_with_kvcache() of one query for each sequence, as flash-attn documents it."""
    repeats = q.shape[2] // k.shape[2]
    out = torch.empty_like(q)
    for i, (first, end) in enumerate(zip(cache_leftpad, cache_seqlens, strict=True)):
        keys, values = (x[i, first:end].float().repeat_interleave(repeats, 1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", q[i, 0].float(), keys) * softmax_scale
        out[i, 0] = torch.einsum("hs,shd->hd", scores.softmax(-1), values).to(out.dtype)
    return out


def flashinfer_by_definition(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale, kv_layout
):
    """trtllm_batch_decode_with_kv_cache() as FlashInfer documents it."""
    assert kv_layout == "NHD"
    k, v = (pages[block_tables.long()].flatten(1, 2) for pages in kv_cache)
    assert k.shape[1] >= max_seq_len >= max(seq_lens)
    zero = torch.zeros_like(seq_lens)
    return flash_attn_by_definition(query[:, None], k, v, seq_lens, zero, bmm1_scale)[:, 0]


PACKAGES = {
    _attention.FlashAttn: flash_attn_by_definition,
    _attention.FlashInfer: flashinfer_by_definition,
}


@pytest.fixture
def tried(monkeypatch):
    """tried(backend, kernel, **changes): is a backend with that kernel right, on the CPU?"""
    monkeypatch.setattr(_attention, "_workspace", lambda device: torch.zeros(1))

    def is_right(backend, kernel, **changes):
        monkeypatch.setattr(_attention, "_function", lambda module, name: kernel)
        _attention._is_right.cache_clear()
        on_cpu = case(device=torch.device("cpu"), heads=8, kv_heads=2, dim=16, **changes)
        return _attention._is_right(backend, _attention._like(on_cpu))

    yield is_right
    _attention._is_right.cache_clear()


@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_packages_kernels_are_given(tried, batch):
    for is_cut in (False, True):
        for layout in ("seq", "lane"):
            assert tried(
                _attention.FlashAttn,
                flash_attn_by_definition,
                batch=batch,
                layout=layout,
                is_cut=is_cut,
            )
    assert tried(_attention.FlashInfer, flashinfer_by_definition, batch=batch)


@pytest.mark.parametrize("backend", PACKAGES)
def test_a_package_that_is_wrong_is_not_used(tried, backend):
    def wrong(*arguments, **named):
        return PACKAGES[backend](*arguments, **named) * 1.1

    def not_finite(*arguments, **named):
        return PACKAGES[backend](*arguments, **named) * torch.nan

    def of_another_shape(*arguments, **named):
        return PACKAGES[backend](*arguments, **named)[..., :8]

    def of_another_version(query, cache):
        raise AssertionError

    state = torch.get_rng_state()
    for kernel, says in (
        (wrong, r"0\.09\d* of its largest result apart"),
        (not_finite, "inf of its largest result apart"),
        (of_another_shape, "shape"),
        (of_another_version, "TypeError"),
    ):
        with pytest.warns(UserWarning, match=f"{backend.name} is installed and .*{says}"):
            assert not tried(backend, kernel)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_package_is_tried_once_and_said_to_be_wrong_once(tried):
    with pytest.warns(UserWarning, match="flash-attn"):
        assert not tried(_attention.FlashAttn, lambda *arguments, **named: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        like = case(device=torch.device("cpu"), heads=8, kv_heads=2, dim=16, batch=2)
        assert not _attention._is_right(_attention.FlashAttn, _attention._like(like))


def test_chunks_fill_the_gpu():
    for batch, heads, kv_heads, expected in [
        (1, 32, 32, 8),
        (2, 32, 32, 4),
        (8, 32, 32, 1),
        (1, 32, 8, 1),
    ]:
        of = case(batch=batch, heads=heads, kv_heads=kv_heads)
        assert _attention.chunks_for(_attention.Varlen, of, 132) == expected
    assert _attention.chunks_for(_attention.FlashAttn, case(kv_heads=32), 132) == 1
