"""The operator for Paddle's static programs: concat in value, an append where it can be, eagerly,
in to_static and in static programs, in while loops. It is compiled here if it is not yet."""

import os
import threading
import warnings

import numpy as np
import pytest

from concat_arrays import Uncollected, in_use
from model import pattern

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "No ccache found"
    paddle = pytest.importorskip("paddle", reason="paddle is not installed")

import pyvmm  # noqa: E402
import pyvmm.paddle as vmm_paddle  # noqa: E402
from pyvmm import paddle_op  # noqa: E402
from small_llama import SmallLlama  # noqa: E402
from support import run_python  # noqa: E402


@pytest.fixture(autouse=True)
def counts():
    """What the operator has done since the test began."""
    paddle.set_device("cpu")
    paddle.disable_static()
    before = paddle_op.stats()

    def read():
        now = paddle_op.stats()
        return {name: n - before[name] for name, n in now.items() if n != before[name]}

    yield read
    paddle.disable_static()


def rows(*shape, dtype="float32", seed=0):
    return paddle.to_tensor(pattern(shape, "uint16" if dtype == "bfloat16" else dtype, seed))


def raw(x):
    return np.ascontiguousarray(x.numpy()).tobytes()


def check(a, b):
    assert list(a.shape) == list(b.shape) and a.dtype == b.dtype
    assert raw(a) == raw(b)


# ---- eagerly ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool"])
@pytest.mark.parametrize("shape, axis", [((5, 2, 3, 4), 0), ((1, 5, 3, 4), 1), ((5,), -1)])
def test_invariant_10_it_appends(counts, dtype, shape, axis):
    cache = expected = rows(*shape, dtype=dtype)
    kept = []
    for step, n_rows in enumerate((1, 3, 1, 0, 40, 1)):
        size = list(shape)
        size[axis] = n_rows
        new = rows(*size, dtype=dtype, seed=step)
        kept.append((cache, expected))
        cache = paddle_op.concat(cache, new, axis)
        expected = paddle.concat([expected, new], axis)
        check(cache, expected)
        assert cache.is_contiguous()
    for earlier, was in kept:
        check(earlier, was)
    assert counts() == {"taken_in": 1, "appended": 5}


def test_an_older_tensor_forks_and_a_full_one_moves(counts):
    x = rows(5, 2, 4)
    base = paddle_op.concat(x, x, capacity=16)  # 20, since twice the size is more
    first, second = paddle_op.concat(base, x), paddle_op.concat(base, x)
    check(first, paddle.concat([x, x, x]))
    check(second, paddle.concat([x, x, x]))
    assert first.data_ptr() == base.data_ptr() != second.data_ptr()
    longer = paddle_op.concat(paddle_op.concat(first, x), x)
    check(longer, paddle.concat([x] * 5))
    assert counts() == {"taken_in": 1, "appended": 2, "forked": 1, "moved": 1}


def test_it_goes_on_with_what_others_made_and_they_with_its(counts):
    """One table of tensors for all: libvmm's."""
    x, y = rows(5, 2, 4), rows(1, 2, 4, seed=1)
    pyvmm.concat_stats(reset=True)
    cache = vmm_paddle.concat([x, y])
    cache = paddle_op.concat(cache, y)
    cache = vmm_paddle.concat([cache, y])
    check(cache, paddle.concat([x, y, y, y]))
    t = pyvmm.empty((2, 0, 4), axis=1, capacity=50, device="host", layout="seq")
    t.append(paddle.transpose(x, [1, 0, 2]))
    both = paddle_op.concat(paddle.transpose(vmm_paddle.as_tensor(t), [1, 0, 2]), y)
    assert both.data_ptr() == t.ptr and t.length == 6
    check(both, paddle.concat([x, y]))
    assert counts() == {"appended": 2}
    assert pyvmm.concat_stats()["appended"] == 1


def test_a_batch_is_not_copied_on_the_way(counts):
    """(batch, tokens, heads, dim) views of a cache that lies as (tokens, batch, heads, dim)."""
    cache = rows(4, 5, 3, 8)
    for step in range(10):
        new = rows(4, 1, 3, 8, seed=step)
        cache = vmm_paddle.vtensor_reserve_one_token(cache, new)
        swapped = paddle_op.concat(paddle.transpose(cache, [1, 0, 2, 3]), rows(1, 4, 3, 8))
        assert swapped.data_ptr() == cache.data_ptr()
        cache = paddle.transpose(swapped, [1, 0, 2, 3])
    assert counts() == {"appended": 10}


