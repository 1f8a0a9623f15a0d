"""Numba reads and writes a tensor's memory in place: on the host through NumPy's arrays, on a GPU
through __cuda_array_interface__."""

import os

import numpy as np
import pytest

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip("the simulated driver's memory is not a GPU's", allow_module_level=True)
numba = pytest.importorskip("numba", reason="Numba is not installed")

import pyvmm  # noqa: E402
from support import to_numpy  # noqa: E402


def numbers(rows, first):
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            rows[i, j] = first + 10 * i + j


def test_compiled_code_writes_what_grow_returns(host):
    write = numba.njit(numbers)
    with pyvmm.empty((0, 4), "float64", axis=0, capacity=100, device=host) as t:
        for first, n in ((0, 3), (1000, 5)):
            write(np.asarray(t.grow(n)), first)
        expected = np.empty((8, 4))
        numbers(expected[:3], 0)
        numbers(expected[3:], 1000)
        assert (to_numpy(t) == expected).all()


def test_compiled_code_reads_strided_lanes(host):
    total = numba.njit(lambda a: a.sum())
    with pyvmm.empty((3, 0, 4), "int64", axis=1, capacity=9000, device=host, layout="c") as t:
        x = np.arange(3 * 7 * 4).reshape(3, 7, 4)
        t.append(x)
        assert total(np.asarray(t)) == x.sum()


@pytest.fixture
def cuda_module(cuda):
    module = pytest.importorskip("numba.cuda")
    if not module.is_available():
        pytest.skip("Numba sees no CUDA device")
    return module


def test_array_on_a_gpu(cuda, cuda_module):
    x = np.arange(12, dtype="float32").reshape(3, 4)
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device=cuda) as t:
        t.append(x)
        shared = cuda_module.as_cuda_array(t)
        t.append(x)  # the array is of the rows of its making
        assert shared.shape == (3, 4) and shared.device_ctypes_pointer.value == t.ptr
        assert (shared.copy_to_host() == x).all()


def test_kernel_on_a_gpu(cuda, cuda_module):
    @cuda_module.jit
    def nothing():
        pass

    try:
        nothing[1, 1]()
    except AttributeError as error:
        pytest.skip(f"this Numba does not launch kernels with this NumPy: {error}")

    @cuda_module.jit
    def write(rows, first):
        i = cuda_module.grid(1)
        if i < rows.shape[0]:
            for j in range(rows.shape[1]):
                rows[i, j] = first + 10 * i + j

    with pyvmm.empty((0, 4), "float64", axis=0, capacity=100, device=cuda) as t:
        for first, n in ((0, 3), (1000, 5)):
            write[1, 32](cuda_module.as_cuda_array(t.grow(n)), first)
        cuda_module.synchronize()
        expected = np.empty((8, 4))
        numbers(expected[:3], 0)
        numbers(expected[3:], 1000)
        assert (to_numpy(t) == expected).all()
