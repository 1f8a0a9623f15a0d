"""One memory: whom a pool asks before it gives up, and what it then says."""

import sys
import textwrap
import threading

import pytest

import cuda_helper
import pyvmm
from conftest import SIMULATED
from support import held, run_python

# A small device, a pool that is to fill it, and a framework that holds some of it: what
# pyvmm knows of CuPy is the interface of its memory pool.
SMALL_DEVICE = """
    import sys, types
    import numpy, cuda_helper, pyvmm
    MIB = 1 << 20

    class FrameworkPool:
        def __init__(self):
            self.used, self.free = [], []
        def take(self, n_bytes):
            self.used.append(cuda_helper.DeviceArray(numpy.zeros(n_bytes, "uint8")))
            self.n_bytes = n_bytes
        def drop(self):
            self.free.append(self.used.pop())
        def used_bytes(self):
            return len(self.used) * getattr(self, "n_bytes", 0)
        def free_bytes(self):
            return len(self.free) * getattr(self, "n_bytes", 0)
        def free_all_blocks(self):
            while self.free:
                self.free.pop().free()

    class Device:
        def __init__(self, index):
            assert index == 0
        def __enter__(self):
            return self
        def __exit__(self, *exception):
            pass

    framework = FrameworkPool()
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(
        Device=Device, runtime=types.SimpleNamespace(is_hip=cuda_helper.IS_HIP)
    )
    cupy.get_default_memory_pool = lambda: framework
    sys.modules["cupy"] = cupy

    def rows(pool, n_mib):
        t = pyvmm.empty((0, MIB), "uint8", axis=0, capacity=1 << 20, pool=pool, block_size="2MiB")
        t.grow(n_mib)
        return t
"""


def small_device(program, **environment):
    if not SIMULATED:
        pytest.skip("needs a device of 64 MiB: the simulated one, PYVMM_TEST_DEVICE=sim")
    code = textwrap.dedent(SMALL_DEVICE) + textwrap.dedent(program)
    return run_python(code, VMM_SIM_MEMORY=str(64 << 20), **environment)


def test_a_framework_gives_its_cache_back():
    said = small_device("""
        pool = pyvmm.Pool("cuda:0")
        framework.take(40 * MIB)
        framework.drop()
        t = rows(pool, 16)
        t.grow(40)                       # fits only without the cache
        print(t.length, framework.free_bytes())
    """)
    assert said.split() == ["56", "0"]


def test_what_a_framework_uses_it_keeps_and_the_error_says_so():
    said = small_device("""
        pool = pyvmm.Pool("cuda:0")
        framework.take(40 * MIB)
        t = rows(pool, 16)
        try:
            t.grow(40)
        except pyvmm.OutOfMemoryError as error:
            print(error)
            print([(h.name, h.in_use_bytes // MIB, h.unused_bytes // MIB) for h in error.holders])
        print(t.length, framework.used_bytes() // MIB)
    """)
    lines = said.splitlines()
    assert lines[0].startswith(f"[{cuda_helper.driver_name('cuMemCreate')}][")
    assert "out of memory" in lines[0]
    assert f"{cuda_helper.NAME}: 8 MiB of 64 MiB free" in lines
    assert ["pyvmm.Pool", "16 MiB", "0 bytes"] == [w.strip() for w in lines[3].split("  ") if w]
    assert ["cupy", "40 MiB", "0 bytes"] == [w.strip() for w in lines[4].split("  ") if w]
    assert lines[-2:] == ["[('pyvmm.Pool', 16, 0), ('cupy', 40, 0)]", "16 40"]


def test_other_pools_give_back_what_they_do_not_use():
    said = small_device("""
        first, second = pyvmm.Pool("cuda:0"), pyvmm.Pool("cuda:0")
        rows(first, 40).close()
        t = rows(second, 56)
        print(t.length, first.stats()["queued_bytes"] + first.stats()["free_bytes"])
    """)
    assert said.split() == ["56", "0"]


