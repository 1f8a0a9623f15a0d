"""Bad input: an error that names what was wrong, before any driver call, changing nothing."""

import os
import re

import ml_dtypes
import numpy as np
import pytest

import cuda_helper
import dlpack_struct
import pyvmm
from model import LAYOUTS, pattern
from support import calls, held, run_python, smallest_block, state

HUGE = 1 << 62


# ---- making a tensor ----------------------------------------------------------------

REFUSED_TENSORS = {
    # arguments to empty(), the error, what its message must name
    "negative size": ({"shape": (0, -4)}, ValueError, "-4"),
    "size zero": ({"shape": (0, 0, 4)}, ValueError, "dimension 1"),
    "size that is no integer": ({"shape": (0, 2.5)}, TypeError, "float"),
    "shape that is no sequence": ({"shape": None}, TypeError, "shape"),
    "no dimension": ({"shape": ()}, ValueError, "dimension"),
    "nine dimensions": ({"shape": (0,) + (1,) * 8}, ValueError, "9"),
    "negative capacity": ({"capacity": -1}, ValueError, "-1"),
    "no capacity": ({"capacity": 0}, ValueError, "capacity"),
    "capacity that is no integer": ({"capacity": 1.5}, TypeError, "float"),
    "capacity past 64 bits": ({"capacity": 1 << 64}, OverflowError, None),
    "overflowing bytes": ({"capacity": HUGE}, OverflowError, str(HUGE)),
    "overflowing row": ({"shape": (0, HUGE, HUGE)}, OverflowError, None),
    "axis past the end": ({"axis": 2}, IndexError, "axis 2"),
    "axis before the beginning": ({"axis": -3}, ValueError, "axis -3"),
    "axis that is no integer": ({"axis": 1.0}, TypeError, "float"),
    "unknown device": ({"device": "tpu:0"}, ValueError, "tpu:0"),
    "device without a number": ({"device": "cuda:x"}, ValueError, "cuda:x"),
    "negative device": ({"device": "cuda:-1"}, ValueError, "cuda:-1"),
    "device that is no string": ({"device": 3}, TypeError, "device"),
    "unknown layout": ({"layout": "fortran"}, ValueError, "fortran"),
    "layout that is no string": ({"layout": 2}, ValueError, "layout 2"),
    "unknown dtype": ({"dtype": "float12"}, TypeError, "float12"),
    "dtype of objects": ({"dtype": object}, TypeError, "object"),
    "dtype of strings": ({"dtype": "U8"}, TypeError, "U8"),
    "structured dtype": ({"dtype": [("a", "f4")]}, TypeError, "dtype"),
    "dtype of the other byte order": ({"dtype": ">f4"}, TypeError, ">f4"),
    "long double": ({"dtype": np.longdouble}, TypeError, "float128|longdouble"),
    "four-bit integers": ({"dtype": ml_dtypes.int4}, TypeError, "int4"),
    "block size off the granularity": ({"block_size": 1000}, ValueError, "1000"),
    "negative block size": ({"block_size": -4096}, ValueError, "-4096"),
    "block size zero": ({"block_size": 0}, ValueError, "0"),
    "block size that does not parse": ({"block_size": "32 potatoes"}, ValueError, "potatoes"),
    "block size without a number": ({"block_size": "MiB"}, ValueError, "MiB"),
    "block size of another type": ({"block_size": [2]}, TypeError, "list"),
    "pool that is none": ({"pool": "default"}, TypeError, "pool|Pool"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensor_is_refused(case, empty, device):
    arguments, error, named = REFUSED_TENSORS[case]
    pool = pyvmm.default_pool(device)
    before, books = calls(pool), pool.stats()
    with pytest.raises(error, match=named):
        empty(**arguments)
    assert calls(pool) == before
    assert pool.stats() == books


def test_capacity_below_the_length(empty):
    with pytest.raises(ValueError, match="5.*3|3.*5"):
        empty(shape=(5, 4), capacity=3)


def test_size_that_only_the_device_refuses(empty, device):
    """More address space than any machine has: the driver's refusal, by name."""
    pool = pyvmm.default_pool(device)
    pool.trim(wait=True)
    books = held(pool)
    with pytest.raises(pyvmm.VMMError, match="capacity") as error:
        empty(shape=(0,), dtype="uint8", capacity=1 << 60)
    assert error.value.operation.startswith(("mmap", "cuMemAddressReserve", "hipMemAddressReserve"))
    assert error.value.driver_code != 0
    assert held(pool) == books


def test_pool_of_another_device(host, cuda):
    pool = pyvmm.Pool(host)
    with pytest.raises(ValueError, match="cuda:0"):
        pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda, pool=pool)
    pool.close()


REFUSED_POOLS = {
    "unknown device": ({"device": "gpu"}, ValueError, "gpu"),
    "block size off the granularity": ({"block_size": 12345}, ValueError, "12345"),
    "block size that does not parse": ({"block_size": "2 MiBs"}, ValueError, "2 MiBs"),
    "block size of a negative string": ({"block_size": "-2MiB"}, ValueError, "-2MiB"),
    "negative budget": ({"max_bytes": -1}, ValueError, "-1"),
    "budget that does not parse": ({"max_bytes": "lots"}, ValueError, "lots"),
    "budget past 64 bits": ({"max_bytes": 1 << 64}, OverflowError, None),
    "overflowing size string": ({"max_bytes": "99999999999 TiB"}, OverflowError, "99999999999"),
    "budget of another type": ({"max_bytes": 1.5}, TypeError, "float"),
}


@pytest.mark.parametrize("case", REFUSED_POOLS)
def test_pool_is_refused(case, device):
    arguments, error, named = REFUSED_POOLS[case]
    with pytest.raises(error, match=named and re.escape(named)):
        pyvmm.Pool(**{"device": device, **arguments})


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (1 << 21, 1 << 21),
        ("2097152", 1 << 21),
        ("2MiB", 1 << 21),
        ("2 MiB", 1 << 21),
        ("2mib", 1 << 21),
        ("2048KiB", 1 << 21),
        ("0.5GiB", 1 << 29),
        ("1TiB", 1 << 40),
    ],
)
def test_size_strings_that_parse(text, n_bytes, device):
    with pyvmm.Pool(device, max_bytes=text) as pool:
        assert pool.stats()["max_bytes"] == n_bytes


