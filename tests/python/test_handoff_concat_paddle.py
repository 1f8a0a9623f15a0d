"""pyvmm.paddle: paddle.concat in value, an append where it can be (invariant 10), and tensors
that Paddle may do anything with."""

import contextlib
import copy
import gc
import pickle
import threading
import warnings

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

import concat_programs
from concat_arrays import Uncollected, in_use
from model import pattern

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "No ccache found"
    paddle = pytest.importorskip("paddle", reason="paddle is not installed")

import pyvmm  # noqa: E402
import pyvmm.paddle as vmm_paddle  # noqa: E402
from support import run_python  # noqa: E402

SHAPE = (2, 5, 3, 4)


@pytest.fixture(autouse=True)
def counts():
    """What concat() has done since the test began."""
    pyvmm.concat_stats(reset=True)

    def read():
        stats = pyvmm.concat_stats()
        del stats["copied_bytes"], stats["reasons"]
        return {name: n for name, n in stats.items() if n}

    return read


@pytest.fixture(autouse=True)
def on_the_host():
    paddle.set_device("cpu")


def rows(*shape, dtype="float32", seed=0):
    # Paddle reads NumPy's uint16 as bfloat16.
    return paddle.to_tensor(pattern(shape, "uint16" if dtype == "bfloat16" else dtype, seed))


def raw(x):
    return np.ascontiguousarray(x.clone().numpy()).tobytes()


def check(a, b):
    """Equal in value; a may have strides of its own."""
    assert list(a.shape) == list(b.shape) and a.dtype == b.dtype
    assert raw(a) == raw(b)


# ---- concat -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -2])
def test_invariant_10_a_growing_cache_is_taken_in_once(counts, dtype, axis):
    cache = expected = rows(*SHAPE, dtype=dtype)
    kept = []
    for step, n_rows in enumerate((1, 3, 1, 0, 40, 1)):
        shape = list(SHAPE)
        shape[axis] = n_rows
        new = rows(*shape, dtype=dtype, seed=step)
        kept.append((cache, expected))
        cache = vmm_paddle.concat([cache, new], axis)
        expected = paddle.concat([expected, new], axis)
        check(cache, expected)
    for earlier, was in kept:
        check(earlier, was)
    assert counts() == {"taken_in": 1, "appended": 5}


def test_one_sequence_stays_contiguous():
    cache = vmm_paddle.concat([rows(1, 5, 3, 4), rows(1, 2, 3, 4)], 1)
    assert cache.is_contiguous()


def test_an_older_tensor_forks(counts):
    x, a, b = rows(*SHAPE), rows(2, 1, 3, 4, seed=1), rows(2, 2, 3, 4, seed=2)
    base = vmm_paddle.concat([x, a], 1)
    first, second = vmm_paddle.concat([base, a], 1), vmm_paddle.concat([base, b], 1)
    check(first, paddle.concat([x, a, a], 1))
    check(second, paddle.concat([x, a, b], 1))
    check(vmm_paddle.concat([second[:, :4], b], 1), paddle.concat([x[:, :4], b], 1))
    assert counts() == {"taken_in": 1, "appended": 1, "forked": 2}


def test_a_copy_on_the_way_is_taken_in(counts):
    cache = vmm_paddle.concat([rows(*SHAPE), rows(*SHAPE)], 1)
    for copied in (cache.clone(), paddle.assign(cache), copy.deepcopy(cache)):
        check(
            vmm_paddle.concat([copied, rows(*SHAPE)], 1), paddle.concat([copied, rows(*SHAPE)], 1)
        )
    assert counts() == {"taken_in": 4}


def test_past_the_capacity_it_moves(counts):
    cache = expected = rows(*SHAPE)
    for step in range(20):
        new = rows(2, 1, 3, 4, seed=step)
        cache = vmm_paddle.concat([cache, new], 1, capacity=8)
        expected = paddle.concat([expected, new], 1)
    check(cache, expected)
    assert counts() == {"taken_in": 1, "moved": 2, "appended": 17}