def test_other_pools_give_back_what_they_recycle():
    said = small_device("""
        first, second = pyvmm.Pool("cuda:0"), pyvmm.Pool("cuda:0")
        rows(first, 40).close()
        next_one = rows(first, 0)  # takes it over
        print(first.stats()["recycled_bytes"] // MIB)
        t = rows(second, 56)
        print(t.length, first.stats()["recycled_bytes"])
    """)
    # A fence that waits for the device is not taken at open: the memory is queued until then.
    assert said.split() == ["0" if cuda_helper.FENCE_WAITS else "40", "56", "0"]


def test_an_exhausted_budget_leaves_the_others_alone():
    said = small_device("""
        pool, other = pyvmm.Pool("cuda:0", max_bytes="8MiB"), pyvmm.Pool("cuda:0")
        framework.take(8 * MIB)
        framework.drop()
        rows(other, 8).close()
        t = rows(pool, 8)
        try:
            t.grow(1)
        except pyvmm.OutOfMemoryError as error:
            print("budget" in str(error))
        print(framework.free_bytes() // MIB, other.stats()["queued_bytes"] // MIB)
    """)
    assert said.split() == ["True", "8", "8"]


def test_a_framework_on_the_gpus_of_another_vendor_is_left_alone():
    """Its GPU of that number is another one."""
    said = small_device("""
        cupy.cuda.runtime.is_hip = not cuda_helper.IS_HIP
        framework.take(8 * MIB)
        framework.drop()
        t = rows(pyvmm.Pool("cuda:0"), 16)
        try:
            t.grow(48)
        except pyvmm.OutOfMemoryError as error:
            print([holder.name for holder in error.holders], framework.free_bytes() // MIB)
    """)
    assert said.splitlines() == ["['pyvmm.Pool'] 8"]


def test_a_framework_that_fails_hides_nothing():
    said = small_device("""
        def broken():
            raise RuntimeError("the framework's own trouble")
        framework.free_all_blocks = broken
        framework.take(40 * MIB)
        framework.drop()
        t = rows(pyvmm.Pool("cuda:0"), 16)
        try:
            t.grow(40)
        except pyvmm.OutOfMemoryError as error:
            print(error.driver_code, error.operation)
        framework.free_bytes = framework.used_bytes = broken
        try:
            t.grow(40)
        except pyvmm.OutOfMemoryError as error:
            print([holder.name for holder in error.holders])
    """)
    create = cuda_helper.driver_name("cuMemCreate")
    assert said.splitlines() == [f"2 {create}", "['pyvmm.Pool']"]


def test_a_shortage_on_the_host_has_the_table_too(host):
    with (
        pyvmm.Pool("host", max_bytes="64KiB") as pool,
        pyvmm.empty((0, 4096), "uint8", axis=0, capacity=100, pool=pool) as t,
    ):
        t.grow(16)
        with pytest.raises(pyvmm.OutOfMemoryError) as caught:
            t.grow(1)
        assert ("host", "pyvmm.Pool", 65536, 0) in caught.value.holders
        assert "host: " in str(caught.value) and "64 KiB" in str(caught.value)
        assert held(pool) == {"in_use": 65536}


def test_a_driver_that_has_no_memory_to_say_who_holds_it():
    said = small_device("""
        t = rows(pyvmm.Pool("cuda:0"), 2)
        cuda_helper.load().vmm_sim_fail(b"*", cuda_helper.ctypes.c_long(1), 2, -1)
        try:
            t.grow(2)
        except pyvmm.OutOfMemoryError as error:
            print(error.driver_code, error.holders)
        cuda_helper.load().vmm_sim_fail_none()
        t.grow(2)
        print(t.length)
    """)
    assert said.splitlines() == ["2 []", "4"]


def test_shortages_while_other_threads_make_and_close_pools(host):
    stop = threading.Event()
    errors = []

    def make():
        try:
            while not stop.is_set():
                for pool in [pyvmm.Pool("host") for _ in range(5)]:
                    pool.close()
        except Exception as error:
            errors.append(error)

    kept = [pyvmm.Pool("host") for _ in range(2000)]
    for pool in kept:
        pool.close()
    thread = threading.Thread(target=make)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        with (
            pyvmm.Pool("host", max_bytes="64KiB") as pool,
            pyvmm.empty((0, 4096), "uint8", axis=0, capacity=100, pool=pool) as t,
        ):
            t.grow(16)
            for _ in range(300):
                with pytest.raises(pyvmm.OutOfMemoryError):
                    t.grow(1)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors
