"""Pools as the allocators of frameworks (pyvmm/_allocator.pyx), called as these call them."""

import ctypes

import pytest

import cuda_helper
import pyvmm
from pyvmm._allocator import Allocator, bind
from support import held, run_python


def entries(pool):
    """torch's two functions, by their names in the file, as torch finds them."""
    path, alloc, free = bind(pool)
    library = ctypes.CDLL(path)  # releases the GIL around each call
    alloc, free = getattr(library, alloc), getattr(library, free)
    alloc.restype = ctypes.c_void_p
    alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    free.restype = None
    free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    return alloc, free


# A pool that is bound stays so for the life of the process, hence one for the module.
@pytest.fixture(scope="module")
def bound():
    try:
        return pyvmm.Pool(cuda_helper.NAME, max_bytes="64MiB")
    except pyvmm.VMMError as error:
        pytest.skip(str(error))


def test_torch_takes_memory_within_the_budget(bound):
    alloc, free = entries(bound)
    first = alloc(20 << 20, 0, None)
    assert first and held(bound) == {"in_use": 20 << 20}
    assert alloc(50 << 20, 0, None) is None  # torch empties its cache and asks again
    assert held(bound) == {"in_use": 20 << 20}
    free(first, 20 << 20, 0, None)
    second = alloc(50 << 20, 0, None)
    assert second
    free(second, 50 << 20, 0, None)
    bound.trim(wait=True)
    assert held(bound) == {}


def test_tensors_that_grow_share_the_budget(bound):
    alloc, free = entries(bound)
    taken = alloc(40 << 20, 0, None)
    with pyvmm.empty((0, 1 << 20), "uint8", axis=0, capacity=64, pool=bound) as t:
        t.grow(24)
        with pytest.raises(pyvmm.OutOfMemoryError):
            t.grow(1)
        free(taken, 40 << 20, 0, None)
        t.grow(40)
    bound.trim(wait=True)


def test_no_callback_is_run(bound):
    """It would want the GIL, and perhaps the lock that the allocator is called under."""
    alloc, _ = entries(bound)
    ran = []
    bound.on_oom(lambda n_bytes: ran.append(n_bytes))
    assert alloc(65 << 20, 0, None) is None
    assert not ran


def test_what_cannot_be_served(bound):
    alloc, free = entries(bound)
    assert alloc(1 << 20, 1, None) is None
    assert alloc(1 << 20, -1, None) is None
    assert alloc(0, 0, None) is None
    free(None, 0, 0, None)
    free(None, 0, 99, None)


def test_one_pool_for_each_device(bound):
    assert bind(bound) == bind(bound)
    with pyvmm.Pool(cuda_helper.NAME) as other, pytest.raises(ValueError, match="another pool"):
        bind(other)
    with pyvmm.Pool(cuda_helper.NAME) as other:
        pass
    with pytest.raises(pyvmm.VMMError, match="closed"):
        bind(other)
    with pyvmm.Pool("host") as host, pytest.raises(ValueError, match="host"):
        bind(host)


def test_freeing_makes_no_driver_call_and_is_allowed_in_a_capture(bound):
    alloc, free = entries(bound)
    taken = alloc(2 << 20, 0, None)
    before = bound.stats()["driver_calls"]
    with bound.capturing():
        free(taken, 2 << 20, 0, None)
    assert bound.stats()["driver_calls"] == before
    bound.trim(wait=True)


def test_a_bound_pool_stays(cuda):
    """Whoever closes it, or leaves its block: torch goes on to ask it for memory."""
    run_python("""
        import gc
        import pyvmm
        from test_allocator import entries
        with pyvmm.Pool("cuda:0", max_bytes="64MiB") as pool:
            alloc, free = entries(pool)
            try:
                pool.close()
            except pyvmm.VMMError as error:
                assert "torch" in str(error) and error.status == "VMM_ERR_BUSY"
            assert not pool.closed
        assert pool.closed
        del pool
        gc.collect()
        others = [pyvmm.Pool("cuda:0", max_bytes="1GiB") for _ in range(8)]
        pointer = alloc(40 << 20, 0, None)
        assert pointer and not alloc(40 << 20, 0, None)
        free(pointer, 40 << 20, 0, None)
        assert alloc(40 << 20, 0, None)
    """)


def test_freeing_after_the_interpreter_has_gone(cuda):
    """By a destructor that runs at exit, when Python is no more."""
    run_python("""
        import ctypes, pyvmm
        from pyvmm._allocator import bind
        pool = pyvmm.Pool("cuda:0")
        path, alloc, free = bind(pool)
        library = ctypes.CDLL(path)
        getattr(library, alloc).restype = ctypes.c_void_p
        pointer = getattr(library, alloc)(ctypes.c_ssize_t(1 << 20), 0, None)
        assert pointer
        del pool
        # The C library runs it with the pointer as its argument, behind Py_Finalize.
        libc = ctypes.CDLL(None)
        libc.__cxa_atexit(ctypes.cast(getattr(library, free), ctypes.c_void_p),
                          ctypes.c_void_p(pointer), None)
    """)


def test_allocator_by_address(pool, device):
    allocator = Allocator(pool)
    pointer = allocator.alloc(1000)
    assert pointer and pool.stats()["in_use_bytes"] >= 1000
    allocator.free(pointer)
    with pytest.raises(ValueError, match="no allocation"):
        allocator.free(pointer)
    with pytest.raises(ValueError, match="0 bytes"):
        allocator.alloc(0)


def test_allocator_outlives_its_pool(device):
    with pyvmm.Pool(device) as pool:
        allocator = Allocator(pool)
        pointer = allocator.alloc(1000)
    with pytest.raises(pyvmm.VMMError, match="closed"):
        allocator.alloc(1000)
    allocator.free(pointer)