# ---- devices that are not there -----------------------------------------------------


def test_no_cuda_driver(host):
    run_python(
        """
        import pyvmm
        try:
            pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="cuda:0")
        except pyvmm.VMMError as error:
            assert error.status == "VMM_ERR_NO_DRIVER", error.status
            assert "libnowhere.so.1 not found" in str(error), error
            assert "device='host' works" in str(error), error
        else:
            raise SystemExit("opened a CUDA device without a driver")
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="host")
        t.grow(1)
        """,
        VMM_CUDA_LIBRARY="libnowhere.so.1",
    )


def test_no_such_gpu(cuda):
    with pytest.raises(pyvmm.VMMError, match="99") as error:
        pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda.replace("0", "99"))
    assert error.value.status == "VMM_ERR_NO_DEVICE"


# ---- appending ----------------------------------------------------------------------


class Interface:
    def __init__(self, **changes):
        self.__cuda_array_interface__ = {
            "shape": (1, 4),
            "typestr": "<f4",
            "data": (0x10000, False),
            "version": 3,
            **changes,
        }


def on_gpu_7():
    return dlpack_struct.Producer(0x10000, (1, 4), (16, 4), "float32", (dlpack_struct.CUDA, 7))


def of_vulkan():
    return dlpack_struct.Producer(0x10000, (1, 4), (16, 4), "float32", (7, 0))


