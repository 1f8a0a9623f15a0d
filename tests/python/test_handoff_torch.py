"""torch and pyvmm share memory, both ways and through growth."""

from __future__ import annotations

import copy
import gc
import os
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import pyvmm  # noqa: E402

DTYPES = [
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]


def need_cuda() -> None:
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's: torch cannot use it")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture
def cuda():
    need_cuda()
    return "cuda:0"


@pytest.fixture(params=["host", "cuda:0"])
def device(request):
    if request.param != "host":
        need_cuda()
    return request.param


@pytest.fixture(params=["seq", "lane", "c"])
def layout(request):
    return request.param


def on(device):
    return "cpu" if device == "host" else device


def make(device, layout="seq", shape=(2, 0, 3, 4), axis=1, dtype=torch.float32, capacity=8192):
    return pyvmm.empty(shape, dtype, axis=axis, capacity=capacity, device=device, layout=layout)


def rows(device, *shape, dtype=torch.float32, seed=0):
    """Random bytes as an array of that shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool().to(on(device))
    n_bytes = shape[-1] * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], n_bytes), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).to(on(device))


def same(a, b):
    """Equal shape, dtype and bytes: NaN is like itself."""
    a, b = a.contiguous(), b.contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- torch reads ------------------------------------------------------------------------


def test_shares_memory_shape_and_strides(device, layout):
    t = make(device, layout)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    w = torch.from_dlpack(t)
    assert w.data_ptr() == t.ptr
    assert tuple(w.shape) == t.shape == (2, 5, 3, 4)
    assert tuple(s * w.element_size() for s in w.stride()) == tuple(t.strides)
    assert w.device == torch.device(on(device))
    assert same(w, x)
    if layout == "seq":
        assert w.stride() == (12, 24, 4, 1)
    else:
        assert w.stride()[1:] == (12, 4, 1)


def test_head_major_cache(device, layout):
    t = make(device, layout, shape=(2, 3, 0, 8), axis=2)
    x = rows(device, 2, 3, 7, 8)
    t.append(x)
    assert same(torch.from_dlpack(t), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype(device, dtype):
    t = make(device, dtype=dtype)
    x = rows(device, 2, 5, 3, 4, dtype=dtype)
    t.append(x)
    w = torch.from_dlpack(t)
    assert w.dtype == dtype
    assert w.data_ptr() == t.ptr
    assert same(w, x)


@pytest.mark.parametrize("shape, axis", [((0,), 0), ((1, 0, 1, 8), 1), ((1, 1, 0, 1), 2)])
def test_small_shapes(device, layout, shape, axis):
    t = make(device, layout, shape=shape, axis=axis)
    x = rows(device, *(6 if i == axis else n for i, n in enumerate(shape)))
    t.append(x)
    w = torch.from_dlpack(t)
    assert same(w, x)
    one = torch.from_dlpack(t[2:3])
    assert same(one, x.narrow(axis, 2, 1))


def test_length_zero(device, layout):
    t = make(device, layout)
    w = torch.from_dlpack(t)
    assert tuple(w.shape) == (2, 0, 3, 4)
    assert w.device == torch.device(on(device))
    del w
    t.append(rows(device, 2, 0, 3, 4))
    assert t.length == 0
    t.close()


def test_slices(device, layout):
    t = make(device, layout)
    x = rows(device, 2, 9, 3, 4)
    t.append(x)
    for view in (t[2:5], t.view(2, 5), t[-7:-4]):
        assert same(torch.from_dlpack(view), x[:, 2:5])
    assert torch.from_dlpack(t[4:4]).shape == (2, 0, 3, 4)


# ---- growth -----------------------------------------------------------------------------


def test_earlier_view_stays_right_through_growth(device, layout):
    t = make(device, layout, capacity=100_000)
    x = rows(device, 2, 3, 3, 4)
    t.append(x)
    address = t.ptr
    first = torch.from_dlpack(t)
    parts = [x]
    for i, n in enumerate([1, 300, 0, 17, 4096, 20_000]):
        parts.append(rows(device, 2, n, 3, 4, seed=i + 1))
        t.append(parts[-1])
    assert t.ptr == address == first.data_ptr()
    assert tuple(first.shape) == (2, 3, 3, 4)
    assert same(first, x)
    whole = torch.from_dlpack(t)
    assert whole.data_ptr() == address
    assert same(whole, torch.cat(parts, dim=1))


def test_many_small_appends_against_cat(device, layout):
    t = make(device, layout)
    parts = [rows(device, 2, 1 + i % 7, 3, 4, seed=i) for i in range(100)]
    for part in parts:
        t.append(part)
    assert same(torch.from_dlpack(t), torch.cat(parts, dim=1))


# ---- torch writes -----------------------------------------------------------------------


def test_writes_into_a_grown_view(device, layout):
    t = make(device, layout)
    t.append(rows(device, 2, 2, 3, 4))
    x = rows(device, 2, 5, 3, 4, seed=1)
    new = torch.from_dlpack(t.grow(5))
    new.copy_(x)
    assert same(torch.from_dlpack(t)[:, 2:], x)


def test_out_argument(device):
    t = make(device)
    a, b = torch.rand(2, 5, 3, 4, device=on(device)), torch.rand(2, 5, 3, 4, device=on(device))
    torch.add(a, b, out=torch.from_dlpack(t.grow(5)))
    assert torch.equal(torch.from_dlpack(t), a + b)


def test_writes_through_the_reservation(device, layout):
    t = make(device, layout)
    everything = torch.from_dlpack(t.reserved())
    assert tuple(everything.shape) == (2, t.capacity, 3, 4)
    assert everything.data_ptr() == t.ptr
    t.grow(300)
    x = rows(device, 2, 300, 3, 4)
    everything[:, :300] = x
    assert same(torch.from_dlpack(t), x)


def test_attention_reads_the_cache(device, layout):
    k, v = (make(device, layout, shape=(2, 3, 0, 16), axis=2) for _ in range(2))
    new_k, new_v = (torch.randn(2, 3, 40, 16, device=on(device)) for _ in range(2))
    pyvmm.append_many([k, v], [new_k, new_v])
    q = torch.randn(2, 3, 1, 16, device=on(device))
    attend = torch.nn.functional.scaled_dot_product_attention
    ours = attend(q, torch.from_dlpack(k), torch.from_dlpack(v))
    torch.testing.assert_close(ours, attend(q, new_k, new_v))


# ---- life -------------------------------------------------------------------------------


def test_a_live_tensor_refuses_close_and_truncate(device):
    t = make(device)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    w = torch.from_dlpack(t)
    with pytest.raises(BufferError):
        t.close()
    with pytest.raises(BufferError):
        t.truncate(4)
    assert t.length == 5
    t.append(rows(device, 2, 2, 3, 4))
    t.trim()
    t.truncate(5)  # above what is exported
    assert same(w, x)
    del w
    t.truncate(1)
    t.close()


def test_slices_of_a_torch_tensor_pin_too(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    part = torch.from_dlpack(t)[:, 1:2].unsqueeze(0)
    with pytest.raises(BufferError):
        t.close()
    del part
    t.close()


def test_reservation_pins_closing_only(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    everything = torch.from_dlpack(t.reserved())
    t.truncate(1)
    with pytest.raises(BufferError):
        t.close()
    del everything
    t.close()


def test_view_of_truncated_rows_cannot_be_exported(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    view = t[2:5]
    t.truncate(3)
    with pytest.raises((BufferError, pyvmm.VMMError)):
        torch.from_dlpack(view)
    t.close()


def test_an_unused_capsule_holds_nothing(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    for _ in range(3):
        t.__dlpack__()
        t.__dlpack__(max_version=(1, 0))
    t.truncate(0)
    t.close()


def test_memory_lives_as_long_as_the_torch_tensor(device):
    pool = pyvmm.Pool(device)
    t = pyvmm.empty((0, 1024), "float32", capacity=100_000, device=device, pool=pool)
    x = rows(device, 2000, 1024)
    t.append(x)
    w = torch.from_dlpack(t)
    del t
    gc.collect()
    assert pool.stats()["in_use_bytes"] > 0
    assert same(w, x)
    del w
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.trim(wait=True)
    assert pool.stats()["queued_bytes"] == 0
    pool.close()


def test_last_reference_dropped_on_another_thread(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    held = [torch.from_dlpack(t)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    t.close()


def test_copy_is_not_an_export(device):
    t = make(device)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    try:
        w = torch.from_dlpack(t, copy=True)
    except BufferError as error:
        assert "copy" in str(error)
        return
    assert same(w, x)
    assert w.data_ptr() != t.ptr
    t.close()
    assert same(w, x)


def test_closed_tensor_cannot_be_exported(device):
    t = make(device)
    t.close()
    with pytest.raises(pyvmm.VMMError):
        torch.from_dlpack(t)


def test_tensor_itself_refuses_copying(device):
    t = make(device)
    with pytest.raises(TypeError):
        copy.deepcopy(t)


# ---- torch tensors appended -----------------------------------------------------------------


def sources(device):
    yield "contiguous", rows(device, 2, 5, 3, 4)
    yield "transposed", rows(device, 2, 3, 5, 4).transpose(1, 2)
    yield "sliced", rows(device, 4, 9, 3, 4)[::2, 2:7]
    yield "last dimension sliced", rows(device, 2, 5, 3, 9)[..., 2:6]
    yield "expanded", rows(device, 1, 5, 3, 4).expand(2, 5, 3, 4)
    yield "heads expanded", rows(device, 2, 5, 1, 4).expand(2, 5, 3, 4)
    yield "one row", rows(device, 2, 1, 3, 4)
    yield "no rows", rows(device, 2, 0, 3, 4)
    yield "many rows", rows(device, 2, 3000, 3, 4)
    yield "offset storage", rows(device, 2, 6, 3, 4)[:, 1:]


SOURCES = [name for name, _ in sources("host")]


@pytest.mark.parametrize("name", SOURCES)
def test_append(device, layout, name):
    x = dict(sources(device))[name]
    t = make(device, layout)
    t.append(rows(device, 2, 2, 3, 4, seed=9))
    t.append(x)
    t.append(x)
    assert same(torch.from_dlpack(t)[:, 2:], torch.cat([x, x], dim=1))


@pytest.mark.parametrize("name", SOURCES)
def test_append_from_host_to_gpu(cuda, layout, name):
    x = dict(sources("host"))[name]
    t = make(cuda, layout)
    t.append(x)
    x.zero_() if name not in ("expanded", "heads expanded") else None
    # A host source has been read when append returns: zeroing it changes nothing.
    assert same(torch.from_dlpack(t).cpu(), dict(sources("host"))[name])


def test_append_many_is_one_step(device):
    k, v = make(device), make(device, shape=(2, 0, 3, 8))
    new_k, new_v = rows(device, 2, 3, 5, 4).transpose(1, 2), rows(device, 2, 5, 3, 8)
    pyvmm.append_many([k, v], [new_k, new_v])
    assert same(torch.from_dlpack(k), new_k)
    assert same(torch.from_dlpack(v), new_v)


def bad_sources(device):
    x = rows(device, 2, 5, 3, 4)
    yield "dtype", TypeError, x.double()
    yield "bfloat16 for float32", TypeError, x.bfloat16()
    yield "int32 for float32", TypeError, x.view(torch.int32)
    yield "rank", ValueError, x[0]
    yield "row shape", ValueError, rows(device, 2, 5, 4, 4)
    yield "batch", ValueError, rows(device, 3, 5, 3, 4)
    yield "last dimension strided", ValueError, rows(device, 2, 5, 3, 8)[..., ::2]
    yield (
        "gradient",
        (BufferError, TypeError, RuntimeError),
        torch.rand(2, 5, 3, 4, device=on(device), requires_grad=True),
    )
    yield (
        "meta",
        (BufferError, TypeError, ValueError, RuntimeError),
        torch.empty(2, 5, 3, 4, device="meta"),
    )
    yield "sparse", (BufferError, TypeError, ValueError, RuntimeError), x.to_sparse()
    yield "too many rows", pyvmm.CapacityError, rows(device, 2, 9000, 3, 4)


@pytest.mark.parametrize("name", [name for name, _, _ in bad_sources("host")])
def test_refused_append_changes_nothing(device, name):
    _, error, x = next(entry for entry in bad_sources(device) if entry[0] == name)
    t, other = make(device), make(device)
    good = rows(device, 2, 5, 3, 4)
    t.append(good)
    with pytest.raises(error) as caught:
        t.append(x)
    assert str(caught.value)
    with pytest.raises(error):
        pyvmm.append_many([other, t], [good, x])
    assert (t.length, other.length) == (5, 0)
    assert same(torch.from_dlpack(t), good)
    t.append(good)
    assert same(torch.from_dlpack(t), torch.cat([good, good], dim=1))


def test_conjugate_is_refused_or_right(device):
    t = make(device, dtype=torch.complex64)
    x = torch.randn(2, 5, 3, 4, dtype=torch.complex64, device=on(device)).conj()
    try:
        t.append(x)
    except (BufferError, TypeError, ValueError):
        assert t.length == 0
    else:
        assert torch.equal(torch.from_dlpack(t), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_negated_is_refused(device, dtype):
    t = make(device, dtype=dtype)
    x = torch._neg_view(torch.ones(2, 5, 3, 4, dtype=dtype, device=on(device)))
    with pytest.raises(BufferError, match="resolve_neg"):
        t.append(x)
    t.append(x.resolve_neg())
    assert torch.equal(torch.from_dlpack(t), x)


def test_gpu_source_for_a_host_tensor(cuda):
    t = make("host")
    with pytest.raises((BufferError, TypeError, ValueError)):
        t.append(rows(cuda, 2, 5, 3, 4))
    assert t.length == 0


def test_appending_its_own_rows(device, layout):
    t = make(device, layout)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    t.append(torch.from_dlpack(t))
    assert same(torch.from_dlpack(t), torch.cat([x, x], dim=1))


def test_source_may_be_dropped_after_append(device):
    t = make(device, shape=(0, 1024), axis=0, capacity=100_000)
    for i in range(50):
        x = torch.full((100, 1024), float(i), device=on(device))
        t.append(x)
        del x
        torch.full((100, 1024), -1.0, device=on(device))  # takes the freed memory
    w = torch.from_dlpack(t)
    expected = torch.arange(50.0, device=on(device)).repeat_interleave(100)
    assert torch.equal(w, expected[:, None].expand(5000, 1024))


# ---- streams ----------------------------------------------------------------------------

SLEEP = 50_000_000  # clock cycles, some 30 ms: what follows is late without an order


def test_append_on_the_producers_stream(cuda):
    t = make(cuda)
    stream = torch.cuda.Stream()
    x = torch.zeros(2, 5, 3, 4, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        x.fill_(7)
        t.append(x)
        w = torch.from_dlpack(t)
        total = w.sum()
    stream.synchronize()
    assert total.item() == 7 * 120


@pytest.mark.parametrize("form", ["handle", "object"])
def test_append_on_a_given_stream_waits_for_the_producer(cuda, form):
    t = make(cuda)
    stream = torch.cuda.Stream()
    x = torch.zeros(2, 5, 3, 4, device=cuda)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    x.fill_(7)
    t.append(x, stream=stream.cuda_stream if form == "handle" else stream)
    del x
    torch.zeros(2, 5, 3, 4, device=cuda)  # takes x's memory if nobody kept it
    with torch.cuda.stream(stream):
        total = torch.from_dlpack(t).sum()
    stream.synchronize()
    assert total.item() == 7 * 120


def test_two_streams_then_a_third(cuda):
    t = make(cuda)
    first, second, third = (torch.cuda.Stream() for _ in range(3))
    for i in range(20):
        stream = (first, second)[i % 2]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP // 20)
            t.append(torch.full((2, 1, 3, 4), float(i), device=cuda))
    with torch.cuda.stream(third):
        got = torch.from_dlpack(t)[0, :, 0, 0].clone()
    third.synchronize()
    assert got.tolist() == [float(i) for i in range(20)]


def test_handoff_of_a_grown_view_to_another_stream(cuda):
    t = make(cuda)
    stream = torch.cuda.Stream()
    torch.cuda._sleep(SLEEP)
    t.append(torch.full((2, 5, 3, 4), 3.0, device=cuda))
    with torch.cuda.stream(stream):
        total = torch.from_dlpack(t[0:5]).sum()
    stream.synchronize()
    assert total.item() == 3 * 120


def test_stream_values_of_the_protocol(cuda):
    t = make(cuda)
    t.append(rows(cuda, 2, 5, 3, 4))
    for stream in (None, -1, 1, 2, torch.cuda.Stream().cuda_stream):
        t.__dlpack__(stream=stream)
    with pytest.raises((BufferError, ValueError)):
        t.__dlpack__(stream=0)
    t.close()


def test_stream_on_the_host_is_refused_or_ignored():
    t = make("host")
    for stream in (None, -1):
        t.__dlpack__(stream=stream)
    t.close()


def test_memory_of_dropped_tensors_under_running_kernels(cuda):
    pool = pyvmm.Pool(cuda, max_bytes="64MiB")
    for i in range(20):
        t = pyvmm.empty((0, 1024), "float32", capacity=16384, device=cuda, pool=pool)
        t.append(torch.full((8192, 1024), float(i), device=cuda))
        w = torch.from_dlpack(t)
        torch.cuda._sleep(SLEEP // 10)
        total = w[:, 0].sum()  # still running when the memory is given up
        del w, t
        assert total.item() == 8192.0 * i
    pool.close()


def test_captured_appends_while_tensors_are_dropped(cuda):
    pool = pyvmm.Pool(cuda)
    t = pyvmm.empty((0, 1024), "float32", capacity=4096, device=cuda, pool=pool)
    t.map(64)
    doomed = [
        pyvmm.empty((0, 1024), "float32", capacity=4096, device=cuda, pool=pool) for _ in range(4)
    ]
    for other in doomed:
        other.append(torch.ones(64, 1024, device=cuda))
    x = torch.ones(1, 1024, device=cuda)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    pool.capture_begin()
    try:
        with torch.cuda.graph(graph):
            for i in range(64):
                t.append(x * float(i))
                if doomed:
                    doomed.pop()
    finally:
        pool.capture_end()
    x.fill_(2)
    graph.replay()
    t.advance(64)
    torch.cuda.synchronize()
    expected = 2 * torch.arange(64.0, device=cuda)
    assert torch.equal(torch.from_dlpack(t)[:, 5], expected)
    del graph
