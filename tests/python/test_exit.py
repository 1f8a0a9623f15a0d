"""The interpreter's end, the collector, signals: nothing is said, nothing crashes."""

import gc
import signal
import subprocess
import sys
import textwrap
import weakref

import pytest

import pyvmm
from model import pattern, same
from support import run_python, to_numpy

PREPARE = """
import atexit, gc, sys, threading, weakref
import numpy as np
import pyvmm

def make(**arguments):
    return pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=DEVICE, **arguments)

t = make()
t.append(np.ones((5, 4), "float32"))
"""

# What is alive when the interpreter goes. Each a program of its own; a word on stderr or
# another status than 0 is a failure.
ENDINGS = {
    "a tensor": "",
    "a view": "v = t[:3]; del t",
    "a capsule that nobody took": "c = t.__dlpack__(); v = c, t; del t",
    "a capsule alone": "c = t.__dlpack__(max_version=(1, 0)); del t",
    "a grown view": "v = t.grow(3)",
    "a whole reservation": "v = t.reserved(); c = v.__dlpack__()",
    "a pool and its tensor": "p = pyvmm.Pool(DEVICE); u = make(pool=p); u.grow(3)",
    "a tensor without its pool": "p = pyvmm.Pool(DEVICE); u = make(pool=p); u.grow(3); del p",
    "a pool without tensors": "p = pyvmm.Pool(DEVICE, max_bytes='64MiB')",
    "a pool with queued memory": "p = pyvmm.Pool(DEVICE); make(pool=p).grow(9); t.close()",
    "look-ahead at work": """
        p = pyvmm.Pool(DEVICE, lookahead=True); u = make(pool=p)
        for _ in range(50): u.grow(20)
    """,
    "look-ahead of a pool that is gone": """
        p = pyvmm.Pool(DEVICE, lookahead=True); u = make(pool=p); u.grow(999); del p
    """,
    "an out-of-memory callback": """
        p = pyvmm.Pool(DEVICE)
        p.on_oom(lambda n_bytes: p.trim() and t)
        u = make(pool=p); u.grow(3)
    """,
    "a callback in a cycle": """
        class Owner:
            def __init__(self):
                self.pool = pyvmm.Pool(DEVICE)
                self.pool.on_oom(self.free)
            def free(self, n_bytes):
                return False
        owner = Owner()
    """,
    "a cycle": "cycle = [t]; cycle.append(cycle); del t, cycle",
    "a __del__ that closes": """
        class Owner:
            def __init__(self, t):
                self.t = t
            def __del__(self):
                self.t.close()
        owner = Owner(t)
        sys.modules["keeper"] = owner
        del t, owner
    """,
    "a __del__ that appends": """
        class Owner:
            def __init__(self, t):
                self.t = t
                self.x = np.ones((1, 4), "float32")
            def __del__(self):
                self.t.append(self.x)
        owner = Owner(t)
    """,
    "an atexit handler that uses it": """
        atexit.register(lambda: t.append(np.ones((1, 4), "float32")))
        atexit.register(lambda: t[:2].__dlpack__())
    """,
    "an atexit handler that closes it": "atexit.register(t.close)",
    "a weakref callback": "r = weakref.finalize(t, pyvmm.default_pool(DEVICE).stats)",
    "the package unloaded": """
        for name in [name for name in sys.modules if name.startswith("pyvmm")]:
            del sys.modules[name]
        del pyvmm
        gc.collect()
        t.grow(1)
    """,
    "the package kept by itself": "pyvmm.kept = t; pyvmm.me = pyvmm; del t",
    "a daemon thread at work": """
        started = threading.Event()
        def work():
            while True:
                with make() as u:
                    u.append(np.ones((900, 4), "float32"))
                started.set()
        threading.Thread(target=work, daemon=True).start()
        assert started.wait(60)
    """,
    "a thread that outlives the main one": """
        def work():
            threading.main_thread().join()
            t.append(np.ones((1, 4), "float32"))
            make().grow(3)
        threading.Thread(target=work).start()
    """,
    "sys.exit in a with block": """
        with make() as u:
            u.grow(3)
            sys.exit(0)
    """,
    "os._exit": "import os; os._exit(0)",
}
HOST_ENDINGS = {
    "a NumPy array over it": "a = np.asarray(t); del t",
    "a memoryview over it": "m = memoryview(t); del t",
    "a NumPy array by DLPack": "a = np.from_dlpack(t)",
    "a NumPy array kept by NumPy": "np.kept = np.asarray(t); del t",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_is_silent(ending, device):
    run_python(f"DEVICE = {device!r}\n{PREPARE}\n{textwrap.dedent(ENDINGS[ending])}")


@pytest.mark.parametrize("ending", HOST_ENDINGS)
def test_exit_is_silent_on_the_host(ending, host):
    run_python(f"DEVICE = {host!r}\n{PREPARE}\n{HOST_ENDINGS[ending]}")


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_deleter_after_the_interpreter_has_gone(version, device):
    """A consumer whose tensor dies with the process: no GIL, no Python."""
    run_python(
        f"DEVICE = {device!r}\n{PREPARE}\nVERSION = {version}"
        """
import ctypes
from dlpack_struct import Consumer
libc = ctypes.CDLL(None)
for exporter in (t, t[:3], t.reserved()):
    managed = Consumer(exporter.__dlpack__(max_version=VERSION)).managed
    deleter = ctypes.cast(managed.deleter, ctypes.c_void_p)
    # The C library's own atexit(), with an argument; it runs after Py_Finalize().
    assert libc.__cxa_atexit(deleter, ctypes.c_void_p(ctypes.addressof(managed)), None) == 0
del t, exporter
"""
    )


def test_subinterpreter_is_refused(device):
    """It says so, and the main interpreter's tensors go on."""
    run_python(
        f"DEVICE = {device!r}\n{PREPARE}"
        """
try:
    import _xxsubinterpreters as interpreters
    run, arguments = interpreters.run_string, ()
except ImportError:  # 3.13 and newer
    import _interpreters as interpreters
    run, arguments = interpreters.run_string, ("legacy",)
program = (
    "try:\\n"
    "    import pyvmm\\n"
    "except ImportError as error:\\n"
    "    assert 'interpreter' in str(error), error\\n"
    "else:\\n"
    "    raise AssertionError('not refused')\\n"
)
sub = interpreters.create(*arguments)
error = run(sub, program)  # raises before 3.13
assert error is None, error
interpreters.destroy(sub)
t.append(np.ones((1, 4), "float32"))
assert t.length == 6
"""
    )


def test_uncaught_exception_is_all_that_is_said(device):
    code = f"DEVICE = {device!r}\n{PREPARE}\nt.grow(1001)"
    result = run_python(code, check=False)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "CapacityError" in result.stderr.splitlines()[-1]


def test_nothing_is_left_on_the_device(simulator, device):
    """What was closed and trimmed is gone when the process ends: the simulated driver
    looks for it."""
    run_python(
        f"DEVICE = {device!r}\n{PREPARE}"
        """
pool = pyvmm.Pool(DEVICE)
u = make(pool=pool)
c = u.__dlpack__()
u.append(np.ones((900, 4), "float32"))
del c
u.close()
pool.close()
t.close()
pyvmm.default_pool(DEVICE).trim(wait=True)
""",
        VMM_SIM_CHECK_EXIT="1",
    )


# ---- many times -----------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False], ids=["one pool", "a pool each"])
def test_nothing_gathers_over_10000_cycles(reuse, device):
    """Open, grow, export, close: memory, mappings, files and what the simulated driver has
    alive are what they were after the first few."""
    run_python(
        f"DEVICE, REUSE = {device!r}, {reuse}\n{PREPARE}"
        """
import contextlib, ctypes, os
import cuda_helper
t.close()
x = np.ones((3, 4), "float32")

def cycle(pool):
    u = make(pool=pool)
    u.append(x)
    u.grow(2)
    capsule = u.__dlpack__()
    try:
        u.close()
        raise AssertionError("not refused")
    except BufferError:
        pass
    del capsule
    u.close()

def alive():
    gc.collect()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    counts = {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "maps": sum(1 for _ in open("/proc/self/maps")),
        "files": len(os.listdir("/proc/self/fd")),
    }
    if DEVICE != "host" and os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        cuda_helper.synchronize()
        live = [ctypes.c_longlong() for _ in range(8)]
        simulator = cuda_helper.load()
        simulator.vmm_sim_live(*map(ctypes.byref, live[:4]))
        simulator.vmm_sim_live_objects(*map(ctypes.byref, live[4:]))
        counts["simulated"] = [n.value for n in live]
    return counts

def cycles(n):
    if REUSE:
        # Where a fence waits for the device, queued memory comes back to growth only once there
        # is no other: without a budget, once the device is full.
        budget = 2**20 if DEVICE != "host" and cuda_helper.FENCE_WAITS else None
        with pyvmm.Pool(DEVICE, max_bytes=budget) as pool:
            for _ in range(n):
                cycle(pool)
            assert pool.stats()["in_use_bytes"] == 0
            pool.close()
    else:
        for _ in range(n):
            with pyvmm.Pool(DEVICE) as pool:
                cycle(pool)

cycles(500)
before = alive()
cycles(9500)
after = alive()
assert after.pop("rss_kb") - before.pop("rss_kb") < 4096, (before, after)
assert abs(after.pop("maps") - before.pop("maps")) < 20, (before, after)
assert after == before, (before, after)
""",
        VMM_SIM_GRANULARITY="65536",
        VMM_SIM_DELAY_US="0",
    )


# ---- the collector ------------------------------------------------------------------


class Node:
    def free(self, n_bytes):
        return False


def test_cycles_are_collected(empty, device):
    """Tensors, views and pools take part in cycles that the collector breaks."""
    pool = pyvmm.Pool(device)
    t = empty(pool=pool)
    t.grow(100)
    node = Node()
    gone = weakref.ref(node)
    node.parts = [t, t[:3], pool, node]
    pool.on_oom(node.free)
    assert pool.stats()["in_use_bytes"] > 0
    del t, node, pool
    gc.collect()
    assert gone() is None


def test_dropping_a_tensor_frees_it_at_once(empty, device):
    """By its last reference, without help of the collector."""
    pool = pyvmm.default_pool(device)
    before = pool.stats()["in_use_bytes"]
    gc.disable()
    try:
        t = empty()
        t.grow(100)
        view = t[:3]
        del t
        assert pool.stats()["in_use_bytes"] > before
        del view
        assert pool.stats()["in_use_bytes"] == before
    finally:
        gc.enable()


def test_weak_references(empty):
    t = empty()
    gone = weakref.ref(t)
    assert gone() is t
    del t
    gc.collect()
    assert gone() is None


# ---- signals ------------------------------------------------------------------------


def signalled(code, number):
    """The exit status and stderr of a program that gets a signal once it has said "ready"."""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.stdin.close()
        try:
            return process.wait(60), process.stderr.read()
        finally:
            process.kill()  # one that has not ended would be waited for without end


def test_interrupt_is_raised_once(device):
    """SIGINT from outside in a long loop of appends: one KeyboardInterrupt, whole rows."""
    code = f"""DEVICE = {device!r}\n{PREPARE}
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell has run by & ignores it
u = make()
x = np.ones((7, 4), "float32")
n_interrupts = 0
for attempt in range(2):
    try:
        if attempt == 0:
            print("ready", flush=True)
        while not n_interrupts:
            if u.length + 7 > u.capacity:
                u.truncate(0)
                u.trim()
            u.append(x)
    except KeyboardInterrupt:
        n_interrupts += 1
assert n_interrupts == 1 and u.length % 7 == 0
u.append(x)
u.close()
"""
    assert signalled(code, signal.SIGINT) == (0, "")


def test_interrupt_between_appends(device):
    """Ctrl-C in a loop of appends: KeyboardInterrupt, and whole rows."""
    run_python(
        f"DEVICE = {device!r}\n{PREPARE}"
        """
import itertools, signal
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)
u = make()
x = np.ones((7, 4), "float32")
n_interrupts = 0
def interrupt(*arguments):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
while n_interrupts < 10:
    try:
        while True:
            if u.length + 7 > u.capacity:
                u.truncate(0)
                u.trim()
            u.append(x)
    except KeyboardInterrupt:
        n_interrupts += 1
        assert u.length % 7 == 0
signal.setitimer(signal.ITIMER_REAL, 0)
u.append(x[:1])
u.close()
"""
    )


def test_termination_is_by_the_signal(device):
    """SIGTERM ends the process as it ends any other."""
    code = f"DEVICE = {device!r}\n{PREPARE}\nprint('ready', flush=True)\nsys.stdin.read()"
    assert signalled(code, signal.SIGTERM) == (-signal.SIGTERM, "")


def test_signal_handlers_are_left_alone(device, empty):
    """No handler of ours appears: memory is committed when it is mapped, so none is needed."""
    numbers = [signal.SIGSEGV, signal.SIGBUS, signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    before = [signal.getsignal(number) for number in numbers]
    masks = open("/proc/self/status").read()
    caught = [line for line in masks.splitlines() if line.startswith("SigCgt")]
    with empty() as t:
        t.append(pattern((100, 4), "float32"))
        assert same(to_numpy(t), pattern((100, 4), "float32"))
        now = open("/proc/self/status").read().splitlines()
        assert [line for line in now if line.startswith("SigCgt")] == caught
    assert [signal.getsignal(number) for number in numbers] == before