REFUSED_SOURCES = {
    "another dtype": (lambda: pattern((1, 4), "float64"), TypeError, "float64.*convert x"),
    "integers of the same size": (lambda: pattern((1, 4), "int32"), TypeError, "int32"),
    "the other byte order": (
        lambda: np.zeros((1, 4), ">f4"),
        (TypeError, ValueError, BufferError),
        None,
    ),
    "a rank too low": (lambda: pattern((4,), "float32"), ValueError, "1 dim"),
    "a rank too high": (lambda: pattern((1, 1, 4), "float32"), ValueError, "3 dim"),
    "another row shape": (lambda: pattern((1, 5), "float32"), ValueError, "5"),
    "non-dense last dimension": (lambda: pattern((2, 8), "float32")[:, ::2], ValueError, "dense"),
    "reversed last dimension": (lambda: pattern((2, 4), "float32")[:, ::-1], ValueError, "dense"),
    "transposed": (lambda: pattern((4, 3), "float32").T, ValueError, "dense"),
    "another device": (on_gpu_7, (ValueError, TypeError), "7|GPU|cuda"),
    "a device of another kind": (of_vulkan, (ValueError, TypeError, BufferError), None),
    "None": (lambda: None, TypeError, "NoneType"),
    "a list": (lambda: [[1.0, 2.0, 3.0, 4.0]], TypeError, "list"),
    "a number": (lambda: 3.0, TypeError, "float"),
    "bytes": (lambda: b"0123456789abcdef", (TypeError, ValueError), None),
    "growth past the capacity": (
        lambda: pattern((991, 4), "float32"),
        pyvmm.CapacityError,
        "1000",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", REFUSED_SOURCES)
def test_source_is_refused(case, layout, empty):
    source, error, named = REFUSED_SOURCES[case]
    x = source()
    with empty(layout=layout) as t:
        t.append(pattern((10, 4), "float32"))
        before, n_calls = state(t), calls(t)
        with pytest.raises(error, match=named):
            t.append(x)
        assert calls(t) == n_calls
        with pytest.raises(error):
            pyvmm.append_many([t], [x])
        assert calls(t) == n_calls
        assert state(t) == before
        t.append(pattern((1, 4), "float32"))


@pytest.mark.parametrize(
    "changes",
    [
        {"data": (0, False)},
        {"typestr": "<f8"},
        {"shape": (1, 5)},
        {"shape": (-1, 4)},
        {"shape": (2, 4), "strides": (64, 8)},
        {"shape": "no shape"},
        {"data": None},
        {"mask": np.ones((1, 4))},
        {"stream": -1},
        {"stream": "no stream"},
    ],
    ids=str,
)
def test_interface_is_refused(cuda, changes):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda) as t:
        before = calls(t)
        with pytest.raises((TypeError, ValueError)):
            t.append(Interface(**changes))
        assert calls(t) == before
        assert t.length == 0


def test_cuda_source_for_a_host_tensor(host):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=host) as t:
        for x in (Interface(), on_gpu_7()):
            with pytest.raises((TypeError, ValueError), match="host"):
                t.append(x)
        assert t.length == 0


def test_stream_that_is_none(cuda):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda) as t:
        x = pattern((1, 4), "float32")
        for stream, error in (
            ("0", TypeError),
            (1.5, TypeError),
            (-2, (ValueError, OverflowError)),
        ):
            before = calls(t)
            with pytest.raises(error):
                t.append(x, stream=stream)
            assert calls(t) == before
        assert t.length == 0


def test_append_many_is_refused(empty):
    x = pattern((1, 4), "float32")
    with empty() as t, empty() as u:
        t.append(x)
        before = state(t), calls(t), state(u), calls(u)
        for tensors, sources, error in (
            ([t, u], [x], ValueError),
            ([t], [x, x], ValueError),
            ([t, t], [x, x], ValueError),
            ([t, u], [x, x[:, :2]], ValueError),
            ([t, u], [x, x.view("int32")], TypeError),
            ([t, u], [x, pattern((1001, 4), "float32")], pyvmm.CapacityError),
            ([t, x], [x, x], TypeError),
            (t, x, TypeError),
            ([None], [x], TypeError),
        ):
            with pytest.raises(error):
                pyvmm.append_many(tensors, sources)
            assert (state(t), calls(t), state(u), calls(u)) == before
        pyvmm.append_many([], [])


