"""torch, CuPy and pyvmm under pressure on one GPU: the memory that one framework keeps is given
up when a pool needs it, and two threads of two frameworks append, grow and read at once."""

import gc
import os
import queue
import threading

import numpy as np
import pytest

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip("the simulated driver's memory is not a GPU's", allow_module_level=True)
torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

import cuda_helper  # noqa: E402
import pyvmm  # noqa: E402

CUDA = "cuda:0"
GIB = 1 << 30


# ---- memory that a framework keeps ------------------------------------------------------


class TorchMemory:
    def take(self, n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8, device=CUDA)

    def give_up(self):
        torch.cuda.empty_cache()


class CupyMemory:
    def take(self, n_bytes):
        return cupy.empty(n_bytes, "uint8")

    def give_up(self):
        cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture(params=[TorchMemory, CupyMemory], ids=["torch", "cupy"])
def framework(request):
    framework = request.param()
    framework.give_up()
    yield framework
    gc.collect()
    framework.give_up()


def make(pool=None, n_rows=1 << 22):
    """Rows of 64 KiB."""
    return pyvmm.empty((0, 32768), "uint16", axis=0, capacity=n_rows, device=CUDA, pool=pool)


def hold_all(framework):
    """Whole GiB until there is none, then whole 64 MiB."""
    held, step = [], GIB
    while step >= GIB // 16:
        if cuda_helper.free_bytes() < step + GIB // 8:
            step //= 4
        else:
            held.append(framework.take(step))
    return held


def test_cache_of_a_framework_is_given_up(full_device, framework):
    """The framework has dropped its arrays and keeps the memory: the pool empties its cache,
    and asks nobody else."""
    with pyvmm.Pool(CUDA) as pool:
        taken = hold_all(framework)
        taken.clear()
        gc.collect()
        assert cuda_helper.free_bytes() < GIB
        asked = []
        pool.on_oom(lambda n_bytes: asked.append(n_bytes) and False)
        with make(pool) as t:
            t.append(np.full((20, 32768), 7, "uint16"))
            t.map(40_000)  # 2.4 GiB
            assert t.mapped >= 40_000 and cuda_helper.free_bytes() > GIB
            rows = cupy.full((1000, 32768), 9, "uint16")
            t.append(rows)
            view = cupy.from_dlpack(t)
            assert bool((view[:20] == 7).all()) and bool((view[20:] == 9).all())
            del view, rows
            gc.collect()
        assert len(asked) <= 1  # all callbacks run once, and the caches are the first


def test_memory_in_use_is_nobodys_to_give_up(full_device, framework):
    """What the framework's arrays hold stays theirs: an error, then recovery once they go."""
    with pyvmm.Pool(CUDA) as pool:
        kept = framework.take(1 << 20)
        kept[:] = 5
        taken = hold_all(framework)
        asked = []
        pool.on_oom(lambda n_bytes: asked.append(n_bytes) or framework.give_up() or True)
        with make(pool) as t:
            t.append(np.full((3, 32768), 4, "uint16"))
            with pytest.raises(pyvmm.OutOfMemoryError) as caught:
                t.map(40_000)
            assert len(asked) == 1 and t.length == 3
            names = [holder.name for holder in caught.value.holders]
            assert type(framework).__name__.removesuffix("Memory").lower() in names
            taken.clear()
            gc.collect()
            t.map(40_000)
            assert bool((cupy.from_dlpack(t) == 4).all())
            assert bool((kept == 5).all())
            gc.collect()


def test_framework_gets_what_a_pool_returns(full_device, framework):
    """The other way round: a pool that held everything is trimmed, then the framework goes on."""
    with pyvmm.Pool(CUDA) as pool:
        t = make(pool)
        t.append(np.full((3, 32768), 4, "uint16"))
        try:
            for n_rows in range(16_384, t.capacity, 16_384):
                t.map(n_rows)
        except pyvmm.OutOfMemoryError:
            pass
        with pytest.raises((torch.cuda.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError)):
            framework.take(8 * GIB)
        assert bool((cupy.from_dlpack(t) == 4).all())
        gc.collect()
        t.trim()
        pool.trim(wait=True)
        array = framework.take(8 * GIB)
        array[:] = 1
        assert bool((cupy.from_dlpack(t) == 4).all())
        del array
        gc.collect()
        t.close()


# ---- two threads, two frameworks ----------------------------------------------------------

STEPS = 300
WIDTH = 512


