"""JAX and pyvmm share memory, both ways and through growth.

JAX takes arrays that are a permutation of dense memory, so what it sees of a tensor is in
layout "seq", or has one lane. It treats arrays as immutable: rows in use do not change, and
the export of rows covers these alone, so an array of JAX's stays right while the tensor grows.
"""

import gc
import os
import threading

# Beside others on the same GPU; read when JAX first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import pytest

from model import pattern, same

jax = pytest.importorskip("jax", reason="jax is not installed")
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402

import pyvmm  # noqa: E402

DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "complex64",
    "complex128",
]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.fixture(params=["host", "cuda:0"])
def device(request):
    if request.param == "host":
        return request.param
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's: JAX cannot use it")
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {str(error).splitlines()[0]}")
    return request.param


def place(x, device):
    """A NumPy array as an array of JAX's on that device."""
    return jax.device_put(x, jax.devices("cpu" if device == "host" else "gpu")[0])


def make(device, layout="seq", shape=(2, 0, 3, 4), axis=1, dtype="float32", capacity=8192):
    return pyvmm.empty(shape, dtype, axis=axis, capacity=capacity, device=device, layout=layout)


def rows(device, *shape, dtype="float32", seed=0):
    return place(pattern(shape, jnp.dtype(dtype), seed), device)


def equal(a, b):
    return same(np.asarray(a), np.asarray(b))


from_dlpack = jax.dlpack.from_dlpack


# ---- JAX reads ----------------------------------------------------------------------------


