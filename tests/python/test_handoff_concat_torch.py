"""pyvmm.torch.cat and inplace_cat: torch's own values always, appends where it can be."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import linecache
import os
import pickle
import sys
import threading
import weakref

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import concat_programs  # noqa: E402
import pyvmm  # noqa: E402
import pyvmm.torch  # noqa: E402
from concat_arrays import Uncollected, counted, in_use  # noqa: E402

CAT = torch.cat
VIEW = torch.Tensor.view


def devices():
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        return ["cpu"]  # the simulated driver's memory is not a GPU's
    return ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=devices())
def place(request):
    return request.param


@pytest.fixture(autouse=True)
def stats():
    pyvmm.concat_stats(reset=True)
    yield counted
    assert torch.cat is CAT and torch.Tensor.view is VIEW


def device_of(place):
    return "host" if place == "cpu" else place


def same(result, expected):
    assert type(result) is torch.Tensor and result.dtype == expected.dtype
    assert result.shape == expected.shape and result.device == expected.device
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_a_growing_cache(place, stats, dim, dtype):
    shape = [2, 3, 2, 4]
    cache = expected = torch.randn(shape, device=place).to(dtype)
    kept = []
    for n_rows in (1, 3, 0, 1):
        shape[dim] = n_rows
        new = torch.randn(shape, device=place).to(dtype)
        cache, expected = pyvmm.torch.cat((cache, new), dim), CAT((expected, new), dim)
        kept.append((cache, expected))
    for result, was in kept:
        same(result, was)
    assert stats() == {"taken_in": 1, "appended": 3}
    same(pyvmm.concat(cache, cache, dim), CAT((expected, expected), dim))


@pytest.mark.parametrize("layout", ["seq", "lane", "c"])
def test_the_rows_of_a_tensor(place, stats, layout):
    t = pyvmm.empty(
        (2, 0, 3, 4), axis=1, capacity=50, device=device_of(place), layout=layout, dtype="float16"
    )
    cache = torch.from_dlpack(t.reserved())[
        :, :0
    ]  # of no rows, torch.from_dlpack(t) has no address
    expected = torch.empty((2, 0, 3, 4), dtype=torch.float16, device=place)
    for n_rows in (1, 4, 2):
        new = torch.randn((2, n_rows, 3, 4), dtype=torch.float16, device=place)
        cache, expected = pyvmm.torch.cat([cache, new], dim=1), CAT([expected, new], dim=1)
        same(cache, expected)
    same(torch.from_dlpack(t), expected)
    # A tensor over fewer rows of its own: its storage ends before the result does.
    part = torch.from_dlpack(t)
    same(pyvmm.torch.cat((part, part[:, :2]), 1), CAT((expected, expected[:, :2]), 1))
    assert stats() == {"appended": 4}
    assert t.length == 9


def test_views_of_results(place, stats):
    cache = expected = torch.randn(2, 3, 5, 4, device=place)
    cache = pyvmm.torch.cat((cache, cache), 1)
    expected = CAT((expected, expected), 1)
    for view in (
        lambda x: x.detach(),
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x[:, :4],
        lambda x: x[:, 2:],
        lambda x: x[:1],
        lambda x: x[..., ::2],
        lambda x: x.flip(1),
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.data,
        lambda x: x.unflatten(3, (2, 2)).flatten(3),
    ):
        same(
            pyvmm.torch.cat((view(cache), view(cache)), 1),
            CAT((view(expected), view(expected)), 1),
        )
        same(cache, expected)
    assert stats()["appended"] >= 1 and stats()["forked"] >= 1


def test_dropping_every_result_drops_the_memory(place):
    device = device_of(place)
    before = in_use(device)
    with Uncollected():
        start = torch.randn(2, 3, 4, device=place)
        caches = [start] * 4
        for _ in range(4):
            caches = [pyvmm.torch.cat((cache, cache), 1) for cache in caches]
        kept = caches[0][:, 1:].transpose(0, 1)
        assert in_use(device) > before
        del caches
        assert in_use(device) > before
        del kept
        assert in_use(device) == before


def test_after_the_interpreter_shut_down_nothing_is_said():
    from support import run_python

    run_python(
        """
        import torch, pyvmm.torch
        a = torch.ones(2, 3)
        cache = pyvmm.torch.cat((a, a))
        torch.kept = cache
        """
    )


FALLBACKS = {
    "gradients": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "negated": lambda x: torch._neg_view(x),
    "zero": lambda x: torch._efficientzerotensor(x.shape, device=x.device),
    "other dtype": lambda x: x.double(),
    "one dimension": lambda x: torch.tensor([], device=x.device),
    "scalar": lambda x: torch.tensor(1.0),
    "list": lambda x: [[1.0]],
    "other shape": lambda x: x[:, :3],
}


@pytest.mark.parametrize("kind", FALLBACKS)
@pytest.mark.parametrize("first", [False, True], ids=["new", "cache"])
@pytest.mark.filterwarnings("ignore")
def test_left_to_torch(place, stats, kind, first):
    plain = torch.randn(2, 4, device=place)
    cache = pyvmm.torch.cat((plain, plain))
    other = FALLBACKS[kind](plain)
    operands = (other, plain) if first else (cache, other)
    try:
        expected = CAT(operands)
    except Exception as error:
        with pytest.raises(type(error)):
            pyvmm.torch.cat(operands)
    else:
        result = pyvmm.torch.cat(operands)
        assert result.dtype == expected.dtype and type(result) is type(expected)
        assert result.requires_grad == expected.requires_grad
        if expected.device.type != "meta":
            assert torch.equal(result.to_dense(), expected.to_dense())
    assert stats()["fell_back"] == 1
    same(cache, CAT((plain, plain)))


def test_conjugated_and_negated_views(place, stats):
    z = torch.randn(2, 4, dtype=torch.complex64, device=place)
    cache = pyvmm.torch.cat((z, z))
    for operands in ((cache.conj(), z), (cache, z.conj()), (cache.conj().imag, z.real)):
        same(pyvmm.torch.cat(operands), CAT(operands))
    assert stats() == {"taken_in": 1, "fell_back": 3}


def test_operands_and_arguments(place, stats):
    a = torch.randn(2, 3, device=place)
    out = torch.empty(4, 3, device=place)
    assert pyvmm.torch.cat((a, a), out=out) is out and torch.equal(out, CAT((a, a)))
    same(pyvmm.torch.cat([a]), a)
    same(pyvmm.torch.cat((a, a, a), 1), CAT((a, a, a), 1))
    for wrong in ((a, a), 2), ((a, a), -3), ((), 0), (a, 0):
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)):
            CAT(*wrong)
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)):
            pyvmm.torch.cat(*wrong)
    assert stats() == {"fell_back": 7}


def test_transforms_and_modes_of_torch(stats):
    from torch._subclasses.fake_tensor import FakeTensorMode

    a = torch.randn(2, 3)
    cache = pyvmm.torch.cat((a, a))
    double = functools.partial(pyvmm.torch.cat, dim=0)
    same(torch.vmap(lambda x: double((x, x)))(a), CAT((a, a), 1))
    same(torch.func.grad(lambda x: double((x, x)).sum())(a), torch.full((2, 3), 2.0))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
        tangent = torch.autograd.forward_ad.unpack_dual(double((cache, dual))).tangent
        assert tangent.sum() == 6
    with FakeTensorMode():
        fake = torch.empty(2, 3)
        assert double((fake, fake)).shape == (4, 3)
    traced = torch.jit.trace(lambda x, y: double((x, y)), (a, a), check_trace=False)
    same(traced(a, 2 * a), CAT((a, 2 * a)))
    assert stats() == {"taken_in": 1, "fell_back": pyvmm.concat_stats()["fell_back"]}


def test_a_mode_of_functions_sees_the_concatenate(stats):
    from torch.overrides import TorchFunctionMode

    class Seen(TorchFunctionMode):
        functions: list = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.functions.append(function)
            return function(*args, **(kwargs or {}))

    a = torch.randn(2, 3)
    cache = pyvmm.torch.cat((a, a))
    with Seen() as seen:
        same(pyvmm.torch.cat((cache, a)), CAT((cache, a)))
    assert CAT in seen.functions
    with torch.device("cpu"):  # a mode, too, and none that looks
        same(pyvmm.torch.cat((cache, a)), CAT((cache, a)))
    assert stats() == {"taken_in": 1, "fell_back": 1, "appended": 1}


def test_gradients_flow_through_what_is_left_to_torch():
    a = torch.randn(2, 3, requires_grad=True)
    cache = pyvmm.torch.cat((torch.ones(2, 3), torch.ones(2, 3)))
    pyvmm.torch.cat((cache, a)).sum().backward()
    assert torch.equal(a.grad, torch.ones(2, 3))


def test_compiled_code_sees_torchs_own(stats):
    a = torch.randn(2, 3)

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def grow(cache, new):
        return pyvmm.torch.cat((cache, new)) * 2

    # The code that backend="eager" makes would call torch.cat anew, and append.
    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def grow_any(cache, new):
        return torch.cat((torch.cat((cache, new)), new)) * 2

    same(grow(a, a), CAT((a, a)) * 2)
    with pyvmm.torch.inplace_cat() as turned:
        same(grow_any(a, a), CAT((a, a, a)) * 2)
    assert turned.turned == 0 and stats() == {}


@pytest.mark.parametrize("outside", [False, True])
def test_inference_mode(place, stats, outside):
    a = torch.randn(2, 3, device=place)
    cache = pyvmm.torch.cat((a, a)) if outside else a
    with torch.inference_mode():
        new = torch.randn(2, 3, device=place)
        cache = pyvmm.torch.cat((pyvmm.torch.cat((cache, new)), new))
    same(pyvmm.torch.cat((cache, a)), CAT((cache, a)))
    assert stats()["taken_in"] == 1 and "fell_back" not in stats()


def test_copies_of_results_are_of_their_elements(place):
    a = torch.randn(2, 3, 4, device=place)
    result = pyvmm.torch.cat((a, a), 1)
    n_bytes = result.numel() * 4
    copies = copy.deepcopy({"k": result, "again": result})
    assert copies["k"] is copies["again"]
    same(copies["k"], result)
    assert copies["k"].untyped_storage().nbytes() == n_bytes
    data = pickle.dumps(result)
    assert len(data) < n_bytes + 2000
    same(pickle.loads(data), result)
    file = io.BytesIO()
    torch.save({"cache": result}, file)
    file.seek(0)
    same(torch.load(file)["cache"], result)
    # All else of a tensor comes along, and a result of a computation is refused, as by torch.
    result.requires_grad_().note = ["kept"]
    (result * 2).sum().backward()
    for copied in copy.deepcopy(result), pickle.loads(pickle.dumps(result)):
        same(copied, result)
        assert copied.is_leaf and copied.requires_grad and copied.note == ["kept"]
    same(copy.deepcopy(result).grad, result.grad)
    with pytest.raises(RuntimeError, match="leaves"):
        copy.deepcopy(result[0])
    # What is not ours goes its own way, storages shared as ever.
    pair = copy.deepcopy([a, a[0]])
    assert pair[0].data_ptr() == pair[1].data_ptr()


@settings(deadline=None, max_examples=50)
@given(
    program=concat_programs.PROGRAMS,
    capacity=st.sampled_from([1, 7, None]),
    layout=st.sampled_from(["seq", "lane", "c"]),
    inside=st.booleans(),
)
def test_invariant_10_of_any_program(program, capacity, layout, inside):
    before = in_use("host")
    parameters = {"capacity": capacity, "layout": layout}

    def concat(a, b, axis):
        return torch.cat((a, b), axis) if inside else pyvmm.concat(a, b, axis, **parameters)

    with Uncollected():
        with pyvmm.torch.inplace_cat(**parameters) if inside else contextlib.nullcontext():
            concat_programs.run(
                program,
                concat,
                make=torch.from_numpy,
                clone=torch.clone,
                value=lambda x: x.numpy(),
            )
        assert in_use("host") == before


# ---- inside any model ---------------------------------------------------------------


class Attention(torch.nn.Module):
    """Attends to all tokens so far, which it is given and gives back as a tuple."""

    def __init__(self, n_heads, dim):
        super().__init__()
        self.n_heads, self.dim = n_heads, dim
        self.qkv = torch.nn.Linear(n_heads * dim, 3 * n_heads * dim)
        self.out = torch.nn.Linear(n_heads * dim, n_heads * dim)

    def forward(self, x, past):
        batch, n_tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, n_tokens, 3, self.n_heads, self.dim).unbind(2)
        if past is not None:
            k = torch.cat((past[0], k), dim=1)
            v = torch.cat([past[1], v], dim=-3)
            # A model that knows torch.cat's results to be contiguous.
            assert k.view(-1, self.dim).shape[0] == k.numel() // self.dim
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=past is None,
        )
        return self.out(attended.transpose(1, 2).reshape(batch, n_tokens, -1)), (k, v)


class Model(torch.nn.Module):
    def __init__(self, n_layers=3, n_heads=2, dim=8):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention(n_heads, dim) for _ in range(n_layers))

    def forward(self, x, past):
        past = past or [None] * len(self.layers)
        presents = []
        for layer, states in zip(self.layers, past, strict=True):
            # As rotary embeddings do: a concatenation that does not grow.
            a, b = x.chunk(2, -1)
            x = torch.cat((b, a), dim=-1)
            y, present = layer(x, states)
            x = x + y
            presents.append(present)
        return x, presents


def decode(model, prompt, n_steps):
    answers = []
    with torch.no_grad():
        x, past = model(prompt, None)
        for _ in range(n_steps):
            x, past = model(x[:, -1:], past)
            answers.append(x)
    return torch.cat(answers, 1)


def test_a_model_with_tuples_for_a_cache(place):
    torch.manual_seed(3)
    model = Model().to(place)
    prompt = torch.randn(2, 5, 16, device=place)
    expected = decode(model, prompt, 20)
    before = in_use(device_of(place))
    with Uncollected():
        with pyvmm.torch.inplace_cat() as turned:
            result = decode(model, prompt, 20)
        assert in_use(device_of(place)) == before
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    # Of each layer's K and V all but the first, which nothing had returned before.
    assert turned.turned == 3 * 2 * 19
    assert turned.left == {"not growing": 3 * 21 + 3 * 2, "number of operands": 1}
    assert turned.reshaped > 0
    # Laid out as it is, memory is contiguous for a batch of one.
    with pyvmm.torch.inplace_cat(layout="seq") as turned:
        decode(model, prompt[:1], 5)
    assert turned.turned == 3 * 2 * 4 and turned.reshaped == 0


def test_blocks_nest_and_are_of_one_thread():
    a = torch.ones(2, 3)

    def grow():
        cache = a
        for _ in range(4):
            cache = torch.cat((cache, a))
        same(cache, CAT([a] * 5))

    inside, done = threading.Event(), threading.Event()

    def elsewhere():
        inside.wait()
        grow()
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with pyvmm.torch.inplace_cat() as outer:
        inside.set()
        assert done.wait(60)
        assert outer.turned == 0
        with pyvmm.torch.inplace_cat() as inner:
            grow()
        assert (inner.turned, outer.turned) == (3, 0)
        grow()
        assert (inner.turned, outer.turned) == (3, 3)
    thread.join()
    grow()
    assert (inner.turned, outer.turned) == (3, 3)
    assert "turned 3" in repr(outer)


def test_a_block_that_another_thread_ends():
    def generate():
        with pyvmm.torch.inplace_cat():
            yield

    generator = generate()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert torch.cat is CAT
    with pyvmm.torch.inplace_cat() as turned:
        torch.cat((torch.cat((torch.ones(2), torch.ones(1))), torch.ones(1)))
    assert turned.turned == 1


def test_an_exception_puts_everything_back():
    with pytest.raises(KeyError):
        with pyvmm.torch.inplace_cat():
            with contextlib.suppress(ValueError):
                with pyvmm.torch.inplace_cat():
                    raise ValueError
            assert torch.cat is not CAT
            raise KeyError
    assert torch.cat is CAT and torch.concat is not torch.cat
    with pyvmm.torch.inplace_cat():
        for wrong in ((), {"dim": 0}), (((),), {}), ((3,), {}), (([1], 2, 3, 4, 5), {}):
            with pytest.raises((TypeError, RuntimeError, ValueError)):
                torch.cat(*wrong[0], **wrong[1])


def test_interrupts_leave_the_next_block_as_it_should_be():
    """At each line of a block's beginning and end, what Ctrl-C does there."""
    code = pyvmm._inplace.Switch.block.__wrapped__.__code__
    a = torch.ones(2)

    def run(interrupted):
        n_lines = 0

        def trace(frame, event, argument):
            nonlocal n_lines
            if frame.f_code.co_filename != code.co_filename:
                return None
            # Between a lock and its block a signal is never raised, but a trace would be.
            is_with = linecache.getline(code.co_filename, frame.f_lineno).lstrip()[:5] == "with "
            if event == "line" and not is_with:
                n_lines += 1
                if n_lines == interrupted:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with pyvmm.torch.inplace_cat():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    for line in range(1, 200):
        was_interrupted = run(line)
        pyvmm.torch._SWITCH._thread.blocks.clear()  # where it never came to its end
        with pyvmm.torch.inplace_cat() as turned:
            torch.cat((torch.cat((a, a)), a))
        assert turned.turned == 1, line
        assert torch.cat is CAT and "view" not in vars(torch.Tensor), line
        if not was_interrupted:
            return
    raise AssertionError("it never ran through")