def test_several_are_appended_in_turn(counts):
    parts = [rows(2, n, 3, 4, seed=n) for n in (4, 1, 0, 3)]
    check(vmm_paddle.concat(parts, axis=1), paddle.concat(parts, axis=1))
    check(vmm_paddle.concat(tuple(parts[:2]), 1), paddle.concat(parts[:2], 1))
    check(vmm_paddle.concat(parts[:1], 1), parts[0])
    assert counts() == {"taken_in": 2, "appended": 2}


def left_to_paddle():
    x = rows(*SHAPE)
    wanted = rows(*SHAPE)
    wanted.stop_gradient = False
    parameter = paddle.create_parameter(list(SHAPE), "float32")
    return {
        "gradients": (wanted, x, 1),
        "parameter": (parameter, x, 1),
        "no elements": (rows(2, 5, 0, 4), rows(2, 5, 0, 4), 1),
    }


@pytest.mark.parametrize("case", list(left_to_paddle()))
def test_what_cannot_grow_is_left_to_paddle(counts, case):
    a, b, axis = left_to_paddle()[case]
    result = vmm_paddle.concat([a, b], axis)
    check(result.detach(), paddle.concat([a, b], axis).detach())
    assert counts() == {"fell_back": 1}


def test_gradients_flow_where_they_are_wanted():
    x = rows(*SHAPE)
    x.stop_gradient = False
    vmm_paddle.concat([x, rows(*SHAPE)], 1).sum().backward()
    assert (x.grad.numpy() == 1).all()
    with paddle.no_grad():
        assert vmm_paddle.concat([x.detach(), rows(*SHAPE)], 1).stop_gradient


@pytest.mark.parametrize("axis", [1, 7])
def test_errors_are_paddles(axis):
    x, other = rows(*SHAPE), rows(2, 5, 4, 4)
    with pytest.raises(Exception) as theirs:
        paddle.concat([x, other], axis)
    with pytest.raises(type(theirs.value)):
        vmm_paddle.concat([x, other], axis)


def test_a_tensor_of_ones_own_is_appended_to(counts):
    t = pyvmm.empty((2, 0, 3, 4), axis=1, capacity=100, device="host", layout="seq")
    x, y = rows(*SHAPE), rows(2, 3, 3, 4, seed=1)
    t.append(x)
    for cache in (vmm_paddle.as_tensor(t), paddle.from_dlpack(t)):
        result = pyvmm.concat(cache, y, 1)
    check(result, paddle.concat([x, y], 1))
    assert counts() == {"appended": 1, "forked": 1}
    assert t.length == 8


# ---- what Paddle may do with a result ---------------------------------------------------------


def grown():
    x, y = rows(*SHAPE), rows(2, 3, 3, 4, seed=1)
    return vmm_paddle.concat([x, y], 1), paddle.concat([x, y], 1)


USES = {
    "numpy": lambda x: x.numpy(),
    "numpy of a slice": lambda x: x[:, 2:5].numpy(),
    "numpy of a transpose": lambda x: paddle.transpose(x, [1, 0, 2, 3]).numpy(),
    "tolist": lambda x: np.array(x.tolist(), "float32"),
    "print": lambda x: np.frombuffer(str(x).split("stop_gradient")[1].encode(), "uint8"),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)).numpy(),
    "deepcopy": lambda x: copy.deepcopy(x).numpy(),
    "numpy.from_dlpack": lambda x: np.from_dlpack(x),
    "reshape": lambda x: x.reshape([2, -1]).numpy(),
    "add": lambda x: (x + 1).numpy(),
    "matmul": lambda x: paddle.matmul(x, x, transpose_y=True).numpy(),
    "split": lambda x: np.concatenate([part.numpy() for part in x.split(2, 1)], 1),
}


@pytest.mark.parametrize("use", list(USES))
def test_a_result_can_be_used_as_any_tensor(use):
    # Paddle reads the whole storage in some of these: it must end where the rows do.
    result, expected = grown()
    np.testing.assert_array_equal(USES[use](result), USES[use](expected))