def test_shares_memory(device):
    t = make(device)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    a = from_dlpack(t)
    assert a.unsafe_buffer_pointer() == t.ptr
    assert a.shape == (2, 5, 3, 4)
    assert a.devices() == x.devices()
    assert equal(a, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(device, dtype):
    t = make(device, dtype=dtype)
    x = rows(device, 2, 5, 3, 4, dtype=dtype)
    t.append(x)
    a = from_dlpack(t)
    assert a.dtype == t.dtype == x.dtype
    assert a.unsafe_buffer_pointer() == t.ptr
    assert equal(a, x)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_where_jax_takes_it(device, dtype):
    t = make(device, dtype=dtype)
    x = pattern((2, 5, 3, 4), jnp.dtype(dtype))
    t.append(x)
    try:
        a = from_dlpack(t)
    except Exception as error:
        t.close()  # the refused capsule pins nothing
        pytest.skip(f"this JAX does not take {dtype}: {str(error).splitlines()[0]}")
    assert a.dtype == t.dtype
    assert equal(a, x)


def test_only_dense_permutations(device):
    """One lane is dense whatever the layout's name; several have gaps between them."""
    one = make(device, "lane", shape=(1, 0, 3, 4))
    x = rows(device, 1, 5, 3, 4)
    one.append(x)
    assert equal(from_dlpack(one), x)
    for layout in ("lane", "c"):
        t = make(device, layout)
        t.append(rows(device, 2, 5, 3, 4))
        with pytest.raises(Exception, match="(?i)strid|layout|compact|dense|contiguous"):
            from_dlpack(t)
        gc.collect()
        t.close()  # the refused capsule pins nothing


@pytest.mark.parametrize("shape, axis", [((0,), 0), ((1, 0, 1, 8), 1), ((1, 1, 0, 1), 2)])
def test_small_shapes(device, shape, axis):
    t = make(device, shape=shape, axis=axis)
    x = rows(device, *(6 if i == axis else n for i, n in enumerate(shape)))
    t.append(x)
    assert equal(from_dlpack(t), x)


def test_length_zero(device):
    t = make(device)
    assert from_dlpack(t).shape == (2, 0, 3, 4)
    t.append(rows(device, 2, 0, 3, 4))
    assert t.length == 0
    gc.collect()
    t.close()


def test_slices(device):
    t = make(device)
    x = rows(device, 2, 9, 3, 4)
    t.append(x)
    for view in (t[2:5], t.view(2, 5), t[-7:-4]):
        assert equal(from_dlpack(view), x[:, 2:5])


# ---- growth -----------------------------------------------------------------------------


def test_earlier_array_stays_right_through_growth(device):
    t = make(device, capacity=100_000)
    x = rows(device, 2, 3, 3, 4)
    t.append(x)
    address = t.ptr
    first = from_dlpack(t)
    parts = [x]
    for i, n in enumerate([1, 300, 0, 17, 4096, 20_000]):
        parts.append(rows(device, 2, n, 3, 4, seed=i + 1))
        t.append(parts[-1])
    assert t.ptr == address == first.unsafe_buffer_pointer()
    assert equal(first, x)
    whole = from_dlpack(t)
    assert whole.unsafe_buffer_pointer() == address
    assert equal(whole, np.concatenate([np.asarray(part) for part in parts], axis=1))


def test_computes_on_the_cache(device):
    t = make(device, shape=(0, 64), axis=0)
    x = place(np.arange(128 * 64, dtype="float32").reshape(128, 64), device)
    t.append(x)
    total = jax.jit(lambda a: (a * 2).sum(axis=0))
    assert equal(total(from_dlpack(t)), total(x))


# ---- life -------------------------------------------------------------------------------


def test_a_live_array_refuses_close_and_truncate(device):
    t = make(device)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    a = from_dlpack(t)
    for refused in (t.close, lambda: t.truncate(4)):
        with pytest.raises(BufferError):
            refused()
    t.append(x)
    t.trim()
    t.truncate(5)
    assert equal(a, x)
    a.block_until_ready()
    del a
    gc.collect()
    t.truncate(1)
    t.close()


def test_memory_lives_as_long_as_the_array(device):
    pool = pyvmm.Pool(device)
    t = pyvmm.empty((0, 1024), "float32", capacity=100_000, device=device, pool=pool)
    x = rows(device, 2000, 1024)
    t.append(x)
    a = from_dlpack(t)
    del t
    gc.collect()
    assert pool.stats()["in_use_bytes"] > 0
    assert equal(a, x)
    del a
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.trim(wait=True)
    pool.close()


def test_last_reference_dropped_on_another_thread(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    held = [from_dlpack(t)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    t.close()


def test_closed_tensor_cannot_be_exported(device):
    t = make(device)
    t.close()
    with pytest.raises(pyvmm.VMMError):
        from_dlpack(t)


# ---- arrays of JAX's appended ------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [0, 1, 5, 3000])
@pytest.mark.parametrize("layout", ["seq", "lane", "c"])
def test_append(device, layout, n_rows):
    t = make(device, layout)
    x = rows(device, 2, n_rows, 3, 4)
    t.append(x)
    t.append(jnp.transpose(rows(device, 2, 3, 5, 4), (0, 2, 1, 3)))
    assert t.length == n_rows + 5
    if layout == "seq":
        assert equal(from_dlpack(t[0:n_rows]), x)
        y = jnp.transpose(rows(device, 2, 3, 5, 4), (0, 2, 1, 3))
        assert equal(np.asarray(from_dlpack(t))[:, n_rows:], y)


def test_append_of_a_result_that_is_still_being_computed(device):
    n_steps = 200 if device == "host" else 5000  # tens of milliseconds

    @jax.jit
    def work(a):
        return jax.lax.fori_loop(0, n_steps, lambda _, b: jnp.tanh(b @ b) + a, a)[:4]

    a = rows(device, 256, 256, dtype="uint8").astype("float32") / 4096
    expected = work(a).block_until_ready()  # compiled, so that the next call returns at once
    t = make(device, shape=(0, 256), axis=0)
    t.append(work(a))
    assert equal(from_dlpack(t), expected)


def test_append_of_dtypes_jax_exports(device):
    for dtype in DTYPES:
        t = make(device, dtype=dtype)
        x = rows(device, 2, 5, 3, 4, dtype=dtype)
        t.append(x)
        assert equal(from_dlpack(t), x), dtype


def test_append_many(device):
    k, v = make(device), make(device, shape=(2, 0, 3, 8))
    new_k, new_v = rows(device, 2, 5, 3, 4), rows(device, 2, 5, 3, 8)
    pyvmm.append_many([k, v], [new_k, new_v])
    assert equal(from_dlpack(k), new_k)
    assert equal(from_dlpack(v), new_v)


def bad_sources(device):
    x = rows(device, 2, 5, 3, 4)
    return {
        "dtype": (TypeError, x.astype("float64")),
        "int32 for float32": (TypeError, x.view("int32")),
        "rank": (ValueError, x[0]),
        "row shape": (ValueError, rows(device, 2, 5, 4, 4)),
        "too many rows": (pyvmm.CapacityError, rows(device, 2, 9000, 3, 4)),
    }


@pytest.mark.parametrize(
    "name", ["dtype", "int32 for float32", "rank", "row shape", "too many rows"]
)
def test_refused_append_changes_nothing(device, name):
    error, x = bad_sources(device)[name]
    t, other = make(device), make(device)
    good = rows(device, 2, 5, 3, 4)
    t.append(good)
    with pytest.raises(error) as caught:
        t.append(x)
    assert str(caught.value)
    with pytest.raises(error):
        pyvmm.append_many([other, t], [good, x])
    assert (t.length, other.length) == (5, 0)
    assert equal(from_dlpack(t), good)
