"""concat() equals the framework's concatenate in every case, and appends where it can
(invariant 10). On the host with NumPy's arrays, on CUDA with those of concat_arrays.py."""

import threading

import numpy as np
import pytest

import cuda_helper
import pyvmm
from concat_arrays import DeviceArray, Uncollected, address, array, counted, export, in_use, value
from pyvmm._concat import Framework, register
from pyvmm._numpy import NUMPY
from support import calls, calls_since, run_python, to_numpy

ROW = (2, 3, 8)


def numbers(shape, start=0, dtype="float32"):
    return np.arange(start, start + int(np.prod(shape)), dtype="int32").reshape(shape).astype(dtype)


@pytest.fixture(autouse=True)
def stats():
    """What concat() has done since the test began."""
    pyvmm.concat_stats(reset=True)
    return counted


@pytest.fixture
def make(device):
    """An array of that shape with numbers from `start` on, and the same for NumPy."""

    def made(shape, start=0, dtype="float32"):
        contents = numbers(shape, start, dtype)
        return array(device, contents), contents

    return made


def same(result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert np.array_equal(value(result), expected)


@pytest.mark.parametrize("layout", ["seq", "lane", "c", None])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_invariant_10_a_growing_cache_is_taken_in_once_and_appended_to(make, stats, axis, layout):
    shape = list(ROW)
    cache, expected = make(shape)
    kept = []
    for step, n_rows in enumerate((1, 3, 1, 0, 7, 1)):
        shape[axis] = n_rows
        new, more = make(shape, 1000 * step)
        cache = pyvmm.concat(cache, new, axis, layout=layout)
        expected = np.concatenate((expected, more), axis)
        same(cache, expected)
        kept.append((cache, expected))
    for result, was in kept:
        same(result, was)
    assert len({address(result) for result, _ in kept}) == 1
    assert stats() == {"taken_in": 1, "appended": 5}


def test_invariant_10_the_rows_of_a_tensor_are_its_tip(device, empty, make, stats):
    t = empty(shape=(2, 0, 8), axis=1)
    cache, expected = export(t), np.empty((2, 0, 8), "float32")
    for step in range(5):
        new, more = make((2, step, 8), 100 * step)
        cache = pyvmm.concat(cache, new, 1)
        expected = np.concatenate((expected, more), 1)
        same(cache, expected)
    assert stats() == {"appended": 5}
    assert t.length == 10 and address(cache) == t.ptr
    assert np.array_equal(to_numpy(t), expected)


def test_invariant_10_a_tensor_that_is_given_up_still_grows(empty, make, stats):
    t = empty()
    with t:
        new, expected = make((3, 4))
        t.append(new)
        cache = export(t)
    assert t.closed
    same(pyvmm.concat(cache, new), np.concatenate((expected, expected)))
    assert stats() == {"appended": 1}


def test_invariant_10_older_and_shorter_views_fork(make, stats):
    first, expected = make((2, 5, 8))
    ones, more = make((2, 1, 8), 500)
    cache = pyvmm.concat(first, ones, 1)
    grown = pyvmm.concat(cache, ones, 1)
    assert stats() == {"taken_in": 1, "appended": 1}
    branch = pyvmm.concat(cache, first, 1)
    short = pyvmm.concat(grown[:, :3], ones, 1)
    none = pyvmm.concat(grown[:, :0], ones, 1)
    assert stats() == {"taken_in": 1, "appended": 1, "forked": 3}
    whole = np.concatenate((expected, more, more), 1)
    for result, is_equal_to in [
        (cache, whole[:, :6]),
        (grown, whole),
        (branch, np.concatenate((whole[:, :6], expected), 1)),
        (short, np.concatenate((whole[:, :3], more), 1)),
        (none, more),
    ]:
        same(result, is_equal_to)
    # Each history goes on in place.
    assert address(pyvmm.concat(branch, ones, 1)) == address(branch)
    assert address(pyvmm.concat(grown, ones, 1)) == address(grown)
    assert stats() == {"taken_in": 1, "appended": 3, "forked": 3}


@pytest.mark.parametrize(
    "key",
    [np.s_[:, 1:], np.s_[:1], np.s_[..., :4], np.s_[:, ::2], np.s_[:, ::-1]],
    ids=str,
)
def test_invariant_10_other_views_of_a_tensor_are_taken_in(make, stats, key):
    cache, expected = make((2, 6, 8))
    cache = pyvmm.concat(cache, cache, 1)
    expected = np.concatenate((expected, expected), 1)
    new, more = make(expected[key].shape, 300)
    same(pyvmm.concat(cache[key], new, 1), np.concatenate((expected[key], more), 1))
    same(cache, expected)
    assert stats()["taken_in"] == 2


def test_invariant_10_along_another_axis(make, stats):
    cache, expected = make((2, 6, 8))
    cache = pyvmm.concat(cache, cache, 1)
    expected = np.concatenate((expected, expected), 1)
    same(pyvmm.concat(cache, cache, 0), np.concatenate((expected, expected), 0))
    same(pyvmm.concat(cache, cache, 2), np.concatenate((expected, expected), 2))
    assert stats() == {"taken_in": 3}


def test_invariant_10_what_is_new_may_be_the_cache(make, stats):
    cache, expected = make((2, 3, 8))
    for part in (np.s_[:, :], np.s_[:, 1:2], np.s_[:, ::-1], np.s_[:, :0], np.s_[:, -1:]):
        same(
            result := pyvmm.concat(cache, cache[part], 1),
            expected := np.concatenate((expected, expected[part]), 1),
        )
        cache = result
    assert stats() == {"taken_in": 1, "appended": 4}


def test_invariant_10_past_the_capacity_it_moves(make, stats):
    cache, expected = make((3, 8))
    one, more = make((1, 8), 70)
    kept = []
    for _ in range(20):
        cache = pyvmm.concat(cache, one, capacity=5)
        expected = np.concatenate((expected, more))
        kept.append((cache, expected))
    for result, was in kept:
        same(result, was)
    assert stats() == {"taken_in": 1, "moved": 3, "appended": 16}  # to 10, 20, 40 rows
    assert pyvmm.concat_stats()["copied_bytes"] == (3 + 5 + 10 + 20) * 32


def test_invariant_10_what_has_no_dense_rows(make, stats):
    cache, expected = make((4, 8))
    strided, more = make((2, 16), 90)
    cache = pyvmm.concat(cache, strided[:, ::2])
    same(cache, np.concatenate((expected, more[:, ::2])))
    same(pyvmm.concat(strided[:, ::2], cache), np.concatenate((more[:, ::2], value(cache))))
    assert stats() == {"taken_in": 2}


def test_invariant_10_left_to_the_framework(device, make, stats):
    cache, expected = make((4, 8))
    cache = pyvmm.concat(cache, cache)
    doubled = np.concatenate((expected, expected))
    other, more = make((1, 8), 3, "float64")
    result = pyvmm.concat(cache, other)
    assert value(result).dtype == "float64"
    assert np.array_equal(value(result), np.concatenate((doubled, more)))
    for new, axis in [
        (make((1, 9))[0], 0),
        (make((1,))[0], 0),
        (make((1, 8, 1))[0], 0),
        (make((1, 8))[0], 2),
        (make((1, 8))[0], -3),
    ]:
        with pytest.raises(ValueError, match="dimension|axis"):
            pyvmm.concat(cache, new, axis)
    flat = pyvmm.concat(cache, make((1, 8))[0], None)
    assert flat.shape == (72,)
    nothing, _ = make((4, 0))
    assert pyvmm.concat(nothing, nothing).shape == (8, 0)
    counts = pyvmm.concat_stats()
    assert counts["fell_back"] == 8
    pyvmm.concat_stats(reset=True)
    assert counts["reasons"] == {"dtypes": 1, "shapes": 3, "axis": 3, "no elements": 1}
    deep, _ = make((1,) * 9)
    assert pyvmm.concat(deep, deep, 8).shape == (1,) * 8 + (2,)
    same(cache, doubled)
    same(pyvmm.concat(cache, make((1, 8))[0]), np.concatenate((doubled, numbers((1, 8)))))
    assert stats()["appended"] == 1


@pytest.mark.parametrize("dtype", ["int8", "bool", "float64", "complex128", "float16"])
def test_invariant_10_of_every_size_of_elements(make, stats, dtype):
    cache, expected = make((2, 3, 8), dtype=dtype)
    for _ in range(3):
        cache, expected = pyvmm.concat(cache, cache, 1), np.concatenate((expected, expected), 1)
        same(cache, expected)
    assert stats() == {"taken_in": 1, "appended": 2}


def test_invariant_10_dropping_the_results_gives_the_memory_back(device, make):
    before = in_use(device)
    with Uncollected():
        caches = [make((2, 3, 8))[0] for _ in range(4)]
        kept = []
        for _ in range(5):
            caches = [pyvmm.concat(cache, cache, 1) for cache in caches]
            kept.append(caches[0][:, 1:])
        assert in_use(device) > before
        del caches
        assert in_use(device) > before
        kept = kept[:1]
        assert in_use(device) > before
        del kept
        assert in_use(device) == before


def test_invariant_10_an_address_that_is_another_tensors_now(device, make, pool, stats):
    addresses = set()
    for n in range(30):
        cache, expected = make((2 + n % 3, 8), n)
        cache = pyvmm.concat(cache, cache, pool=pool)
        same(pyvmm.concat(cache, cache), np.concatenate([expected] * 4))
        addresses.add(address(cache))
        del cache
        pool.trim()
    assert stats() == {"taken_in": 30, "appended": 30}
    if device == "host":
        assert len(addresses) < 30


def test_invariant_5_a_result_pins_its_rows(empty, make):
    t = empty()
    new, expected = make((3, 4))
    t.append(new)
    result = pyvmm.concat(export(t), new)
    with pytest.raises(BufferError, match="rows up to 6"):
        t.truncate(5)
    with pytest.raises(BufferError):
        t.close()
    same(result, np.concatenate((expected, expected)))
    del result
    t.truncate(2)
    t.close()


def test_invariant_5_also_one_out_of_the_whole_reservation(empty, make):
    t = empty()
    new, expected = make((3, 4))
    t.append(new)
    whole = export(t.reserved())
    result = pyvmm.concat(whole[:3], new)
    assert t.length == 6
    del whole
    with pytest.raises(BufferError):
        t.truncate(2)
    same(result, np.concatenate((expected, expected)))
    del result
    t.truncate(2)


def test_rows_that_were_truncated_away_are_no_rows(empty, make, stats):
    t = empty()
    new, expected = make((6, 4))
    t.append(new)
    whole = export(t.reserved())
    stale = whole[:6]
    t.truncate(2)
    # An ordinary array, of which concat cannot know more than the framework does.
    result = pyvmm.concat(stale, new)
    same(result, np.concatenate((expected, expected)))
    assert stats() == {"taken_in": 1} and t.length == 2


def test_parameters_of_what_is_taken_in(device, make, pool):
    cache, _ = make((2, 3, 8))
    before = pool.stats()["in_use_bytes"]
    result = pyvmm.concat(cache, cache, 1, pool=pool, layout="seq", capacity=100)
    assert pool.stats()["in_use_bytes"] > before
    assert result.strides == (32, 64, 4)
    result = pyvmm.concat(cache, cache, 1, pool=pool, layout="lane", capacity=1)
    assert result.shape == (2, 6, 8) and result.strides[1:] == (32, 4)
    for wrong in ({"layout": "x"}, {"capacity": 0}, {"capacity": "9"}, {"pool": "host"}):
        with pytest.raises((ValueError, TypeError)):
            pyvmm.concat(cache, cache, 1, **wrong)


def test_the_layout_of_what_has_many_lanes(device, make, stats):
    for n, layout in ((256, None if device == "host" else "seq"), (257, "seq")):
        cache, expected = make((n, 2, 4))
        result = pyvmm.concat(cache, cache, 1)
        same(result, np.concatenate((expected, expected), 1))
        assert (result.strides == (16, n * 16, 4)) == (layout == "seq")


def test_forks_stay_in_their_pool(make, pool):
    cache, _ = make((5, 64))
    grown = pyvmm.concat(cache, cache, pool=pool, layout="seq")
    before = pool.stats()["in_use_bytes"]
    fork = pyvmm.concat(grown[:7], cache)
    assert pool.stats()["in_use_bytes"] > before
    del fork


def test_forks_of_a_tensor_whose_pool_was_given_up(device, make, stats):
    cache, expected = make((5, 64))
    with pyvmm.Pool(device) as pool:
        grown = pyvmm.concat(cache, cache, pool=pool)
    result = pyvmm.concat(grown, cache)
    fork = pyvmm.concat(grown[:7], cache)
    same(result, np.concatenate([expected] * 3))
    same(fork, np.concatenate((np.concatenate([expected] * 2)[:7], expected)))


def test_invariant_3_out_of_memory_changes_nothing(device, make, make_pool):
    cache, expected = make((1, 1 << 20))  # rows of 4 MiB
    pool = make_pool(max_bytes="20MiB")
    result = pyvmm.concat(cache, cache, pool=pool, capacity=100)
    with pytest.raises(pyvmm.OutOfMemoryError):
        for _ in range(10):
            result = pyvmm.concat(result, cache)
    length = result.shape[0]
    assert 3 <= length <= 5
    same(result, np.concatenate([expected] * length))
    with pytest.raises(pyvmm.OutOfMemoryError):
        pyvmm.concat(cache, cache, pool=make_pool(max_bytes="4MiB"))
    del result


def test_inside_an_out_of_memory_callback_of_its_own(device, make, make_pool, stats):
    cache, expected = make((1, 1 << 20))
    pool = make_pool(max_bytes="20MiB")
    results = [pyvmm.concat(cache, cache, pool=pool, capacity=100)]
    inside = []

    def callback(n_bytes):
        inside.append(pyvmm.concat(results[-1], cache))
        return False

    pool.on_oom(callback)
    with pytest.raises(pyvmm.OutOfMemoryError):
        for _ in range(10):
            results.append(pyvmm.concat(results[-1], cache))
    assert len(inside) == 1
    same(inside[0], np.concatenate([expected] * (results[-1].shape[0] + 1)))
    assert stats()["fell_back"] == 1
    results.clear()


def test_threads_with_one_cache(device, make, stats):
    """The first to come appends, the others fork; each gets its own rows."""
    start, expected = make((50, 64))
    cache = pyvmm.concat(start, start)
    expected = np.concatenate((expected, expected))
    n_threads, n_steps = 4, 25
    results, errors = {}, []
    barrier = threading.Barrier(n_threads)

    def work(number):
        try:
            barrier.wait()
            mine = cache
            for step in range(n_steps):
                mine = pyvmm.concat(mine, rows[number, step][0])
            results[number] = mine
        except BaseException as error:
            errors.append(error)

    rows = {
        (n, step): make((300, 64), 1000 * n + step)
        for n in range(n_threads)
        for step in range(n_steps)
    }
    threads = [threading.Thread(target=work, args=(n,)) for n in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for n, result in results.items():
        same(result, np.concatenate([expected] + [rows[n, step][1] for step in range(n_steps)]))
    assert stats() == {
        "taken_in": 1,
        "forked": n_threads - 1,
        "appended": n_threads * n_steps - n_threads + 1,
    }


def test_a_cache_that_is_taken_in_at_every_step_is_warned_of_once(device):
    said = run_python(
        f"""
        import warnings
        import numpy as np
        import pyvmm
        from concat_arrays import array, value
        new = array({device!r}, np.ones((1, 8), "float32"))

        def join(cache):
            return pyvmm.concat(cache, new)

        def run(clone):
            caches = [new] * 3
            for step in range(30):
                caches = [join(clone(cache)) for cache in caches]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(lambda cache: cache)
            assert not caught
            run(lambda cache: array({device!r}, value(cache)))
            run(lambda cache: array({device!r}, value(cache)))
        print(len(caught), caught[0].category.__name__, caught[0].message)
        assert caught[0].lineno == join.__code__.co_firstlineno + 1, caught[0].lineno
        """
    )
    assert said.startswith("1 UserWarning concat has copied a whole cache in each of 8 steps")
    assert "clone" in said


def test_a_forked_child_is_refused(device):
    said = run_python(
        f"""
        import os
        import numpy as np
        import pyvmm
        from concat_arrays import array, value
        a = array({device!r}, np.ones((3, 8), "float32"))
        cache = pyvmm.concat(a, a)
        child = os.fork()
        if child == 0:
            try:
                pyvmm.concat(cache, a)
            except pyvmm.VMMError as error:
                print(error.status, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        assert (value(pyvmm.concat(cache, a)) == 1).all()
        print(pyvmm.concat_stats()["appended"])
        """
    )
    assert said.split() == ["VMM_ERR_FORKED", "1"]


def test_exit_with_results_alive_is_silent(device):
    run_python(
        f"""
        import numpy as np
        import pyvmm
        from concat_arrays import array
        a = array({device!r}, np.ones((3, 8), "float32"))
        cache = pyvmm.concat(a, a)
        """
    )


def test_what_it_does_not_take(empty):
    with empty() as t:
        with pytest.raises(TypeError, match="has append"):
            pyvmm.concat(t, np.ones((1, 4), "float32"))
        with pytest.raises(TypeError, match="has append"):
            pyvmm.concat(t[:0], np.ones((1, 4), "float32"))
    for other in ([1.0], 3, None, memoryview(b"ab")):
        with pytest.raises(TypeError, match="concat takes an array of NumPy"):
            pyvmm.concat(other, other)


class Exporter:
    """An array of a framework that has __dlpack__ and nothing faster."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OfExporters(Framework):
    def unfit(self, cache, new):
        return None

    def concatenate(self, cache, new, axis):
        return Exporter(np.concatenate((cache.array, new.array), axis))

    def anchor(self, cache):
        return NUMPY.anchor(cache.array)

    def wrap(self, reserved):
        return Exporter(NUMPY.wrap(reserved))

    def cut(self, array, shape, strides):
        result = NUMPY.cut(array.array, shape, strides)
        return None if result is None else Exporter(result)

    def dense(self, array):
        return Exporter(NUMPY.dense(array.array))


def test_invariant_10_of_a_framework_with_dlpack_alone(host, stats):
    register(Exporter, OfExporters())
    expected = numbers((2, 3, 8))
    cache = Exporter(expected)
    for _ in range(4):
        cache = pyvmm.concat(cache, Exporter(expected[:, :3]), 1)
        expected = np.concatenate((expected, expected[:, :3]), 1)
        assert np.array_equal(cache.array, expected)
    assert stats() == {"taken_in": 1, "appended": 3}


# ---- NumPy alone --------------------------------------------------------------------


def test_numpy_results_are_arrays_like_any_other(host):
    import copy
    import pickle

    a = numbers((2, 3, 4))
    result = pyvmm.concat(a, a, 1)
    assert type(result) is np.ndarray and result.flags.writeable
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), result.copy()):
        assert np.array_equal(copied, result) and not np.shares_memory(copied, result)
    result[:] = 0
    assert (a != 0).any()


@pytest.mark.parametrize(
    "other",
    [
        np.ones((1, 2)).view(type("OfItsOwn", (np.ndarray,), {})),
        np.ma.masked_array([[1.0, 2.0]], mask=[[True, False]]),
        np.array([[1.0, 2.0]], ">f8"),
        np.array([["a", "b"]]),
        np.array([[None, 1]], object),
        np.array([["2020-01-01", "2021-01-01"]], "M8[D]"),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.dtype}",
)
def test_numpy_kinds_that_are_left_to_numpy(host, other, stats):
    for cache, new in ((other, other), (np.ones((1, 2)), other), (other, np.ones((1, 2)))):
        try:
            expected = np.concatenate((cache, new))
        except TypeError:
            with pytest.raises(TypeError):
                pyvmm.concat(cache, new)
            continue
        result = pyvmm.concat(cache, new)
        assert type(result) is type(expected) and result.dtype == expected.dtype
        assert np.array_equal(result, expected)
    assert "taken_in" not in stats()


def test_numpy_bfloat16(host, stats):
    import ml_dtypes

    a = numbers((2, 3, 8)).astype(ml_dtypes.bfloat16)
    cache, expected = a, a
    for _ in range(3):
        cache, expected = pyvmm.concat(cache, a, 1), np.concatenate((expected, a), 1)
    assert cache.dtype == expected.dtype and np.array_equal(cache, expected)
    assert stats() == {"taken_in": 1, "appended": 2}


# ---- CUDA ---------------------------------------------------------------------------


def test_invariant_9_an_append_is_one_launch(cuda, pool):
    a = array(cuda, numbers((2, 3, 8)))
    one = array(cuda, numbers((2, 1, 8)))
    cache = pyvmm.concat(a, a, 1, pool=pool)
    before = calls(pool)
    for _ in range(10):
        cache = pyvmm.concat(cache, one, 1)
    assert calls_since(before, pool) == {"launch": 10}


def test_appends_run_on_the_stream_of_the_framework(cuda, streams):
    a = array(cuda, numbers((2, 3, 8)))
    cache = pyvmm.concat(a, a, 1)
    expected = np.concatenate((numbers((2, 3, 8)),) * 2, 1)
    results = []
    for stream in (*streams, streams[0], None):
        DeviceArray.stream = stream
        try:
            new = array(cuda, numbers((2, 1, 8), 40))
            cache = pyvmm.concat(cache, new, 1)
        finally:
            DeviceArray.stream = None
        expected = np.concatenate((expected, numbers((2, 1, 8), 40)), 1)
        results.append((cache, expected))
    cuda_helper.synchronize()
    for result, was in results:
        same(result, was)


def test_devices_that_differ(cuda, stats):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        pyvmm.concat(np.ones((1, 2)), array(cuda, np.ones((1, 2))))
    assert stats() == {"fell_back": 1}