def test_results_are_tensors_like_any(tmp_path):
    result = paddle_op.concat(rows(5, 2, 4), rows(3, 2, 4))
    expected = paddle.concat([rows(5, 2, 4), rows(3, 2, 4)])
    assert str(result) == str(expected)
    paddle.save(result, str(tmp_path / "x"))
    check(paddle.load(str(tmp_path / "x")), expected)


def test_memory_goes_with_the_last_result_without_the_collector():
    before = in_use("host")
    with Uncollected():
        cache = rows(5, 2, 4)
        kept = []
        for step in range(50):
            cache = paddle_op.concat(cache, rows(1, 2, 4, seed=step))
            kept.append(cache[1:3])
        assert in_use("host") > before
        del cache, kept
        assert in_use("host") == before


def test_memory_comes_from_a_pool_of_ones_choice():
    with pyvmm.Pool("host", max_bytes="1MiB") as pool:
        paddle_op.use_pool(pool)
        try:
            cache = paddle_op.concat(rows(100, 1024), rows(1, 1024))
            assert pool.stats()["in_use_bytes"] >= 101 * 4096
            with pytest.raises(MemoryError, match="budget"):
                paddle_op.concat(cache, rows(1000, 1024))
            check(cache, paddle.concat([rows(100, 1024), rows(1, 1024)]))
            check(paddle_op.concat(cache, rows(1, 1024)), paddle.concat([cache, rows(1, 1024)]))
            del cache
            with pytest.raises(pyvmm.VMMError):
                pool.close()  # the operator has it
        finally:
            paddle_op.use_pool(pyvmm.default_pool("host"))


def wanting():
    x = rows(5, 2, 4)
    x.stop_gradient = False
    return x


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "axis 3", lambda x: paddle_op.concat(x, x, 3)),
        (ValueError, "outermost", lambda x: paddle_op.concat(x, x, 1)),
        (ValueError, "capacity", lambda x: paddle_op.concat(x, x, capacity=-1)),
        (ValueError, "axis 0", lambda x: paddle_op.concat(x, rows(1, 2, 5))),
        (ValueError, "axis 0", lambda x: paddle_op.concat(x, rows(1, 2))),
        (ValueError, "float64", lambda x: paddle_op.concat(x, x.astype("float64"))),
        (RuntimeError, "no_grad", lambda x: paddle_op.concat(x, wanting())),
        (TypeError, "integer", lambda x: paddle_op.concat(x, x, 0.0)),
    ],
)
def test_errors_say_what_to_do(error, message, call):
    with pytest.raises(error, match=message):
        call(rows(5, 2, 4))


