"""The state machine of test_properties.py and soak.py: random sequences of every operation,
on several tensors of several pools and streams, against the NumPy model, with exports taken
and dropped and, on the simulated driver, with driver calls that fail."""

import collections
import ctypes
import functools
import gc
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cuda_helper
import dlpack_struct
import pyvmm
from conftest import SIMULATED
from model import LAYOUTS, Model, expected_strides, lane_count, lane_row_bytes, pattern, same
from support import fill, held, smallest_block, to_numpy

MAX_TENSORS, MAX_POOLS = 5, 3
# Driver calls that are made to fail. Never cuEventDestroy: what it leaves is the driver's.
FAILING = (
    "*",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamWaitEvent",
    "cuStreamGetCtx",
    "cuStreamGetCaptureInfo",
    "cuLaunchKernel",
    "cuMemcpyHtoDAsync",
    "cuMemsetD8Async",
    *(() if cuda_helper.IS_HIP else ("cuCtxRecordEvent", "cuMemcpy2DAsync")),
)
CODES = (1, 2, 600, 999)  # invalid value, out of memory, not ready, unknown
FOREVER = -1

# Steps and failures by name, of all machines of the process.
done, failed = collections.Counter(), collections.Counter()

# A few rows, or a share of the capacity.
sizes = st.one_of(st.integers(0, 5), st.floats(0, 0.6), st.just(1.1))
picks = st.integers(0, MAX_TENSORS - 1)
no_fault = st.none()
faults = st.one_of(
    no_fault,
    st.tuples(
        st.one_of(st.just("*"), st.sampled_from(FAILING)),
        st.sampled_from([1, 1, 2, 3, 5]),
        st.sampled_from(CODES),
        st.sampled_from([1, 1, 2, FOREVER]),
    ),
)
# DLPack has no name for a thread's default stream of HIP's.
DEFAULT_STREAMS = [0] if cuda_helper.IS_HIP else [1, 2]
streams = st.sampled_from([None, None, *DEFAULT_STREAMS, "a", "b", "c"])
HOST_SOURCES = ("array", "permuted", "every second row", "memoryview", "dlpack")
DEVICE_SOURCES = ("interface", "interface on a stream", "capsule", "permuted on the device")
HOST_EXPORTS = ("capsule", "consumed", "memoryview", "asarray", "from_dlpack")
DEVICE_EXPORTS = ("capsule", "consumed", "interface")


# What a pool takes for the cursors of its first tensors.
CURSORS_BYTES = 1 << 16


def step(**arguments):
    """A rule that is counted by its name."""

    def decorate(function):
        @functools.wraps(function)
        def counted(self, **drawn):
            done[function.__name__] += 1
            return function(self, **drawn)

        return rule(**arguments)(counted)

    return decorate


class Live(ctypes.Structure):
    """What is alive in the simulator."""

    _fields_ = [
        ("handles", ctypes.c_long),
        ("mappings", ctypes.c_long),
        ("reservations", ctypes.c_long),
        ("n_bytes", ctypes.c_ulonglong),
    ]

    @classmethod
    def now(cls):
        live = cls()
        at = ctypes.addressof(live)
        where = [ctypes.c_void_p(at + getattr(cls, name).offset) for name, _ in cls._fields_]
        cuda_helper.load().vmm_sim_live(*where)
        return live

    def __iter__(self):
        return (getattr(self, name) for name, _ in self._fields_)


class Held:
    """A pool, and what the machine knows of it."""

    def __init__(self, pool):
        self.pool = pool
        self.captures = 0
        self.orphans = []  # tensors that were dropped under exports
        self.cursors = 0  # bytes of what their cursors are pieces of, at most; in no books

    @property
    def budget(self):
        return self.pool.max_bytes or float("inf")


class Export:
    """One look at a tensor: the object that keeps it, the rows that it pins, the contents."""

    def __init__(self, kind, keeper, n_pinned, contents):
        self.kind, self.keeper, self.n_pinned, self.contents = kind, keeper, n_pinned, contents

    def seen(self):
        """What the consumer sees now; None where it cannot look."""
        if self.kind in ("memoryview", "asarray", "from_dlpack"):
            return np.array(self.keeper)
        if self.kind == "interface":
            return to_numpy(self.keeper)
        if self.kind != "consumed" or not self.contents.size:
            return None
        tensor, dtype = self.keeper.tensor, self.contents.dtype
        strides = [n * dtype.itemsize for n in self.keeper.strides]
        if tensor.device_type == dlpack_struct.CUDA:
            return cuda_helper.read(tensor.data, self.keeper.shape, strides, dtype)
        spans = zip(self.keeper.shape, strides, strict=True)
        n_bytes = sum((n - 1) * stride for n, stride in spans) + dtype.itemsize
        memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
        return np.ndarray(self.keeper.shape, dtype, memory, 0, strides).copy()

    def drop(self, on_a_thread=False):
        delete, self.keeper = getattr(self.keeper, "delete", None), None
        if delete and on_a_thread:
            thread = threading.Thread(target=delete)
            thread.start()
            thread.join()
        elif delete:
            delete()


