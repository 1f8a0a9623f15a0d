"""Several frameworks on one tensor in one process: each sees what the others wrote, and
all of their views stay right while the tensor grows."""

import gc
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import pyvmm  # noqa: E402


def make(device, capacity=100_000):
    return pyvmm.empty((2, 0, 3, 4), "float32", axis=1, capacity=capacity, device=device)


def test_torch_and_numpy_on_the_host():
    t = make("host")
    address = t.ptr
    expected, views = [], []
    for i in range(60):
        n = 1 + 37 * i % 300
        rows = np.full((2, n, 3, 4), i, "float32")
        turn = i % 4
        if turn == 0:
            t.append(rows)
        elif turn == 1:
            t.append(torch.from_numpy(rows))
        elif turn == 2:
            np.asarray(t.grow(n))[...] = rows
        else:
            torch.from_dlpack(t.grow(n)).copy_(torch.from_numpy(rows))
        expected.append(rows)
        views.append((np.asarray(t), torch.from_dlpack(t)))
    whole = np.concatenate(expected, axis=1)
    for a, b in views:
        assert a.__array_interface__["data"][0] == b.data_ptr() == t.ptr == address
        assert np.array_equal(a, whole[:, : a.shape[1]])
        assert np.array_equal(b.numpy(), whole[:, : b.shape[1]])
    with pytest.raises(BufferError):
        t.close()
    del a, b, views
    gc.collect()
    t.close()


def test_one_frameworks_view_is_anothers_source():
    t, other = make("host"), make("host")
    x = np.arange(120, dtype="float32").reshape(2, 5, 3, 4)
    t.append(x)
    other.append(torch.from_dlpack(t))
    other.append(np.asarray(t))
    other.append(np.from_dlpack(torch.from_dlpack(t)))
    assert np.array_equal(np.asarray(other), np.concatenate([x] * 3, axis=1))


def test_torch_cupy_and_jax_on_the_gpu():
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    jax = pytest.importorskip("jax", reason="jax is not installed")
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {str(error).splitlines()[0]}")

    def torch_rows(rows):
        return torch.from_numpy(rows).cuda()

    writers = [
        lambda t, rows: t.append(torch_rows(rows)),
        lambda t, rows: t.append(cupy.asarray(rows)),
        lambda t, rows: t.append(jax.device_put(rows, gpu)),
        lambda t, rows: t.append(rows),
        lambda t, rows: torch.from_dlpack(t.grow(rows.shape[1])).copy_(torch_rows(rows)),
        lambda t, rows: cupy.from_dlpack(t.grow(rows.shape[1])).set(rows),
    ]
    t = make("cuda:0")
    address = t.ptr
    expected, views = [], []
    for i in range(60):
        rows = np.full((2, 1 + 37 * i % 300, 3, 4), i, "float32")
        if i % len(writers) == 5:  # set() wants a dense target
            rows = np.full((2, 1, 3, 4), i, "float32")
        writers[i % len(writers)](t, rows)
        torch.cuda.synchronize()  # rows written through views are the writer's to order
        expected.append(rows)
        views.append((torch.from_dlpack(t), cupy.from_dlpack(t), jax.dlpack.from_dlpack(t)))
    whole = np.concatenate(expected, axis=1)
    for a, b, c in views:
        assert a.data_ptr() == b.data.ptr == c.unsafe_buffer_pointer() == t.ptr == address
        assert np.array_equal(a.cpu().numpy(), whole[:, : a.shape[1]])
        assert np.array_equal(cupy.asnumpy(b), whole[:, : b.shape[1]])
        assert np.array_equal(np.asarray(c), whole[:, : c.shape[1]])
    with pytest.raises(BufferError):
        t.close()
    del a, b, c, views
    gc.collect()
    t.close()