class TorchThread:
    """Appends with torch on a stream of its own; what others hand over it reads with torch."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def __enter__(self):
        self.scope = torch.cuda.stream(self.stream)
        self.scope.__enter__()
        return self

    def __exit__(self, *exception):
        self.stream.synchronize()
        self.scope.__exit__(*exception)

    def rows(self, n, value):
        return torch.full((n, WIDTH), value, dtype=torch.int32, device=CUDA)

    def view(self, array):
        return torch.from_dlpack(array)

    def fill(self, view, value):
        torch.from_dlpack(view).fill_(value)


class CupyThread:
    def __init__(self):
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def __enter__(self):
        self.stream.__enter__()
        return self

    def __exit__(self, *exception):
        self.stream.synchronize()
        self.stream.__exit__(*exception)

    def rows(self, n, value):
        return cupy.full((n, WIDTH), value, "int32")

    def view(self, array):
        return cupy.from_dlpack(array)

    def fill(self, view, value):
        cupy.from_dlpack(view)[...] = value


class Worker(threading.Thread):
    """Appends and grows a tensor of its own, hands views of it to the other, reads the other's.
    Row i holds i * sign. Every so often it closes its tensor and begins anew, so that blocks go
    from thread to thread through the pool."""

    def __init__(self, kind, pool, sign, seed, barrier):
        super().__init__()
        self.barrier = barrier
        self.kind, self.pool, self.sign = kind, pool, sign
        self.random = np.random.default_rng(seed)
        self.inbox = queue.Queue(maxsize=4)
        self.failure, self.n_read = None, 0

    def run(self):
        try:
            with self.kind() as self.framework:
                for self.round in range(3):
                    self.work()
        except BaseException as error:
            self.failure = error
            self.barrier.abort()  # or the other would wait for us

    def extend(self, t, n):
        numbers = np.arange(t.length, t.length + n, dtype="int32") * self.sign
        if self.random.integers(2):
            rows = self.framework.rows(n, 0)
            rows += self.framework.view(self.column(numbers))
            t.append(rows)
        else:
            view = t.grow(n)
            self.framework.fill(view, 0)
            whole = self.framework.view(t)
            whole[t.length - n :] += self.framework.view(self.column(numbers))

    def column(self, numbers):
        # Through CuPy for both: an array on this thread's current stream.
        column = cupy.asarray(numbers[:, None])
        cupy.cuda.get_current_stream().synchronize()
        return column

    def work(self):
        spec = {"axis": 0, "capacity": 1 << 20, "device": CUDA, "pool": self.pool}
        with pyvmm.empty((0, WIDTH), "int32", **spec) as t:
            for step in range(STEPS):
                if step % 10 == 0:
                    self.barrier.wait(60)  # neither is done before the other has begun
                self.extend(t, int(self.random.integers(1, 40)))
                if self.random.integers(4) == 0:
                    self.hand_over(t)
                self.read()
                if self.random.integers(20) == 0:
                    t.trim()
            self.framework.stream.synchronize()
            got = cupy.asnumpy(cupy.from_dlpack(t))
            expected = np.arange(t.length, dtype="int32")[:, None] * self.sign
            assert (got == expected).all()
            while not self.inbox.empty():
                self.read()
            # Views that the other still holds keep the memory: this is no close() that refuses.

    def hand_over(self, t):
        view = self.framework.view(t)
        self.framework.stream.synchronize()
        try:
            self.other.inbox.put_nowait(view)
        except queue.Full:
            pass

    def read(self):
        try:
            view = self.framework.view(self.inbox.get_nowait())
        except queue.Empty:
            return
        column = view[:, self.n_read % WIDTH]
        first, last = int(column[0]), int(column[-1])
        assert first == 0 and last == (len(column) - 1) * -self.sign
        assert int(column.sum()) == -self.sign * len(column) * (len(column) - 1) // 2
        self.n_read += 1


def test_two_frameworks_and_two_threads(full_device):
    with pyvmm.Pool(CUDA, max_bytes=GIB) as pool:
        barrier = threading.Barrier(2)
        workers = [
            Worker(TorchThread, pool, 1, 1, barrier),
            Worker(CupyThread, pool, -1, 2, barrier),
        ]
        workers[0].other, workers[1].other = reversed(workers)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        failures = [worker.failure for worker in workers if worker.failure]
        for failure in failures:
            if not isinstance(failure, threading.BrokenBarrierError) or len(failures) == 1:
                raise failure
        for worker in workers:
            assert worker.n_read > 20
            while not worker.inbox.empty():
                worker.inbox.get_nowait()
        del worker, workers
        gc.collect()
        torch.cuda.synchronize()
        pool.trim(wait=True)
        assert pool.stats()["in_use_bytes"] == 0
