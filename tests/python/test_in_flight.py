"""A kernel is running over a tensor that is truncated, trimmed and closed, and another tensor
wants its blocks: the kernel reads what it was given, to its end (invariant 6).

On a GPU the kernel reads all rows again and again for as long as it is told to, and counts
what is not what it should be. On the simulated driver, which has no such kernel, a copy waits
behind a gate that a timer opens.
"""

import ctypes
import math
import threading

import numpy as np
import pytest

import conftest
import cuda_helper
import pyvmm
from support import held, smallest_block, to_numpy

SECONDS = 0.3
THREADS, BLOCKS = 256, 8  # some of the GPU, so that other work runs beside it
OLD, NEW = 0x01010101, 0x02020202
ROW_WORDS = 16384

# for (start = now; now < start + ns;) for (i = thread; i < n; i += all threads)
#     if (data[i] != expected) out[0] += 1
# out[1] += 1
WATCH = b"""
.version 6.3
.target sm_75
.address_size 64
.visible .entry watch(.param .u64 p_data, .param .u64 p_n, .param .u64 p_ns, .param .u64 p_out,
                      .param .u32 p_expected)
{
    .reg .pred %done, %wrong, %again;
    .reg .b32 %value, %expected, %thread, %group, %size, %groups, %first, %all;
    .reg .b64 %data, %n, %ns, %out, %start, %now, %i, %step, %at;
    ld.param.u64 %data, [p_data];
    ld.param.u64 %n, [p_n];
    ld.param.u64 %ns, [p_ns];
    ld.param.u64 %out, [p_out];
    ld.param.u32 %expected, [p_expected];
    mov.u32 %thread, %tid.x;
    mov.u32 %group, %ctaid.x;
    mov.u32 %size, %ntid.x;
    mov.u32 %groups, %nctaid.x;
    mad.lo.u32 %first, %group, %size, %thread;
    mul.lo.u32 %all, %size, %groups;
    cvt.u64.u32 %step, %all;
    mov.u64 %start, %globaltimer;
ROUND:
    cvt.u64.u32 %i, %first;
WORD:
    setp.ge.u64 %done, %i, %n;
    @%done bra END_OF_ROUND;
    shl.b64 %at, %i, 2;
    add.u64 %at, %at, %data;
    ld.volatile.global.u32 %value, [%at];
    setp.ne.u32 %wrong, %value, %expected;
    @%wrong red.global.add.u32 [%out], 1;
    add.u64 %i, %i, %step;
    bra WORD;
END_OF_ROUND:
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %again, %now, %ns;
    @%again bra ROUND;
    red.global.add.u32 [%out+4], 1;
    ret;
}
"""


def load_watch():
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with cuda_helper.context():
        cuda_helper.call("cuModuleLoadData", ctypes.byref(module), WATCH)
        cuda_helper.call("cuModuleGetFunction", ctypes.byref(function), module, b"watch")
    return function


class KernelWatcher:
    """Reads a tensor on a stream for SECONDS from start() on. Making it waits for the device,
    starting it does not."""

    function = None

    def __init__(self, tensor, expected=OLD):
        KernelWatcher.function = KernelWatcher.function or load_watch()
        self.tensor, self.expected = tensor, expected
        self.out = cuda_helper.DeviceArray(np.zeros(2, "uint32"))

    def start(self, stream):
        self.stream, tensor = stream, self.tensor
        arguments = [
            ctypes.c_uint64(tensor.ptr),
            ctypes.c_uint64(math.prod(tensor.shape)),
            ctypes.c_uint64(int(SECONDS * 1e9)),
            ctypes.c_uint64(self.out.pointer),
            ctypes.c_uint32(self.expected),
        ]
        pointers = (ctypes.c_void_p * 5)(*(ctypes.addressof(a) for a in arguments))
        shape = (*map(ctypes.c_uint, (BLOCKS, 1, 1, THREADS, 1, 1, 0)),)
        with cuda_helper.context():
            cuda_helper.call("cuLaunchKernel", self.function, *shape, stream.handle, pointers, None)
        return self

    def is_running(self):
        return not self.stream.is_done()

    def check(self):
        self.stream.synchronize()
        wrong, finished = self.out.get().tolist()
        self.out.free()
        assert finished == THREADS * BLOCKS
        assert wrong == 0


class CopyWatcher:
    """Copies it once a timer opens the gate."""

    def __init__(self, tensor, expected=OLD):
        self.tensor, self.expected = tensor, expected
        self.out = cuda_helper.DeviceArray(np.zeros(tensor.shape, "uint32"))

    def start(self, stream):
        self.stream = stream
        self.gate = cuda_helper.Gate(stream)
        self.out.copy_from(self.tensor.ptr, stream)
        self.timer = threading.Timer(SECONDS, self.gate.open)
        self.timer.start()
        return self

    def is_running(self):
        return not self.stream.is_done()

    def check(self):
        self.timer.join()
        self.stream.synchronize()
        assert (self.out.get() == self.expected).all()
        self.out.free()


Watcher = CopyWatcher if conftest.SIMULATED else KernelWatcher


@pytest.fixture
def block(cuda):
    return smallest_block(cuda)


@pytest.fixture
def stream(cuda):
    made = cuda_helper.Stream()
    yield made
    made.close()


