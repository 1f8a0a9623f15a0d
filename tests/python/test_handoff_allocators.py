"""torch's and CuPy's own memory from a pool: pyvmm.torch.allocator, pyvmm.cupy.allocator."""

import gc
import os

import pytest

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip("the simulated driver's memory is not a GPU's", allow_module_level=True)

import pyvmm

GIB = 1 << 30


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch


@pytest.fixture
def cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"CuPy has no CUDA device: {error}")
    return cupy


# A pool that is bound to torch's entries stays so for the life of the process.
@pytest.fixture(scope="module")
def bound():
    try:
        return pyvmm.Pool("cuda:0", max_bytes=GIB)
    except pyvmm.VMMError as error:
        pytest.skip(str(error))


def grown(pool, n_mib):
    t = pyvmm.empty((0, 1 << 20), "uint8", axis=0, capacity=4096, pool=pool)
    t.grow(n_mib)
    return t


def test_torch_shares_the_budget(torch, bound):
    import pyvmm.torch

    memory = torch.cuda.MemPool(pyvmm.torch.allocator(bound).allocator())
    with torch.cuda.use_mem_pool(memory):
        a = torch.full((300 << 20,), 3, dtype=torch.uint8, device="cuda")
        assert bound.stats()["in_use_bytes"] >= 300 << 20
        t = grown(bound, 600)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(300 << 20, dtype=torch.uint8, device="cuda")
        t.close()
        b = torch.full((300 << 20,), 4, dtype=torch.uint8, device="cuda")
    assert bool((a == 3).all()) and bool((b == 4).all())
    del a, b, memory
    gc.collect()
    torch.cuda.empty_cache()
    bound.trim(wait=True)
    assert bound.stats()["in_use_bytes"] == 0


def test_a_model_of_torch_runs_in_a_pool(torch, bound):
    import pyvmm.torch

    torch.manual_seed(1)
    x = torch.randn(16, 64, device="cuda")
    memory = torch.cuda.MemPool(pyvmm.torch.allocator(bound).allocator())
    with torch.cuda.use_mem_pool(memory):
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 8)).cuda()
        inside = model(x)
    assert bound.stats()["in_use_bytes"] > 0
    outside = torch.nn.functional.linear(
        torch.nn.functional.linear(x, model[0].weight, model[0].bias),
        model[1].weight,
        model[1].bias,
    )
    assert torch.allclose(inside, outside)
    del model, inside, outside, memory
    gc.collect()
    torch.cuda.empty_cache()


def test_torch_captures_with_memory_of_a_pool(torch, bound):
    import pyvmm.torch

    memory = torch.cuda.MemPool(pyvmm.torch.allocator(bound).allocator())
    x = torch.zeros(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), bound.capturing():
        with torch.cuda.graph(graph, pool=memory.id, stream=stream):
            y = x * 2 + 1
    x.fill_(3)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 7).all())
    del y, graph, memory
    gc.collect()
    torch.cuda.empty_cache()


def test_torch_refuses_a_second_pool(torch, bound):
    import pyvmm.torch

    pyvmm.torch.allocator(bound)
    with pyvmm.Pool("cuda:0") as other, pytest.raises(ValueError, match="another pool"):
        pyvmm.torch.allocator(other)


def test_cupy_shares_the_budget(cupy):
    import pyvmm.cupy

    with pyvmm.Pool("cuda:0", max_bytes=GIB) as pool:
        malloc = pyvmm.cupy.allocator(pool)
        with cupy.cuda.using_allocator(malloc):
            a = cupy.full(300 << 20, 3, "uint8")
            t = grown(pool, 600)
            with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                cupy.empty(300 << 20, "uint8")
            t.close()
            b = cupy.full(300 << 20, 4, "uint8")
            # By reductions, whose own memory is small.
            assert int(a.min()) == int(a.max()) == 3 and int(b.min()) == int(b.max()) == 4
            del a
            gc.collect()
            c = cupy.full(600 << 20, 5, "uint8")  # CuPy's pool gives back what it keeps of a
            assert int(c.min()) == int(c.max()) == 5 and int(b.min()) == int(b.max()) == 4
            assert cupy.empty(0, "uint8").size == 0
            del b, c
        gc.collect()
        malloc.__self__.free_all_blocks()  # CuPy's pool keeps them
        pool.trim(wait=True)
        assert pool.stats()["in_use_bytes"] == 0


def test_cupy_arrays_outlive_the_pool(cupy):
    import pyvmm.cupy

    with (
        pyvmm.Pool("cuda:0") as pool,
        cupy.cuda.using_allocator(pyvmm.cupy.allocator(pool)),
    ):
        a = cupy.arange(1000)
    assert int(a.sum()) == 499500
    del a
    gc.collect()


def test_cupy_refuses_the_host(cupy):
    import pyvmm.cupy

    with pyvmm.Pool("host") as pool, pytest.raises(ValueError, match="host"):
        pyvmm.cupy.allocator(pool)