def test_saving_and_loading(tmp_path):
    result, expected = grown()
    paddle.save({"cache": result}, str(tmp_path / "x"))
    check(paddle.load(str(tmp_path / "x"))["cache"], expected)


def test_writing_is_seen_through_the_other_results_as_with_any_view():
    result, _ = grown()
    longer = vmm_paddle.concat([result, rows(2, 1, 3, 4)], 1)
    result[:, 0] = 7.0
    assert (longer[:, 0].numpy() == 7).all()


# ---- lifetime ---------------------------------------------------------------------------------


def test_invariant_10_results_give_their_memory_back_without_the_collector():
    before = in_use("host")
    with Uncollected():
        results = [grown()[0]]
        for step in range(50):
            results.append(vmm_paddle.concat([results[-1], rows(2, 1, 3, 4, seed=step)], 1))
            results.append(vmm_paddle.concat([results[0], rows(2, 1, 3, 4, seed=step)], 1))
        part = paddle.transpose(results[20], [1, 0, 2, 3])[3]
        assert in_use("host") > before
        del results
        assert in_use("host") > before
        del part
        assert in_use("host") == before


def test_any_order_and_any_thread():
    before = in_use("host")
    results = [grown()[0]]
    for step in range(10):
        results.append(vmm_paddle.concat([results[-1], rows(2, 1, 3, 4, seed=step)], 1))
    expected = raw(results[5])
    for drop in (10, 0, 3, 7):
        results[drop] = None
    gc.collect()
    assert raw(results[5]) == expected
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert in_use("host") == before


def test_as_tensor_pins_its_rows_and_shows_no_more():
    t = pyvmm.empty((2, 0, 3, 4), axis=1, capacity=1000, device="host", layout="seq")
    t.append(rows(2, 5, 3, 4))
    five, two = vmm_paddle.as_tensor(t), vmm_paddle.as_tensor(t[:2])
    with pytest.raises(BufferError):
        t.truncate(4)
    del five
    t.truncate(2)
    check(two, rows(2, 5, 3, 4)[:, :2])
    with pytest.raises(ValueError, match="first"):
        vmm_paddle.as_tensor(t[1:])
    del two
    t.close()
    with pytest.raises(pyvmm.VMMError):
        vmm_paddle.as_tensor(t)


@pytest.mark.parametrize("layout", ["lane", "c"])
def test_other_layouts_share_memory_too(layout):
    t = pyvmm.empty((2, 0, 3, 4), axis=1, capacity=1000, device="host", layout=layout)
    x, y = rows(*SHAPE), rows(2, 1, 3, 4, seed=1)
    t.append(x)
    result = vmm_paddle.concat([vmm_paddle.as_tensor(t), y], 1)
    assert result.data_ptr() == t.ptr
    check(result, paddle.concat([x, y], 1))


def test_nothing_is_said_at_exit():
    run_python(
        """
        import logging, warnings
        warnings.simplefilter("ignore")
        import paddle, pyvmm.paddle
        kept = pyvmm.paddle.concat([paddle.zeros([2, 3]), paddle.zeros([1, 3])])
        kept = [kept, pyvmm.paddle.concat([kept, kept])]
        """
    )


# ---- PaddleNLP's operator ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("n_new", [1, 3])
def test_vtensor_reserve_one_token(counts, batch, n_new):
    cache = expected = rows(batch, 5, 3, 4)
    kept = []
    for step in range(6):
        new = rows(batch, n_new, 3, 4, seed=step)
        kept.append((cache, expected))
        if step % 2:  # as PaddleNLP's models hand it over
            swapped = paddle.transpose(cache, [1, 0, 2, 3])
            cache = vmm_paddle.vtensor_reserve_one_token(swapped, new, transposed_input=True)
        else:
            cache = vmm_paddle.vtensor_reserve_one_token(cache, new)
        expected = paddle.concat([expected, new], 1)
    for result, was in [*kept, (cache, expected)]:
        check(result, was)
    assert counts() == {"taken_in": 1, "appended": 5}