def test_threads_may_go_on_from_one_cache():
    shared = paddle_op.concat(rows(5, 2, 4), rows(1, 2, 4))
    expected, wrong = shared.numpy(), []

    def work(seed):
        cache = kept = rows(3, 2, 4, seed=seed)
        for step in range(60):
            new = rows(1, 2, 4, seed=seed + step)
            cache, kept = paddle_op.concat(cache, new), paddle.concat([kept, new])
            longer = paddle_op.concat(shared, new)
            if longer.numpy().tobytes() != np.concatenate([expected, new.numpy()]).tobytes():
                wrong.append(step)
        if raw(cache) != raw(kept):
            wrong.append("own")

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_is_told_and_begins_anew():
    said = run_python(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import paddle
        from pyvmm import paddle_op
        paddle.set_device("cpu")
        x = paddle.ones([2, 3])
        cache = paddle_op.concat(x, x)
        sys.stdout.flush()
        if os.fork():
            _, status = os.wait()
            sys.exit(status)
        try:
            paddle_op.concat(cache, x)
        except OSError as error:
            print("parent process" in str(error))
        print(paddle_op.concat(x, x).shape)
        """
    )
    assert said.split("\n")[-3:-1] == ["True", "paddle.Size([4, 3])"]


# ---- in programs ------------------------------------------------------------------------------


def in_a_loop(cache, new, n):
    i = paddle.zeros([1], "int64")
    while i < n:
        cache = paddle_op.concat(cache, new + i.astype("float32"), 0)
        i = i + 1
    return cache


@pytest.mark.parametrize("full_graph", [True, False])
def test_to_static_while(counts, full_graph):
    loop = paddle.jit.to_static(in_a_loop, full_graph=full_graph)
    x, new = paddle.randn([5, 4, 2, 8]), paddle.randn([1, 4, 2, 8])
    with paddle.no_grad():
        first = loop(x, new, paddle.to_tensor([20]))
        second = loop(first, new, paddle.to_tensor([20]))
    added = [new + float(i) for i in range(20)]
    check(first, paddle.concat([x, *added]))
    check(second, paddle.concat([x, *added, *added]))
    assert counts() == {"taken_in": 1, "appended": 39}


def test_a_static_program_with_a_while_loop(counts):
    paddle.enable_static()
    program = paddle.static.Program()
    with paddle.static.program_guard(program):
        cache = paddle.static.data("cache", [-1, 3, 4], "float32")
        n = paddle.static.data("n", [1], "int64")
        new = paddle.static.data("new", [1, 3, 4], "float32")

        def body(i, cache):
            return i + 1, vmm_paddle.concat([cache, new], 0)

        _, result = paddle.static.nn.while_loop(
            lambda i, _: i < n, body, [paddle.zeros([1], "int64"), cache]
        )
        assert list(result.shape) == [-1, 3, 4]
        assert result.dtype == cache.dtype
    x = np.arange(24, dtype="float32").reshape(2, 3, 4)
    executor = paddle.static.Executor(paddle.CPUPlace())
    for n_steps in (7, 0, 3):
        feed = {"cache": x, "new": x[:1], "n": np.array([n_steps])}
        (out,) = executor.run(program, feed=feed, fetch_list=[result])
        np.testing.assert_array_equal(out, np.concatenate([x, *[x[:1]] * n_steps]))
    assert counts() == {"taken_in": 2, "appended": 8}


def test_an_older_variable_stays_right_in_a_program(counts):
    @paddle.jit.to_static(full_graph=True)
    def branches(cache, new):
        longer = paddle_op.concat(cache, new)
        first = paddle_op.concat(longer, new)
        second = paddle_op.concat(longer, new * 2)
        return longer * 3, first, second

    x, new = paddle.randn([5, 2, 4]), paddle.randn([1, 2, 4])
    with paddle.no_grad():
        longer, first, second = branches(x, new)
    check(longer, paddle.concat([x, new]) * 3)
    check(first, paddle.concat([x, new, new]))
    check(second, paddle.concat([x, new, new * 2]))
    assert counts() == {"taken_in": 1, "appended": 1, "forked": 1}


def test_what_a_program_learns_too_late_is_left_to_paddle(counts):
    specs = [paddle.static.InputSpec([None, None, 4], "float32")] * 2

    @paddle.jit.to_static(input_spec=specs, full_graph=True)
    def step(cache, new):
        return paddle_op.concat(cache, new, 1)

    with paddle.no_grad():
        one = step(rows(1, 5, 4), rows(1, 2, 4))
        check(step(one, rows(1, 2, 4)), paddle.concat([rows(1, 5, 4), *[rows(1, 2, 4)] * 2], 1))
        check(step(rows(3, 5, 4), rows(3, 2, 4)), paddle.concat([rows(3, 5, 4), rows(3, 2, 4)], 1))
    assert counts() == {"taken_in": 1, "appended": 1, "left": 1}


def test_a_program_gets_paddles_own_where_no_append_can_be(counts):
    @paddle.jit.to_static(full_graph=True)
    def step(cache, new):
        return vmm_paddle.concat([cache, new], 1)

    pyvmm.concat_stats(reset=True)
    with paddle.no_grad():
        check(step(rows(2, 5, 4), rows(2, 1, 4)), paddle.concat([rows(2, 5, 4), rows(2, 1, 4)], 1))
    assert counts() == {}
    assert pyvmm.concat_stats()["reasons"] == {"static program": 1}


class Loop(paddle.nn.Layer):
    def forward(self, cache, new, n):
        return in_a_loop(cache, new, n)


def test_a_saved_program_in_another_process(tmp_path):
    """Loaded by paddle.jit.load, and by an inference predictor."""
    spec = paddle.static.InputSpec
    specs = [spec([-1, 4, 8], "float32"), spec([1, 4, 8], "float32"), spec([1], "int64")]
    paddle.jit.save(
        paddle.jit.to_static(Loop(), input_spec=specs, full_graph=True), str(tmp_path / "loop")
    )
    said = run_python(
        f"""
        import warnings
        warnings.simplefilter("ignore")
        import numpy, paddle, paddle.inference
        from pyvmm import paddle_op
        paddle.set_device("cpu")
        paddle_op.load()
        x = numpy.random.default_rng(1).random((3, 4, 8), "float32")
        expected = numpy.concatenate([x] + [x[:1] + i for i in range(5)])
        program = paddle.jit.load({str(tmp_path / "loop")!r})
        with paddle.no_grad():
            out = program(paddle.to_tensor(x), paddle.to_tensor(x[:1]), paddle.to_tensor([5]))
        print("jit", numpy.array_equal(out.numpy(), expected))
        options = paddle.inference.Config({str(tmp_path / "loop.json")!r}, "")
        options.disable_gpu()
        options.disable_glog_info()
        predictor = paddle.inference.create_predictor(options)
        for name, value in zip(predictor.get_input_names(), (x, x[:1], numpy.array([5]))):
            handle = predictor.get_input_handle(name)
            handle.reshape(value.shape)
            handle.copy_from_cpu(value)
        predictor.run()
        out = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
        print("predictor", numpy.array_equal(out, expected))
        print(paddle_op.stats())
        """,
        check=False,  # Paddle logs
    )
    assert "jit True" in said.stdout and "predictor True" in said.stdout, said.stderr
    assert "{'appended': 8, 'forked': 0, 'moved': 0, 'taken_in': 2, 'left': 0}" in said.stdout


@pytest.mark.parametrize("batch", [1, 4])
def test_a_small_llama_in_to_static(counts, batch):
    """Decoding in one program, with a loop, against the same model that concatenates."""
    paddle.seed(7)
    model = SmallLlama()
    model.eval()
    ids = paddle.to_tensor(np.random.default_rng(batch).integers(0, model.vocabulary, (batch, 6)))
    with paddle.no_grad():
        expected = model.decode(ids, 24, paddle.concat)
        assert len(set(expected.flatten().tolist())) > 5
        program = paddle.jit.to_static(model.decode_in_program, full_graph=True)
        tokens, *caches = program(ids, paddle.to_tensor([24]))
    assert [list(cache.shape) for cache in caches] == [[29, batch, 2, 16]] * len(caches)
    np.testing.assert_array_equal(tokens.numpy(), expected.numpy())
    n_caches = 2 * model.n_layers
    assert counts() == {"taken_in": n_caches, "appended": 22 * n_caches}


# ---- building it ------------------------------------------------------------------------------


def test_without_a_compiler_it_says_so(tmp_path):
    said = run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        from pyvmm import paddle_op
        try:
            paddle_op.load()
        except RuntimeError as error:
            print(error)
        """,
        PATH=str(tmp_path),
        PADDLE_EXTENSION_DIR=str(tmp_path),
        CXX="g++",
        check=False,  # the shell tells what else Paddle misses
    ).stdout
    assert "install g++" in said


def test_without_paddle_it_says_so(tmp_path):
    (tmp_path / "paddle.py").write_text("raise ImportError('no paddle')")
    said = run_python(
        """
        try:
            import pyvmm.paddle_op
        except ImportError as error:
            print(error)
        """,
        PYTHONPATH=os.pathsep.join(
            [str(tmp_path), os.path.dirname(os.path.dirname(pyvmm.__file__))]
        ),
    )
    assert "pyvmm[paddle]" in said


def test_it_is_built_once_and_loaded_quietly():
    code = """
        import warnings
        warnings.simplefilter("ignore")
        from pyvmm import paddle_op
        print(paddle_op.library())
        """
    assert run_python(code).splitlines()[-1] == paddle_op.library()