class Tracked:
    """A tensor, its model, and who looks at it."""

    def __init__(self, tensor, model, home):
        self.t, self.model, self.home = tensor, model, home
        self.address, self.strides = tensor.ptr, tensor.strides
        self.exports, self.views = [], []
        self.n_read = 0  # rows that __cuda_array_interface__ has pinned for good
        self.n_shown = 0  # rows of what concat() made of an export, pinned by any export
        self.was_read = False
        self.fresh = True  # nothing is mapped but what growth needed
        self.cursor = None

    @property
    def pinned(self):
        self.n_shown = self.n_shown if self.is_exported else 0
        return max([self.n_read, self.n_shown, *(export.n_pinned for export in self.exports)])

    @property
    def is_exported(self):
        return bool(self.exports) or self.was_read

    def rows_of(self, size):
        return size if isinstance(size, int) else int(size * self.model.capacity)

    def state(self):
        return self.t.length, self.t.mapped, self.t.stats()["mapped_bytes"]


class Machine(RuleBasedStateMachine):
    """Tensors of one shape and dtype: in any layout, pool and capacity."""

    device = None
    n_steps = 0

    @initialize(
        shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        axis=st.integers(0, 3),
        dtype=st.sampled_from(["uint8", "bool", "float16", "int64", "complex128", "bfloat16"]),
    )
    def make(self, shape, axis, dtype):
        self.on_host = self.device == "host"
        self.axis = axis % len(shape)
        self.shape = (*shape[: self.axis], 0, *shape[self.axis + 1 :])
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.block = smallest_block(self.device)
        self.pools, self.tensors, self.given_up = [], [], 0
        self.arrays, self.seed, self.next_capture = [], 0, 0
        self.unraisable, self.hook = [], sys.unraisablehook
        # The type alone: a traceback would keep what the frames below it hold.
        sys.unraisablehook = lambda told: self.unraisable.append(told.exc_type)
        if SIMULATED:
            # What is wrong is told by an invariant, so that hypothesis can say how it came.
            cuda_helper.load().vmm_sim_strict(0)
        self.streams = {} if self.on_host else {n: cuda_helper.Stream() for n in "abc"}
        self.live = self.settle()
        self.open_pool(n_budget=None, n_blocks=None)
        self.open_tensor(0, "seq", 3.0, None, zero=False, n_rows=0, fault=None)

    # ---- how operations are made ------------------------------------------------------

    def settle(self):
        """Everything that can go has gone: what is alive in the simulator, else nothing."""
        if self.on_host:
            return None
        cuda_helper.synchronize()
        for _ in range(3):  # a pool that was given up takes a fence first, then looks at it
            pyvmm.default_pool(self.device).trim(wait=True)
            cuda_helper.synchronize()
        return Live.now() if SIMULATED else None

    def attempt(self, operation, fault=None, **refusals):
        """(True, the result) or, where it is refused, (False, None): by an exception that
        `refusals` allows or, when a driver call was made to fail, by a VMMError. Then no
        tensor has changed."""
        before = {tracked: tracked.state() for tracked in self.tensors}
        simulator = cuda_helper.load() if fault and SIMULATED else None
        n_failed = 0
        if simulator:
            name, nth, code, times = fault
            n_failed = simulator.vmm_sim_failed()
            assert not simulator.vmm_sim_fail(name.encode(), ctypes.c_long(nth), code, times)
        try:
            return True, operation()
        except (pyvmm.VMMError, BufferError, ValueError) as error:
            if not refusals.get(type(error).__name__):
                if not simulator or simulator.vmm_sim_failed() == n_failed:
                    raise
                # A stream that the driver does not answer for is an argument that is wrong.
                if not isinstance(error, pyvmm.VMMError) and "cuStreamGetCtx" not in str(error):
                    raise
        finally:
            if simulator:
                simulator.vmm_sim_fail_none()
                failed[name] += simulator.vmm_sim_failed() - n_failed
        for tracked in self.tensors:  # a callback may have closed some
            assert tracked.state() == before[tracked]
        return False, None

    def pick(self, n):
        return self.tensors[n % len(self.tensors)]

    def home(self, n):
        return self.pools[n % len(self.pools)]

    def is_capturing(self):
        return any(home.captures for home in self.pools)

    def may_run_out(self, *homes):
        return self.is_capturing() or any(home.budget < float("inf") for home in homes)

    def stream(self, name):
        return None if self.on_host else self.streams.get(name, name)

    def number(self, stream):
        return int(stream) if stream is not None else None

    def rows(self, n):
        self.seed += 1
        shape = list(self.shape)
        shape[self.axis] = n
        return pattern(shape, self.dtype, self.seed)

    def on_device(self, kind, *arguments):
        self.arrays.append(kind(*arguments))
        return self.arrays[-1]

    def free_arrays(self):
        while self.arrays:
            self.arrays.pop().free()

    def permuted(self, x):
        """The same values with the dimensions but the last in the opposite order in memory."""
        order = [*reversed(range(x.ndim - 1)), x.ndim - 1]
        return np.ascontiguousarray(x.transpose(order)).transpose(order)

    def source(self, kind, x):
        """x as something to append."""
        # Neither the interface nor the tests' own structs have a name for bfloat16.
        if self.dtype == ml_dtypes.bfloat16 or (kind in DEVICE_SOURCES and self.on_host):
            kind = "array"
        if kind == "permuted":
            return self.permuted(x)
        if kind == "every second row":
            wide = np.repeat(x, 2, axis=self.axis)
            return wide[(slice(None),) * self.axis + (slice(None, None, 2),)]
        if kind == "memoryview":
            return memoryview(x)
        if kind == "dlpack":
            producer = dlpack_struct.Producer(x.ctypes.data, x.shape, x.strides, x.dtype)
            producer.array = x
            return producer
        if kind == "interface":
            return self.on_device(cuda_helper.InterfaceArray, x)
        if kind == "interface on a stream":
            return self.on_device(cuda_helper.InterfaceArray, x, self.streams["a"])
        if kind == "capsule":
            return self.on_device(cuda_helper.CapsuleArray, x)
        if kind == "permuted on the device":
            return self.on_device(cuda_helper.InterfaceArray, self.permuted(x))
        return x

    def is_dense(self, source):
        """The last dimension, as append wants it."""
        if not isinstance(source, (np.ndarray, pyvmm.VTensor, pyvmm.View)):
            return True
        return source.shape[-1] <= 1 or source.strides[-1] == self.dtype.itemsize

    # ---- pools ------------------------------------------------------------------------

    def open_pool(self, n_budget, n_blocks):
        block_size = "auto" if n_blocks is None else n_blocks * self.block
        max_bytes = n_budget and n_budget * self.block
        self.pools.append(Held(pyvmm.Pool(self.device, block_size, max_bytes)))

    @precondition(lambda self: len(self.pools) < MAX_POOLS)
    @step(n_budget=st.sampled_from([None, 4, 20]), n_blocks=st.sampled_from([None, 1, 3]))
    def another_pool(self, n_budget, n_blocks):
        self.open_pool(n_budget, n_blocks)

    @step(n=picks, wait=st.booleans(), fault=faults)
    def trim_pool(self, n, wait, fault):
        self.attempt(lambda: self.home(n).pool.trim(wait=wait), fault, VMMError=self.is_capturing())

    @precondition(lambda self: len(self.pools) > 1)
    @step(n=picks, fault=faults, way=st.sampled_from(["close", "with", "drop"]))
    def end_pool(self, n, fault, way):
        home = self.home(n)
        in_use = home.orphans or [t for t in self.tensors if t.home is home]
        if way == "close":
            ended, _ = self.attempt(
                home.pool.close, fault, VMMError=bool(in_use) or self.is_capturing()
            )
            assert not ended or not in_use
            if ended:
                home.pool.close()  # again: fine
                self.pools.remove(home)
            return
        if in_use or home.captures:
            return
        self.pools.remove(home)
        self.given_up += 1
        if way == "with":
            self.attempt(lambda: home.pool.__exit__(None, None, None), fault)
            assert home.pool.closed
        else:
            self.attempt(lambda: delattr(home, "pool"), fault)

    @step(n=picks, way=st.sampled_from(["close", "close", "lie", "refuse", "raise", "trim"]))
    def on_oom(self, n, way):
        home = self.home(n)
        trim = home.pool.trim

        def close_one():
            for tracked in self.tensors[1:]:
                try:
                    tracked.t.close()
                except (BufferError, pyvmm.VMMError):
                    continue
                self.tensors.remove(tracked)
                return True
            return False

        def callback(n_bytes):
            assert n_bytes > 0
            done[f"on_oom: {way}"] += 1
            if way == "raise":
                raise KeyError("the callback's own trouble")
            if way == "trim":
                try:
                    trim(wait=True)
                except pyvmm.VMMError:
                    return False
            return close_one() if way == "close" else way != "refuse"

        home.pool.on_oom(callback)

    @precondition(lambda self: self.is_capturing() or self.seed >= self.next_capture)
    @step(n=picks)
    def capture(self, n):
        home = self.home(n)
        self.next_capture = self.seed + 3  # that not every other step is this one
        if home.captures:
            home.pool.capture_end()
            home.captures -= 1
        else:
            with pytest.raises(ValueError):
                home.pool.capture_end()
            home.pool.capture_begin()
            home.captures += 1

    # ---- making and ending tensors ----------------------------------------------------

    def open_tensor(self, n, layout, capacity_blocks, n_blocks, zero, n_rows, fault):
        home = self.home(n)
        lane_row = lane_row_bytes(self.shape, self.dtype, self.axis, layout)
        capacity = max(n_rows, 1) + int(capacity_blocks * self.block / lane_row)
        shape = list(self.shape)
        shape[self.axis] = n_rows
        made, tensor = self.attempt(
            lambda: pyvmm.empty(
                shape,
                self.dtype,
                axis=self.axis,
                capacity=capacity,
                layout=layout,
                pool=home.pool,
                block_size=n_blocks and n_blocks * self.block,
                zero=zero,
            ),
            fault,
            OutOfMemoryError=self.may_run_out(home),
        )
        if not made:
            return
        tracked = Tracked(tensor, Model(self.shape, self.dtype, self.axis, capacity), home)
        tracked.zero, tracked.layout = zero, layout
        tracked.auto = n_blocks is None and home.pool.block_size == "auto"
        self.tensors.append(tracked)
        if n_rows:
            x = self.rows(n_rows)
            assert not zero or not to_numpy(tensor).astype(bool).any()
            fill(tensor, x)
            tracked.model.append(x)

    @precondition(lambda self: len(self.tensors) < MAX_TENSORS)
    @step(
        n=picks,
        layout=st.sampled_from(LAYOUTS),
        capacity_blocks=st.floats(0, 6),
        n_blocks=st.sampled_from([None, 1, 3]),
        zero=st.booleans(),
        n_rows=st.sampled_from([0, 0, 2]),
        fault=faults,
    )
    def empty(self, **drawn):
        self.open_tensor(**drawn)

    @precondition(lambda self: len(self.tensors) < MAX_TENSORS)
    @step(n=picks, share=st.floats(0, 1), fault=faults)
    def fork(self, n, share, fault):
        tracked = self.pick(n)
        n_rows = int(tracked.model.length * share)
        made, tensor = self.attempt(
            lambda: tracked.t.fork(n_rows),
            fault,
            OutOfMemoryError=self.may_run_out(tracked.home),
        )
        if made:
            fork = Tracked(tensor, tracked.model.fork(n_rows), tracked.home)
            fork.zero, fork.layout, fork.auto = tracked.zero, tracked.layout, tracked.auto
            self.tensors.append(fork)

    @precondition(lambda self: len(self.tensors) > 1)
    @step(n=picks, fault=faults, way=st.sampled_from(["close", "with", "drop"]))
    def end_tensor(self, n, fault, way):
        tracked = self.pick(n)
        if way == "close":
            ended, _ = self.attempt(tracked.t.close, fault, BufferError=tracked.is_exported)
            assert ended or tracked.is_exported
            assert not ended or not tracked.is_exported
            if not ended:
                return
            tracked.t.close()  # again: fine
            with pytest.raises(pyvmm.VMMError):
                tracked.t.grow(1)
        else:
            self.tensors.remove(tracked)
            n_bytes = tracked.t.stats()["mapped_bytes"]
            views = tracked.views = [] if way == "drop" else tracked.views
            if tracked.exports or tracked.was_read and way == "with":
                tracked.home.orphans.append((tracked, n_bytes))
            if way == "with":
                self.attempt(lambda: tracked.t.__exit__(None, None, None), fault)
                assert tracked.t.closed
                for view, *_ in views:
                    with pytest.raises(pyvmm.VMMError):
                        view.__dlpack__()
            if way == "drop" or not tracked.exports:
                # The last reference, with what __cuda_array_interface__ has pinned.
                self.attempt(lambda: delattr(tracked, "t"), fault)
                if not tracked.exports and tracked.was_read and way == "with":
                    tracked.home.orphans.pop()
            return
        self.tensors.remove(tracked)

    # ---- growing ----------------------------------------------------------------------

    def grow_by(self, tracked, x, operation, fault, **refusals):
        """Grow tensor and model, unless the capacity, a budget or a failure forbids."""
        n = x.shape[self.axis]
        grown, result = self.attempt(
            operation,
            fault,
            CapacityError=not tracked.model.fits(n),
            OutOfMemoryError=self.may_run_out(tracked.home),
            **refusals,
        )
        if grown:
            tracked.model.append(x)
        return result

    @step(
        n=picks,
        size=sizes,
        kind=st.sampled_from(HOST_SOURCES + DEVICE_SOURCES),
        stream=streams,
        fault=faults,
    )
    def append(self, n, size, kind, stream, fault):
        tracked = self.pick(n)
        x = self.rows(tracked.rows_of(size))
        source, stream = self.source(kind, x), self.stream(stream)
        self.grow_by(
            tracked,
            x,
            lambda: tracked.t.append(source, stream=self.number(stream)),
            fault,
            ValueError=not self.is_dense(source),
        )

    @step(
        n=picks,
        of=picks,
        ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        fault=faults,
        stream=streams,
        whole=st.booleans(),
    )
    def append_rows_of_a_tensor(self, n, of, ends, fault, stream, whole):
        tracked, other = self.pick(n), self.pick(of)
        start, stop = sorted(int(end * other.model.length) for end in ends)
        if whole:
            start, stop = 0, other.model.length
        source = other.t if whole else other.t[start:stop]
        x = other.model.rows(start, stop).copy()
        stream = self.number(self.stream(stream))
        self.grow_by(
            tracked,
            x,
            lambda: tracked.t.append(source, stream=stream),
            fault,
            ValueError=not self.is_dense(source),
        )

    @step(
        sizes=st.lists(sizes, min_size=1, max_size=MAX_TENSORS),
        kinds=st.lists(
            st.sampled_from(HOST_SOURCES + DEVICE_SOURCES),
            min_size=MAX_TENSORS,
            max_size=MAX_TENSORS,
        ),
        stream=streams,
        fault=faults,
    )
    def append_many(self, sizes, kinds, stream, fault):
        chosen = self.tensors[: len(sizes)]
        arrays = [self.rows(t.rows_of(n)) for t, n in zip(chosen, sizes, strict=False)]
        sources = [self.source(kind, x) for kind, x in zip(kinds, arrays, strict=False)]
        fit = [t.model.fits(x.shape[self.axis]) for t, x in zip(chosen, arrays, strict=True)]
        grown, _ = self.attempt(
            lambda: pyvmm.append_many(
                [tracked.t for tracked in chosen], sources, stream=self.number(self.stream(stream))
            ),
            fault,
            CapacityError=not all(fit),
            OutOfMemoryError=self.may_run_out(*(tracked.home for tracked in chosen)),
            ValueError=not all(map(self.is_dense, sources)),
        )
        if grown:
            for tracked, x in zip(chosen, arrays, strict=True):
                tracked.model.append(x)

    @step(n=picks, size=sizes, lanes=st.permutations(range(4)), cut=st.integers(0, 4), fault=faults)
    def append_lane_by_lane(self, n, size, lanes, cut, fault):
        """To some lanes first, then to the others: all have it, or none."""
        tracked = self.pick(n)
        length, n_lanes = tracked.model.length, len(tracked.t.lengths)
        x = self.rows(tracked.rows_of(size))
        lanes = [lane for lane in lanes if lane < n_lanes]
        for part in filter(None, (lanes[:cut], lanes[cut:])):
            some = np.take(x, part, axis=0) if n_lanes > 1 else x
            grown, _ = self.attempt(
                functools.partial(tracked.t.append, some, lanes=part),
                fault,
                CapacityError=not tracked.model.fits(x.shape[self.axis]),
                OutOfMemoryError=self.may_run_out(tracked.home),
            )
            if not grown:
                tracked.t.truncate(length)
                tracked.fresh = False
                return
            if len(part) < n_lanes and part == lanes[:cut]:
                n_rows = length + x.shape[self.axis]
                expected = tuple(n_rows if i in part else length for i in range(n_lanes))
                assert tracked.t.lengths == expected
                if tracked.t.ragged:
                    with pytest.raises(ValueError, match="different lengths"):
                        tracked.t.grow(0)
        assert not tracked.t.ragged
        tracked.model.append(x)

    @step(n=picks, size=sizes, fault=faults, keep=st.booleans())
    def grow(self, n, size, fault, keep):
        tracked = self.pick(n)
        start, n_rows = tracked.model.length, tracked.rows_of(size)
        x = self.rows(n_rows)
        view = self.grow_by(tracked, x, lambda: tracked.t.grow(n_rows), fault)
        if view is None:
            return
        assert (view.start, view.stop, view.shape) == (start, start + n_rows, x.shape)
        if tracked.zero:
            assert not to_numpy(view).astype(bool).any()
        fill(view, x)
        if keep:
            tracked.views.append((view, start, start + n_rows))

    @precondition(lambda self: self.on_host)
    @step(n=picks, size=sizes, end=st.floats(0, 2), keep=st.booleans())
    def concat(self, n, size, end, keep):
        """The rows up to `end` with others behind them: appended in place, or a copy."""
        tracked = self.pick(n)
        stop = int(min(end, 1) * tracked.model.length)
        cache = np.asarray(tracked.t) if end > 1 else np.asarray(tracked.t[:stop])
        x = self.rows(tracked.rows_of(size))
        expected = np.concatenate((tracked.model.rows(0, stop), x), self.axis)
        pyvmm.concat_stats(reset=True)
        joined, result = self.attempt(
            lambda: pyvmm.concat(cache, x, self.axis, pool=tracked.home.pool),
            OutOfMemoryError=self.may_run_out(tracked.home),
        )
        if not joined:
            return
        assert same(result, expected)
        appended = pyvmm.concat_stats()["appended"] == 1
        done["concat: appended" if appended else "concat: copied"] += 1
        if appended:
            assert stop == tracked.model.length
            tracked.model.append(x)
            tracked.n_shown = tracked.model.length
            if keep:
                tracked.exports.append(Export("asarray", result, tracked.n_shown, expected))

    @step(n=picks, size=sizes, fault=faults)
    def map(self, n, size, fault):
        tracked = self.pick(n)
        n_rows = tracked.rows_of(size)
        mapped, _ = self.attempt(
            lambda: tracked.t.map(n_rows),
            fault,
            CapacityError=n_rows > tracked.model.capacity,
            OutOfMemoryError=self.may_run_out(tracked.home),
        )
        if mapped:
            assert tracked.t.mapped >= n_rows
            tracked.fresh = False

    @step(sizes=st.lists(sizes, min_size=1, max_size=MAX_TENSORS), fault=faults)
    def map_many(self, sizes, fault):
        chosen = self.tensors[: len(sizes)]
        n_rows = [t.rows_of(n) for t, n in zip(chosen, sizes, strict=False)]
        mapped, _ = self.attempt(
            lambda: pyvmm.map_many([tracked.t for tracked in chosen], n_rows),
            fault,
            CapacityError=any(n > t.model.capacity for t, n in zip(chosen, n_rows, strict=True)),
            OutOfMemoryError=self.may_run_out(*(tracked.home for tracked in chosen)),
        )
        if mapped:
            for tracked, n in zip(chosen, n_rows, strict=True):
                assert tracked.t.mapped >= n
                tracked.fresh = False

    @step(n=picks, size=sizes, n_ahead=st.sampled_from([1, 3]))
    def map_with_lookahead(self, n, size, n_ahead):
        """On for one growth: while the thread is at work, no driver call is made to fail."""
        tracked = self.pick(n)
        pool = tracked.home.pool
        if pool.closed:
            return
        n_rows = tracked.rows_of(size)
        pool.lookahead = n_ahead * self.block
        mapped, _ = self.attempt(
            lambda: tracked.t.map(n_rows),
            CapacityError=n_rows > tracked.model.capacity,
            OutOfMemoryError=self.may_run_out(tracked.home),
        )
        assert held(pool).get("lookahead", 0) <= n_ahead * self.block
        pool.lookahead = None
        assert "lookahead" not in held(pool)
        if mapped:
            assert tracked.t.mapped >= n_rows
            tracked.fresh = False

    # ---- shrinking --------------------------------------------------------------------

    @step(n=picks, share=st.floats(0, 1), stream=streams, fault=faults)
    def truncate(self, n, share, stream, fault):
        tracked, stream = self.pick(n), self.stream(stream)
        n_rows = int(tracked.model.length * share)
        if isinstance(stream, cuda_helper.Stream) and tracked.model.array.nbytes:
            # A reader of the last row that is still at work: it waits for the last append,
            # and what overwrites the row waits for it.
            tracked.t.__dlpack__(stream=int(stream))
            n_bytes = self.dtype.itemsize
            scratch = self.on_device(cuda_helper.DeviceArray, np.zeros(n_bytes, np.uint8))
            scratch.copy_from(tracked.t[-1:].ptr, stream)
        shrunk, _ = self.attempt(
            lambda: tracked.t.truncate(n_rows, stream=self.number(stream)),
            fault,
            BufferError=tracked.pinned > n_rows,
        )
        if not shrunk:
            if isinstance(stream, cuda_helper.Stream):
                stream.synchronize()
            return
        assert tracked.pinned <= n_rows
        tracked.fresh &= n_rows == tracked.model.length
        tracked.model.truncate(n_rows)
        for view, start, stop in tracked.views:
            if stop > n_rows:
                with pytest.raises(BufferError):
                    view.__dlpack__()
                assert view.start == start
        tracked.views = [kept for kept in tracked.views if kept[2] <= n_rows]

    @step(n=picks, fault=faults)
    def trim(self, n, fault):
        tracked = self.pick(n)
        tracked.t.trim() if fault is None else self.attempt(tracked.t.trim, fault)
        tracked.fresh = fault is None

    # ---- looking ----------------------------------------------------------------------

    @step(n=picks, fault=faults)
    def cursor(self, n, fault):
        """From now on every change keeps the length on the device, too."""
        tracked = self.pick(n)
        tracked.home.cursors = CURSORS_BYTES
        made, cursor = self.attempt(lambda: (tracked.t.cursor, tracked.t.cursor.ptr), fault)
        if made:
            assert tracked.cursor in (None, cursor[1])
            tracked.cursor = cursor[1]

    @step(n=picks, ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def view(self, n, ends):
        tracked = self.pick(n)
        start, stop = sorted(int(end * tracked.model.length) for end in ends)
        view = tracked.t.view(start, stop)
        assert same(to_numpy(view), tracked.model.rows(start, stop))
        tracked.views.append((view, start, stop))

    @step(n=picks)
    def views(self, n):
        """Those that were taken earlier show their rows still; then they go."""
        tracked = self.pick(n)
        for view, start, stop in tracked.views:
            assert same(to_numpy(view), tracked.model.rows(start, stop))
        tracked.views = []

    def taken(self, kind, exporter, stream, version):
        if kind in ("capsule", "consumed"):
            capsule = exporter.__dlpack__(stream=stream, max_version=version)
            return capsule if kind == "capsule" else dlpack_struct.Consumer(capsule)
        if kind == "interface":
            assert exporter.__cuda_array_interface__["version"] == 3
            return exporter
        take = {"memoryview": memoryview, "asarray": np.asarray, "from_dlpack": np.from_dlpack}
        return take[kind](exporter)

    @step(
        n=picks,
        of=st.sampled_from(["tensor", "view", "view", "reserved"]),
        ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        kind=st.sampled_from(sorted({*HOST_EXPORTS, *DEVICE_EXPORTS})),
        stream=streams,
        version=st.sampled_from([None, (1, 0)]),
        fault=faults,
    )
    def export(self, n, of, ends, kind, stream, version, fault):
        tracked = self.pick(n)
        start, stop = 0, tracked.model.length
        exporter = tracked.t
        if of == "view":
            start, stop = sorted(int(end * stop) for end in ends)
            exporter = tracked.t[start:stop]
        elif of == "reserved":
            exporter, kind = tracked.t.reserved(), "capsule"
        if kind not in (HOST_EXPORTS if self.on_host else DEVICE_EXPORTS):
            kind = "consumed"
        if self.dtype == ml_dtypes.bfloat16 and kind not in ("capsule", "consumed", "asarray"):
            kind = "capsule"
        stream = self.number(self.stream(stream))
        # Read only when nothing fails: it makes no driver call.
        if kind == "interface" and of == "tensor":
            assert tracked.t.__cuda_array_interface__["data"][0] in (tracked.address, 0)
            tracked.n_read, tracked.was_read = max(tracked.n_read, stop), True
            return
        made, keeper = self.attempt(lambda: self.taken(kind, exporter, stream, version), fault)
        if made:
            n_pinned = stop if start < stop and of != "reserved" else 0
            contents = tracked.model.rows(start, stop).copy()
            tracked.exports.append(Export(kind, keeper, n_pinned, contents))

    @step(n=picks, which=st.integers(0, 9), on_a_thread=st.booleans(), fault=faults)
    def drop_export(self, n, which, on_a_thread, fault):
        tracked = self.pick(n)
        self.drop(tracked.exports, which, on_a_thread, fault)

    @precondition(lambda self: any(home.orphans for home in self.pools))
    @step(n=picks, which=st.integers(0, 9), on_a_thread=st.booleans(), fault=faults)
    def drop_orphan(self, n, which, on_a_thread, fault):
        """An export that has outlived its tensor."""
        home = self.home(n)
        if not home.orphans:
            return
        orphan, _ = home.orphans[0]
        self.drop(orphan.exports, which, on_a_thread, fault)
        if not orphan.exports:
            home.orphans.pop(0)

    def drop(self, exports, which, on_a_thread, fault):
        if exports:
            export = exports.pop(which % len(exports))
            seen = None if export.kind == "interface" else export.seen()
            assert seen is None or same(seen, export.contents)
            self.attempt(lambda: export.drop(on_a_thread), fault)

    # ---- what always holds --------------------------------------------------------------

    @invariant()
    def tensors_are_as_the_models(self):
        self.n_steps += 1
        for tracked in self.tensors:
            assert tracked.t.length >= tracked.pinned
            t, model = tracked.t, tracked.model
            assert (t.ptr, t.strides) == (tracked.address, tracked.strides)
            assert t.shape == model.array.shape
            assert t.length == model.length <= t.mapped <= t.capacity == model.capacity
            stats = t.stats()
            row_bytes = lane_row_bytes(self.shape, self.dtype, self.axis, tracked.layout)
            lanes = lane_count(self.shape, self.axis, tracked.layout)
            assert stats["used_bytes"] == t.nbytes == model.length * row_bytes * lanes
            assert stats["slack_bytes"] == stats["mapped_bytes"] - stats["used_bytes"]
            assert t.strides == expected_strides(
                self.shape, self.dtype, self.axis, tracked.layout, stats["reserved_bytes"] // lanes
            )
            if tracked.auto and tracked.fresh:
                in_use = model.length * row_bytes
                assert stats["mapped_bytes"] / lanes - in_use <= in_use / 8 + self.block
            if self.n_steps % 4 == 0:  # looking waits for the device
                start = 0 if model.array.nbytes < 4096 else max(0, model.length - 20)
                assert same(to_numpy(t[start:]), model.rows(start, model.length))
                self.check_cursor(tracked)

    def check_cursor(self, tracked):
        if tracked.cursor is None:
            return
        cursor = tracked.t.cursor  # set again, where a fault has kept it from being set
        assert cursor.ptr == tracked.cursor
        if self.on_host:
            lengths = np.asarray(cursor)
        else:
            lengths = cuda_helper.read(cursor.ptr, cursor.shape, cursor.strides, cursor.dtype)
        assert lengths.tolist() == list(tracked.t.lengths)

    @invariant()
    def books_are_right(self):
        total = 0
        for home in self.pools:
            books, stats = held(home.pool), home.pool.stats()
            mapped = sum(t.t.stats()["mapped_bytes"] for t in self.tensors if t.home is home)
            mapped += sum(n_bytes for _, n_bytes in home.orphans)
            assert books.get("in_use", 0) == mapped
            assert sum(books.values()) <= stats["peak_bytes"] <= home.budget
            assert stats["max_bytes"] == (home.pool.max_bytes or 0)
            total += sum(books.values())
        if self.pools and SIMULATED:
            ours = sum(array.n_bytes for array in self.arrays)
            now = Live.now().n_bytes - self.live.n_bytes - ours
            # Pools that were given up return what they held with some other pool's work.
            cursors = sum(home.cursors for home in self.pools)
            assert total <= now <= total + cursors or (self.given_up and now > total)

    @invariant()
    def driver_was_used_well(self):
        if self.tensors and len(self.arrays) > 8:
            self.free_arrays()  # not in the middle of a step
        if self.tensors and SIMULATED:
            simulator = cuda_helper.load()
            simulator.vmm_sim_last_report.restype = ctypes.c_char_p
            assert not simulator.vmm_sim_reports(), simulator.vmm_sim_last_report()
        if self.tensors:
            assert {*self.unraisable} <= {KeyError}, self.unraisable

    def teardown(self):
        if not hasattr(self, "live"):
            return
        if SIMULATED:
            cuda_helper.load().vmm_sim_fail_none()
        try:
            self.end()
        finally:
            sys.unraisablehook = self.hook
            if SIMULATED:
                cuda_helper.load().vmm_sim_reset()
                cuda_helper.load().vmm_sim_strict(1)

    def end(self):
        for home in self.pools:
            while home.captures:
                home.pool.capture_end()
                home.captures -= 1
        for tracked in self.tensors:
            assert same(to_numpy(tracked.t), tracked.model.array)
        looked_at = [*self.tensors, *(orphan for home in self.pools for orphan, _ in home.orphans)]
        for tracked in looked_at:
            while tracked.exports:
                self.drop(tracked.exports, 0, False, None)
        for tracked in self.tensors:
            tracked.views = []
            tracked.t.close() if not tracked.was_read else delattr(tracked, "t")
        del looked_at
        self.tensors = []
        self.free_arrays()
        for home in self.pools:
            home.orphans.clear()
        gc.collect()  # hypothesis keeps what the last step has used
        for home in self.pools:
            home.pool.close()
        self.pools = []
        for stream in self.streams.values():
            stream.close()
        now = self.settle()
        assert now is None or list(now) == list(self.live), (list(now), list(self.live))