def test_vtensor_reserve_one_token_wants_four_dimensions():
    with pytest.raises(ValueError, match="4 dimensions"):
        vmm_paddle.vtensor_reserve_one_token(rows(2, 3, 4), rows(2, 1, 4))


# ---- inside any model -------------------------------------------------------------------------


def decode(n_steps, caches, batch=2):
    """A model that knows Paddle alone."""
    for step in range(n_steps):
        for layer, cache in enumerate(caches):
            new = rows(batch, 1, 3, 4, seed=100 * layer + step)
            caches[layer] = paddle.concat([cache, new], axis=1)
    return caches


def test_inplace_concat_turns_what_grows(counts):
    start = [rows(*SHAPE, seed=layer) for layer in range(3)]
    expected = decode(10, list(start))
    with vmm_paddle.inplace_concat() as turned:
        caches = decode(10, list(start))
        paddle.concat([start[0], start[1]], axis=0)  # does not grow
    for cache, right in zip(caches, expected, strict=True):
        check(cache, right)
    # The first of each is Paddle's, the second is taken in.
    assert turned.turned == 27
    assert turned.left == {"not growing": 4}
    assert counts() == {"taken_in": 3, "appended": 24, "fell_back": 4}


def test_inplace_concat_leaves_paddle_as_it_was():
    names = [
        (paddle, "concat"),
        (paddle, "cat"),
        (paddle.tensor, "concat"),
        (paddle.Tensor, "view"),
    ]
    before = [getattr(owner, name) for owner, name in names]
    with vmm_paddle.inplace_concat(), vmm_paddle.inplace_concat(capacity=64):
        assert paddle.concat is not before[0]
    assert [getattr(owner, name) for owner, name in names] == before
    with pytest.raises(ZeroDivisionError), vmm_paddle.inplace_concat():
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in names] == before


def test_inplace_concat_is_of_its_thread(counts):
    results = []
    with vmm_paddle.inplace_concat():
        thread = threading.Thread(target=lambda: results.extend(decode(5, [rows(*SHAPE)])))
        thread.start()
        thread.join()
    check(results[0], decode(5, [rows(*SHAPE)])[0])
    assert counts() == {}


def test_inplace_concat_leaves_and_counts_the_rest():
    x, wanted = rows(*SHAPE), rows(*SHAPE)
    wanted.stop_gradient = False
    with vmm_paddle.inplace_concat() as turned:
        paddle.concat([x, x, x], axis=1)
        out = paddle.empty([2, 10, 3, 4])
        paddle.concat([x, x], axis=1, out=out)
        grows = paddle.concat(tensors=[x, x], dim=1)
        check(paddle.concat([grows, x], axis=2 - 3 + 2), paddle.concat([x, x, x], axis=1))
        first = paddle.concat([wanted, x], axis=1)
        second = paddle.concat([first, x], axis=1)
    assert not second.stop_gradient
    check(out, paddle.concat([x, x], axis=1))
    assert turned.turned == 1
    assert turned.left["number of operands"] == 2
    assert turned.left["out="] == 1
    assert turned.left["gradients"] == 1


def test_inplace_concat_answers_view_by_reshape():
    with vmm_paddle.inplace_concat() as turned:
        cache = decode(4, [rows(*SHAPE)])[0]
        flat = cache.view([18, 12])
        check(flat, cache.reshape([18, 12]))
        assert turned.reshaped == 1
    with pytest.raises(ValueError):
        cache.view([18, 12])


# ---- random programs --------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
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
        if inside:
            return paddle.concat([a, b], axis)
        return vmm_paddle.concat([a, b], axis, **parameters)

    with Uncollected():
        with vmm_paddle.inplace_concat(**parameters) if inside else contextlib.nullcontext():
            concat_programs.run(
                program,
                concat,
                make=paddle.to_tensor,
                clone=paddle.clone,
                value=lambda x: x.clone().numpy(),
            )
        assert in_use("host") == before