def test_map_many_is_refused(empty):
    with empty() as t, empty() as u:
        t.append(pattern((1, 4), "float32"))
        before = state(t), calls(t), state(u), calls(u)
        for tensors, n, error in (
            ([t, u], [1000], ValueError),
            ([t], [1000, 1000], ValueError),
            ([t, t], 1000, ValueError),
            ([t, u], [1000, -1], ValueError),
            ([t, u], [1000, 1001], pyvmm.CapacityError),
            ([t, u], [1000, 1.5], TypeError),
            ([t, u], "12", TypeError),
            ([t, u], None, TypeError),
            ([t, 3], 1000, TypeError),
            (t, 1000, TypeError),
            ([None], 1000, TypeError),
        ):
            with pytest.raises(error):
                pyvmm.map_many(tensors, n)
            assert (state(t), calls(t), state(u), calls(u)) == before
        pyvmm.map_many([], 1000)
        pyvmm.map_many([], [])


# ---- lengths ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_number_of_rows_is_refused(empty, layout):
    with empty(shape=(3, 0, 4), axis=1, layout=layout) as t:
        t.grow(10)
        before, n_calls = state(t), calls(t)
        for call, argument, error, named in (
            (t.grow, -1, ValueError, "-1"),
            (t.grow, 991, pyvmm.CapacityError, "991.*reserve a larger"),
            (t.grow, 1 << 63, (OverflowError, pyvmm.CapacityError), None),
            (t.grow, 1 << 64, (OverflowError, pyvmm.CapacityError), None),
            (t.grow, 2.0, TypeError, "float"),
            (t.grow, None, TypeError, "None"),
            (t.grow, "3", TypeError, "str"),
            (t.map, -1, ValueError, "-1"),
            (t.map, 1001, pyvmm.CapacityError, "1001.*reserve a larger"),
            (t.map, 1 << 64, (OverflowError, pyvmm.CapacityError), None),
            (t.truncate, -1, ValueError, "-1"),
            (t.truncate, 11, ValueError, "11"),
            (t.truncate, 1 << 64, (OverflowError, ValueError), None),
            (t.truncate, 1.0, TypeError, "float"),
            (t.fork, -1, ValueError, "-1"),
            (t.fork, 11, ValueError, "11"),
            (t.fork, 1.0, TypeError, "float"),
        ):
            with pytest.raises(error, match=named):
                call(argument)
            assert calls(t) == n_calls, (call, argument)
            assert state(t) == before, (call, argument)


def test_capacity_error_is_a_value_error():
    assert issubclass(pyvmm.CapacityError, pyvmm.VMMError)
    assert issubclass(pyvmm.CapacityError, ValueError)
    assert issubclass(pyvmm.OutOfMemoryError, pyvmm.VMMError)
    assert issubclass(pyvmm.OutOfMemoryError, MemoryError)
    assert issubclass(pyvmm.VMMError, Exception)


