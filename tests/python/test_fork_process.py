"""os.fork in a process with live tensors: the child is refused, the parent unaffected."""

import os

import pytest

from support import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PREPARE = """
import gc, os, sys
import numpy as np
import pyvmm

def rows(n):
    return np.arange(4 * n, dtype="float32").reshape(n, 4)

def in_child(work):
    # What the child prints comes before what the parent prints after it.
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print("child:", repr(error), flush=True)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def refused(use):
    try:
        use()
    except pyvmm.VMMError as error:
        assert error.status == "VMM_ERR_FORKED", error.status
    else:
        raise AssertionError("not refused")

pool = pyvmm.Pool(DEVICE)
t = pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=DEVICE, pool=pool)
t.append(rows(5))
view = t[:3]
"""


def run(code, device):
    return run_python(f"DEVICE = {device!r}\n{PREPARE}\n{code}")


def test_pools_and_exports_are_refused_too(device):
    run(
        """
def work():
    for use in (lambda: pool.trim(), lambda: pool.capture_begin(), lambda: view.__dlpack__(),
                lambda: t.reserved().__dlpack__(), lambda: t.fork(),
                lambda: pyvmm.append_many([t], [rows(1)]), lambda: pyvmm.map_many([t], 1),
                lambda: pyvmm.empty((0,), "uint8", axis=0, capacity=9, device=DEVICE, pool=pool)):
        refused(use)
    if DEVICE == "host":
        refused(lambda: np.asarray(t))
        refused(lambda: memoryview(t))
    else:
        refused(lambda: t.__cuda_array_interface__)
in_child(work)
t.append(rows(1))
assert t.length == 6
""",
        device,
    )


def test_closing_and_dropping_do_nothing(device):
    run(
        """
capsule = t.__dlpack__()
def work():
    global t, view, pool, capsule
    del capsule
    view = None
    t.close()
    pool.close()
    t = pool = None
    gc.collect()
in_child(work)
in_child(work)
in_use = pool.stats()["in_use_bytes"]
assert in_use > 0
try:
    t.truncate(0)
except BufferError:
    pass  # the parent's own capsule still pins
else:
    raise AssertionError("the child's books are not the parent's")
del capsule
t.append(rows(100))
if DEVICE == "host":
    assert np.array_equal(np.asarray(t), np.concatenate([rows(5), rows(100)]))
t.close()
pool.close()
""",
        device,
    )


def test_state_can_still_be_told(device):
    """What never reaches the driver may be asked for; a repr never raises."""
    run(
        """
def work():
    repr(t), repr(view), repr(pool)
    assert (t.capacity, t.ndim, t.axis, t.dtype) == (1000, 2, 0, np.dtype("float32"))
in_child(work)
""",
        device,
    )


def test_child_opens_the_host_anew(host):
    run(
        """
def work():
    own = pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device="host")
    own.append(rows(7))
    assert np.array_equal(np.asarray(own), rows(7))
    assert own.ptr
    other = pyvmm.Pool("host", max_bytes="64MiB")
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device="host", pool=other) as u:
        u.grow(1000)
    other.close()
    own.close()
    # A grandchild is a child like any other.
    def grandchild():
        refused(lambda: own2.grow(1))
        refused(lambda: t.grow(1))
        pyvmm.empty((0,), "uint8", axis=0, capacity=9, device="host").grow(9)
    own2 = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="host")
    own2.grow(1)
    in_child(grandchild)
    own2.grow(1)
in_child(work)
assert np.array_equal(np.asarray(t), rows(5))
""",
        host,
    )


def test_memory_is_kept_out_of_the_child(host):
    """The child's address space does not hold the parent's rows, so writing there, or
    waiting for the parent to, cannot be mistaken for sharing."""
    run(
        """
def is_there(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return True
    return False
assert is_there(t.ptr)
address = t.ptr
def work():
    assert not is_there(address)
in_child(work)
assert is_there(address)
""",
        host,
    )


def test_cuda_is_refused_in_the_child(cuda):
    """A CUDA context does not survive a fork, so opening the device anew is an error too,
    and no crash."""
    run(
        """
def work():
    try:
        pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=DEVICE).grow(1)
    except pyvmm.VMMError as error:
        assert error.status in ("VMM_ERR_FORKED", "VMM_ERR_DRIVER", "VMM_ERR_NO_DRIVER"), error
    else:
        raise AssertionError("CUDA worked in a forked child")
in_child(work)
t.append(rows(1))
""",
        cuda,
    )


def test_child_may_end_normally(device):
    """Its interpreter shuts down over inherited objects, and says nothing."""
    out = run(
        """
capsule = t.__dlpack__()
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
t.append(rows(1))
print(t.length)
""",
        device,
    )
    assert out.split() == ["6"]


def test_fork_while_another_thread_works(device):
    """A lock held at the fork by another thread must not hang the child."""
    run(
        """
import threading
stop = threading.Event()
def work_on():
    while not stop.is_set():
        with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=DEVICE, pool=pool) as u:
            u.append(rows(900))
worker = threading.Thread(target=work_on)
worker.start()
def work():
    refused(lambda: t.grow(1))
    t.close()
    own = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="host")
    own.append(rows(3))
    own.close()
import warnings
warnings.simplefilter("ignore")  # of a fork in a process with threads
for _ in range(20):
    in_child(work)
stop.set()
worker.join()
""",
        device,
    )