@pytest.fixture
def rows(cuda, block):
    """rows(n, value): n blocks' worth of rows in device memory, one value everywhere."""
    made = []

    def make(n_blocks, value):
        n = n_blocks * block // (4 * ROW_WORDS)
        made.append(cuda_helper.InterfaceArray(np.full((n, ROW_WORDS), value, "uint32")))
        return made[-1]

    yield make
    for array in made:
        array.free()


def make(pool, block):
    spec = {"axis": 0, "capacity": 64 * block // (4 * ROW_WORDS), "device": pool.device}
    return pyvmm.empty((0, ROW_WORDS), "uint32", pool=pool, block_size=block, **spec)


def give_up(tensor, how):
    """All rows but those of one block, or all."""
    if how == "closed":
        tensor.close()
        return
    tensor.truncate(0 if how == "truncated" else tensor.length // 4)
    if how == "trimmed":
        tensor.trim()


@pytest.mark.parametrize("how", ["trimmed", "closed"])
def test_blocks_wanted_by_another_tensor(cuda, make_pool, block, rows, stream, how):
    """The budget has no other memory: the other tensor gets it once the kernel has ended."""
    pool = make_pool(max_bytes=4 * block)
    t, other = make(pool, block), make(pool, block)
    t.append(rows(4, OLD))
    new = rows(3, NEW)
    cuda_helper.synchronize()
    watcher = Watcher(t).start(stream)
    give_up(t, how)
    assert watcher.is_running()
    other.append(new)
    assert not watcher.is_running()
    watcher.check()
    assert (to_numpy(other) == NEW).all()
    if how != "closed":
        assert (to_numpy(t) == OLD).all()
        t.close()
    other.close()


@pytest.mark.parametrize("how", ["trimmed", "closed"])
def test_other_memory_is_taken_at_once(cuda, make_pool, block, rows, stream, how):
    """Without a budget nobody waits for the kernel, and its blocks stay where they are."""
    pool = make_pool()
    t, other = make(pool, block), make(pool, block)
    t.append(rows(4, OLD))
    new = rows(3, NEW)
    cuda_helper.synchronize()
    watcher = Watcher(t).start(stream)
    give_up(t, how)
    other.append(new)
    pool.trim()  # without waiting: what is in flight stays
    assert watcher.is_running()
    assert held(pool)["queued"] == (4 if how == "closed" else 3) * block
    watcher.check()
    pool.trim(wait=cuda_helper.FENCE_WAITS)
    assert "queued" not in held(pool)
    assert (to_numpy(other) == NEW).all()
    if how != "closed":
        t.close()
    other.close()


def test_trim_waits_when_it_is_told_to(cuda, make_pool, block, rows, stream):
    pool = make_pool()
    t = make(pool, block)
    t.append(rows(4, OLD))
    cuda_helper.synchronize()
    watcher = Watcher(t).start(stream)
    t.close()
    assert watcher.is_running()
    pool.trim(wait=True)
    assert not watcher.is_running()
    assert held(pool) == {}
    watcher.check()


def test_rows_replaced_under_a_reader(cuda, make_pool, block, rows, stream):
    """truncate(stream=) makes the next append wait for the reader, wherever it is made."""
    pool = make_pool()
    writer = cuda_helper.Stream()
    t = make(pool, block)
    t.append(rows(4, OLD))
    new = rows(4, NEW)
    cuda_helper.synchronize()
    watcher = Watcher(t).start(stream)
    t.truncate(0, stream=int(stream))
    t.append(new, stream=int(writer))
    assert watcher.is_running()
    watcher.check()
    writer.synchronize()
    assert (to_numpy(t) == NEW).all()
    t.close()
    writer.close()


def test_trimmed_and_grown_again(cuda, make_pool, block, rows, stream):
    """The tensor takes its own blocks back while the kernel reads them: they hold what they
    held, and the rows in use stay readable beside it."""
    pool = make_pool(max_bytes=4 * block)
    t = make(pool, block)
    t.append(rows(4, OLD))
    cuda_helper.synchronize()
    watcher = Watcher(t).start(stream)
    t.truncate(t.length // 4)
    t.trim()
    t.map(4 * t.length)
    assert held(pool) == {"in_use": 4 * block}
    assert watcher.is_running()
    watcher.check()
    assert (to_numpy(t) == OLD).all()
    t.close()


def test_many_readers_and_tensors(cuda, make_pool, block, rows, streams):
    """Several kernels on several streams, each over a tensor that is closed under it; their
    blocks go round among the tensors that follow."""
    pool = make_pool(max_bytes=6 * block)
    contents = {value: rows(2, value) for value in (0x11111111, 0x22222222, 0x33333333)}
    new = rows(6, NEW)
    for _ in range(2):
        tensors = [make(pool, block) for _ in contents]
        pyvmm.append_many(tensors, list(contents.values()))
        cuda_helper.synchronize()
        pairs = zip(tensors, contents, strict=True)
        watchers = [Watcher(t, value) for t, value in pairs]
        for watcher, stream in zip(watchers, streams, strict=True):
            watcher.start(stream)
            watcher.tensor.close()
        assert held(pool) == {"queued": 6 * block}
        assert all(watcher.is_running() for watcher in watchers)
        last = make(pool, block)
        last.append(new)
        assert not any(watcher.is_running() for watcher in watchers)
        for watcher in watchers:
            watcher.check()
        assert (to_numpy(last) == NEW).all()
        last.close()