def test_exhausted_budget(make_pool, empty, device):
    block = smallest_block(device)
    pool = make_pool(block_size=block, max_bytes=3 * block)
    with empty(capacity=10 * block // 16, pool=pool) as t:
        t.grow(block // 16)
        before = state(t)
        with pytest.raises(pyvmm.OutOfMemoryError, match="budget") as error:
            t.grow(3 * block // 16)
        assert error.value.status == "VMM_ERR_OUT_OF_MEMORY"
        assert state(t) == before
        t.grow(2 * block // 16)


@pytest.mark.parametrize("layout", ["lane", "c"])
def test_budget_below_one_block_for_each_lane(make_pool, empty, device, layout):
    """The error tells what the layout needs at least."""
    block = smallest_block(device)
    pool = make_pool(block_size=block, max_bytes=3 * block)
    with empty(shape=(4, 0, 2), axis=1, layout=layout, pool=pool) as t:
        with pytest.raises(pyvmm.OutOfMemoryError, match="4 lanes.*seq"):
            t.grow(1)
        assert held(pool) == {}


# ---- objects at their end -----------------------------------------------------------


def test_closed_tensor(empty):
    t = empty()
    t.append(pattern((3, 4), "float32"))
    view = t[:2]
    before = calls(pyvmm.default_pool(t.device))
    t.close()
    t.close()  # closing twice is no error
    for use in (
        lambda: t.append(pattern((1, 4), "float32")),
        lambda: t.grow(1),
        lambda: t.map(1),
        lambda: t.truncate(0),
        lambda: t.trim(),
        lambda: t.fork(),
        lambda: t.reserved(),
        lambda: t[:1],
        lambda: t.view(0, 1),
        lambda: t.__dlpack__(),
        lambda: view.__dlpack__(),
        lambda: pyvmm.append_many([t], [pattern((1, 4), "float32")]),
        lambda: pyvmm.map_many([t], 1),
    ):
        with pytest.raises(pyvmm.VMMError, match="closed") as error:
            use()
        assert error.value.status == "VMM_ERR_CLOSED"
    if t.device != "host":
        assert calls(pyvmm.default_pool(t.device)) == before


def test_closed_pool(device):
    pool = pyvmm.Pool(device)
    pool.close()
    pool.close()
    for use in (
        lambda: pool.trim(),
        lambda: pool.on_oom(lambda n_bytes: False),
        lambda: pool.capture_begin(),
        lambda: pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device, pool=pool),
    ):
        with pytest.raises(pyvmm.VMMError, match="closed") as error:
            use()
        assert error.value.status == "VMM_ERR_CLOSED"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncation_and_close_under_live_exports(empty, layout):
    with empty(layout=layout) as t:
        t.append(pattern((10, 4), "float32"))
        capsule = t[2:6].__dlpack__()
        before, n_calls = state(t), calls(t)
        with pytest.raises(BufferError, match="6"):
            t.truncate(5)
        with pytest.raises(BufferError, match="export"):
            t.close()
        assert state(t) == before
        assert calls(t) == n_calls
        del capsule


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_tensor_whose_process_has_forked(device):
    out = run_python(f"""
        import os, numpy, pyvmm
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device={device!r})
        t.grow(5)
        view = t[:5]
        child = os.fork()
        if child == 0:
            uses = [lambda: t.append(numpy.zeros((1, 4), "float32")), lambda: t.grow(1),
                    lambda: t.map(9), lambda: t.truncate(0), lambda: t.trim(), lambda: t.fork(),
                    lambda: t.__dlpack__(), lambda: view.__dlpack__()]
            for use in uses:
                try:
                    use()
                    print("no error")
                except pyvmm.VMMError as error:
                    print(error.status, "parent" in str(error))
            os._exit(len(uses) if os.sys.stdout.flush() is None else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
    """)
    assert out.splitlines() == ["VMM_ERR_FORKED True"] * 8


def test_error_says_what_and_where(empty):
    with empty() as t:
        with pytest.raises(pyvmm.CapacityError) as error:
            t.grow(1001)
        assert error.value.status == "VMM_ERR_CAPACITY"
        assert error.value.operation == "grow"
        assert error.value.driver_code == 0
        assert "1001" in str(error.value)


def test_cuda_helper_is_what_the_interface_says(cuda):
    """The sources that are refused above are refused for what they say: said right, they
    are taken."""
    x = cuda_helper.InterfaceArray(pattern((1, 4), "float32"))
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda) as t:
        t.append(x)
        assert t.length == 1
    x.free()