def test_what_others_put_there_meanwhile_stays(monkeypatch):
    assert "view" not in vars(torch.Tensor)
    calls = []
    with pyvmm.torch.inplace_cat() as turned:
        inner = torch.cat

        def counting(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        monkeypatch.setattr(torch, "cat", counting)
        a = torch.ones(2)
        torch.cat((torch.cat((a, a)), a))
        assert len(calls) == 2 and turned.turned == 1
    assert torch.cat is counting and "view" not in vars(torch.Tensor)
    same(torch.cat((a, a)), CAT((a, a)))
    with pyvmm.torch.inplace_cat() as turned:
        torch.cat((torch.cat((a, a)), a))
        assert turned.turned == 1
    assert torch.cat is counting and len(calls) == 4
    monkeypatch.undo()
    # Whoever puts back what was there inside the block puts back what does nothing.
    assert torch.cat is inner
    same(torch.cat((a, a)), CAT((a, a)))
    torch.cat = CAT


def test_every_name_and_spelling_of_it():
    a = torch.ones(2, 3)
    with pyvmm.torch.inplace_cat() as turned:
        for cat in (torch.cat, torch.concat, torch.concatenate):
            for arguments in ({"dim": 1}, {"axis": 1}, {"dim": -1}):
                cache = cat((a, a), **arguments)
                cache = cat([cache, a], **arguments)
                same(cat(tensors=(cache, a), **arguments), CAT([a] * 4, 1))
    assert turned.turned == 3 * 3 * 2


def test_only_what_a_concatenate_returned_grows():
    a = torch.ones(2, 3)
    t = pyvmm.empty((0, 3), axis=0, capacity=10, device="host")
    t.append(a)
    with pyvmm.torch.inplace_cat() as turned:
        torch.cat((torch.from_dlpack(t), a))  # somebody's tensor, whose length is theirs
        torch.cat((a, a))
        cache = torch.cat((a, a))
        torch.cat((cache, cache), 1)  # along another axis
        torch.cat((a, cache))
    assert turned.turned == 0 and t.length == 2
    assert turned.left == {"not growing": 5}
    same(pyvmm.torch.cat((torch.from_dlpack(t[:0]), a)), a)


def test_memory_that_is_not_to_be_had_is_torchs_own():
    a = torch.ones(1, 1 << 20)
    with pyvmm.Pool("host", max_bytes="8MiB") as pool:
        with pyvmm.torch.inplace_cat(pool=pool) as turned:
            cache = a
            for _ in range(5):
                cache = torch.cat((cache, a))
            same(cache, CAT([a] * 6))
        assert turned.left["VMM_ERR_OUT_OF_MEMORY"] > 0
        del cache


def test_what_was_remembered_is_not_kept_alive():
    a = torch.ones(2, 3)
    with pyvmm.torch.inplace_cat():
        result = torch.cat((a, a))
        watched = weakref.ref(result)
        del result
        assert watched() is None


def test_view_fails_as_ever_where_it_is_not_ours():
    strided = torch.ones(4, 4).T
    with pyvmm.torch.inplace_cat() as turned:
        with pytest.raises(RuntimeError):
            strided.view(-1)
        cache = torch.cat((torch.cat((torch.ones(2, 2, 3),) * 2, 1), torch.ones(2, 1, 3)), 1)
        assert cache.view(-1).shape == (30,) and cache.view(size=(5, 6)).shape == (5, 6)
        assert cache.view(torch.int32).dtype == torch.int32
        with pytest.raises(RuntimeError):
            cache.view(7)
    assert turned.reshaped == 2
    with pytest.raises(RuntimeError):
        cache.view(-1)
