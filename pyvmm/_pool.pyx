# cython: language_level=3, embedsignature=True
"""Pools of physical memory."""

import os
import threading

cimport cython
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from libc.stdint cimport uint64_t

from pyvmm._device cimport canonical_name, open_device
from pyvmm._dlpack cimport DL_CPU, DL_CUDA, DL_ROCM, DLDevice
from pyvmm._error cimport check, explain_shortages, keep_interrupt, raise_status
from pyvmm._libvmm cimport (
    VMM_BLOCK_AUTO,
    VMM_CALL_COUNT,
    VMM_ERR_BUSY,
    VMM_ERR_CLOSED,
    VMM_OK,
    vmm_call,
    vmm_call_name,
    vmm_device,
    vmm_device_close,
    vmm_pool,
    vmm_pool_capture_begin,
    vmm_pool_capture_end,
    vmm_pool_close,
    vmm_pool_create,
    vmm_pool_lookahead,
    vmm_pool_on_oom,
    vmm_pool_release,
    vmm_pool_set_lookahead,
    vmm_pool_statistics,
    vmm_pool_stats,
    vmm_pool_trim,
    vmm_status,
)

from pyvmm._error import VMMError
from pyvmm._memory import join, who_holds_what
from pyvmm._sizes import byte_count

explain_shortages(who_holds_what)


# What appends keep alive until it has been read (_stream.pyx, a layer above) may be memory
# of a pool, so it is let go of, if it can be, before a pool says what it holds.
cdef object _let_go = None


cdef int before_answers(object let_go) except -1:
    global _let_go
    _let_go = let_go
    return 0


cdef size_t block_bytes_of(object block_size) except 0:
    """The library's number for "auto", 2097152 or "2MiB"."""
    if isinstance(block_size, str) and block_size == "auto":
        return VMM_BLOCK_AUTO
    return <size_t>byte_count(block_size, "block_size")


# What True stands for.
cdef size_t LOOKAHEAD_BYTES = 256 << 20


cdef size_t lookahead_bytes_of(object lookahead) except? 0:
    """None, False or 0 (off), True, 268435456 or "256MiB"."""
    if lookahead is None or lookahead is False:
        return 0
    if lookahead is True:
        return LOOKAHEAD_BYTES
    return <size_t>byte_count(lookahead, "lookahead", least=0)


cdef dict calls_by_name(const uint64_t *counts):
    """Driver calls by their names, also those that were not made."""
    cdef int call
    calls = {}
    for call in range(<int>VMM_CALL_COUNT):
        calls[vmm_call_name(<vmm_call>call).decode()] = counts[call]
    return calls


@cython.final
cdef class _Callback:
    """What the library is given for an out-of-memory callback: lives as long as the pool."""
    cdef object function

    def __cinit__(self, function):
        self.function = function


cdef int _run_callback(void *user, size_t needed_bytes) noexcept with gil:
    function = (<_Callback>user).function
    try:
        return bool(function(needed_bytes))
    except Exception as error:
        # There is nobody to raise to, in the middle of a growth.
        PyErr_SetObject(type(error), error)
        PyErr_WriteUnraisable(function)
        return 0
    except BaseException as interrupt:
        keep_interrupt(interrupt)  # Ctrl-C, sys.exit(): for the call that needs the memory
        return 0


@cython.final
cdef class Pool:
    """The physical memory of one device: makes blocks, keeps what tensors gave back, stays
    within a budget.

    device:     "host" (or "cpu"), "cuda:0", "hip:0"
    block_size: bytes of every block, a multiple of the device's granularity, as an integer
                or a string ("32MiB"); "auto" is sizes that grow with the tensor. A tensor
                may ask for another.
    max_bytes:  what the pool holds in all never exceeds it ("60GiB"); None is no budget
    lookahead:  how much a thread of the pool maps ahead of the growth of its tensors, so that
                growth makes no driver call: a size ("256MiB"), True for 256 MiB; None, False
                and 0 are off

    On a GPU, memory that tensors give back is queued until the device is known to be done
    with it. What a closed tensor had stays mapped, and the next tensor of the same shape, dtype,
    capacity and block size takes it over; trim() returns it to the driver. When the device is
    full, the caches of torch, CuPy and Paddle are emptied where these are loaded, and other
    pools of the device trimmed, before OutOfMemoryError is raised, which says who holds what.

    Thread-safe. Works as a context manager; when it ends, or the pool is collected, tensors
    of it go on, and its memory goes with them.

    Raises ValueError, TypeError or OverflowError for arguments, VMMError for a device that
    cannot be used.
    """

    def __init__(self, device, block_size="auto", max_bytes=None, lookahead=None):
        if self.opened != NULL:
            raise TypeError("a Pool cannot be initialised twice")
        cdef str name = canonical_name(device)
        cdef size_t block_bytes = block_bytes_of(block_size)
        cdef size_t ahead_bytes = lookahead_bytes_of(lookahead)
        cdef size_t budget_bytes = 0
        if max_bytes is not None:
            budget_bytes = byte_count(max_bytes, "max_bytes")
            self.budget = budget_bytes
        self.device_name = name
        self.callbacks = []
        self.location = DLDevice(DL_CPU, 0)
        if name != "host":
            kind, _, index = name.partition(":")
            self.location = DLDevice(DL_CUDA if kind == "cuda" else DL_ROCM, int(index))
        self.asked_block_size = "auto" if block_bytes == VMM_BLOCK_AUTO else block_bytes
        cdef vmm_device *opened = open_device(name)
        cdef vmm_pool *handle
        cdef vmm_status status
        with nogil:
            status = vmm_pool_create(opened, block_bytes, budget_bytes, &handle)
            if status == VMM_OK and ahead_bytes:
                status = vmm_pool_set_lookahead(handle, ahead_bytes)
                if status != VMM_OK:
                    vmm_pool_release(handle)
            if status != VMM_OK:
                vmm_device_close(opened)
        check(status)
        self.opened = opened
        self.handle = handle
        join(self)

    # Before what a cycle refers to is cleared: the callbacks are such.
    def __del__(self):
        self.forget_callbacks()

    def __dealloc__(self):
        # Both may take locks that are held while the driver is called.
        with nogil:
            vmm_pool_release(self.handle)
            vmm_device_close(self.opened)

    cdef vmm_pool *enter(self, str operation) except NULL:
        """The handle, for a call during which the pool must not be closed; then leave()."""
        if self.handle == NULL:
            raise_status(VMM_ERR_CLOSED, operation,
                         f"{operation}: this pool of {self.device_name} has been closed")
        self.users += 1
        return self.handle

    cdef void leave(self) noexcept:
        self.users -= 1
        if self.given_up != NULL and self.users == 0:
            with nogil:
                vmm_pool_release(self.given_up)
            self.given_up = NULL

    cdef void forget_callbacks(self) noexcept:
        cdef void *user
        if self.handle == NULL or self.callbacks is None:
            return
        for callback in self.callbacks:
            user = <void *>callback
            with nogil:
                vmm_pool_on_oom(self.handle, NULL, user)
        self.callbacks = []

    @property
    def device(self):
        """The device's name: "host", "cuda:0", "hip:0"."""
        return self.device_name

    @property
    def block_size(self):
        """Bytes of every block, or "auto"."""
        return self.asked_block_size

    @property
    def max_bytes(self):
        """The budget in bytes, None for none."""
        return self.budget

    @property
    def lookahead(self):
        """The most bytes that are mapped ahead of growth, 0 for off. May be set, to all that
        Pool() takes; turning it off gives back what was mapped ahead.
        Raises ValueError, TypeError or OverflowError for what is no size, VMMError when closed
        or when the system has no thread for it."""
        if self.handle == NULL:
            return 0
        return vmm_pool_lookahead(self.handle)

    @lookahead.setter
    def lookahead(self, value):
        cdef size_t ahead_bytes = lookahead_bytes_of(value)
        cdef vmm_status status
        cdef vmm_pool *handle = self.enter("lookahead")
        with nogil:
            status = vmm_pool_set_lookahead(handle, ahead_bytes)
        self.leave()
        check(status)

    @property
    def closed(self):
        """Whether close() has ended it."""
        return self.handle == NULL

    def __repr__(self):
        if self.handle == NULL:
            return f"<pyvmm.Pool of {self.device_name}, closed>"
        try:
            stats = self.stats()
        except VMMError as error:
            return f"<pyvmm.Pool of {self.device_name}: {error}>"
        budget = "" if self.budget is None else f" of at most {self.budget}"
        return (
            f"<pyvmm.Pool of {self.device_name}, block_size={self.asked_block_size}: "
            f"{stats['in_use_bytes']} bytes in use{budget}, {stats['free_bytes']} free, "
            f"{stats['queued_bytes']} queued, {stats['recycled_bytes']} recycled>"
        )

    def stats(self):
        """What the pool holds, in bytes, as a dict.

        in_use_bytes (in blocks that tensors have mapped), free_bytes (kept for the next
        growth), queued_bytes (given back, waiting for the device), lookahead_bytes (mapped
        ahead of growth), recycled_bytes (given back and still mapped, for the next tensor),
        parked_bytes (that the driver refused to take back), peak_bytes, max_bytes (0 for no
        budget), driver_calls (a dict by name).
        Raises VMMError when closed."""
        cdef vmm_pool_stats stats
        cdef vmm_status status
        cdef vmm_pool *handle
        if _let_go is not None:
            _let_go()
        # Only the lock of the books is taken, and shortages of other pools ask: no other thread
        # runs meanwhile, and so none finds the pool in use when it closes it.
        handle = self.enter("stats")
        status = vmm_pool_statistics(handle, &stats)
        self.leave()
        check(status)
        return {
            "in_use_bytes": stats.in_use_bytes,
            "free_bytes": stats.free_bytes,
            "queued_bytes": stats.queued_bytes,
            "lookahead_bytes": stats.lookahead_bytes,
            "recycled_bytes": stats.recycled_bytes,
            "parked_bytes": stats.parked_bytes,
            "peak_bytes": stats.peak_bytes,
            "max_bytes": stats.max_bytes,
            "driver_calls": calls_by_name(stats.driver_calls),
        }

    def trim(self, wait=False):
        """Return to the driver what is free, recycled or mapped ahead, and what is queued and no
        longer in use.

        wait: wait for the device to be done with what is queued, instead of leaving it.
        Raises VMMError: during a capture when something is queued, or when closed."""
        cdef int must_wait = bool(wait)
        cdef vmm_status status
        cdef vmm_pool *handle
        if _let_go is not None:
            _let_go()
        handle = self.enter("trim")
        with nogil:
            status = vmm_pool_trim(handle, must_wait)
        self.leave()
        check(status)

    def on_oom(self, callback):
        """Call `callback(needed_bytes)` before running out of memory is reported.

        It runs on the thread that needs the memory, may free memory anywhere (close other
        tensors, empty a framework's cache, trim this pool), and returns something true if it
        freed any: then the pool tries once more. The tensor that is growing refuses calls
        meanwhile. An exception in it goes to sys.unraisablehook and counts as false;
        KeyboardInterrupt and SystemExit are raised by the call that needed the memory.
        Callbacks run in the order of registration, as long as the pool is open, after the
        caches of torch, CuPy and Paddle have been emptied.
        Raises TypeError for what cannot be called, VMMError when closed."""
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        cdef vmm_status status
        entry = _Callback(callback)
        cdef void *user = <void *>entry
        cdef vmm_pool *handle = self.enter("on_oom")
        self.callbacks.append(entry)
        with nogil:
            status = vmm_pool_on_oom(handle, _run_callback, user)
        self.leave()
        if status != VMM_OK:
            self.callbacks.remove(entry)
        check(status)

    def capture_begin(self):
        """Until capture_end(), take no fence: one would break a stream capture that is going
        on anywhere in the process. Memory that is queued stays so. Calls nest.
        Raises VMMError when closed."""
        cdef vmm_status status
        cdef vmm_pool *handle = self.enter("capture_begin")
        with nogil:
            status = vmm_pool_capture_begin(handle)
        self.leave()
        check(status)

    def capture_end(self):
        """End what the matching capture_begin() began.
        Raises ValueError without one, VMMError when closed."""
        cdef vmm_status status
        cdef vmm_pool *handle = self.enter("capture_end")
        with nogil:
            status = vmm_pool_capture_end(handle)
        self.leave()
        check(status)

    def capturing(self):
        """capture_begin() and capture_end() around a block: `with pool.capturing():`."""
        return _Capture(self)

    def close(self):
        """Return all memory to the driver. Waits for the device where memory is queued.

        Raises VMMError: while tensors of it live, during a capture, when another thread is
        inside a call on it, when torch's allocator is bound to it (pyvmm.torch.allocator), when
        the driver fails; the pool is then as before. Closing twice is fine."""
        if self.handle == NULL:
            return
        if _let_go is not None:
            _let_go()
        if self.users:
            raise_status(VMM_ERR_BUSY, "close", "another thread is using this pool, or it is bound "
                         "to torch's allocator, which keeps it for the life of the process")
        # Taken away first: no other thread may use it while it is being closed.
        cdef vmm_pool *handle = self.handle
        cdef vmm_status status
        self.handle = NULL
        with nogil:
            status = vmm_pool_close(handle)
        if status != VMM_OK:
            self.handle = handle
        check(status)
        self.callbacks = []

    def __enter__(self):
        if self.handle == NULL:
            raise_status(VMM_ERR_CLOSED, "enter",
                         f"this pool of {self.device_name} has been closed")
        return self

    def __exit__(self, *exception):
        """Close the pool; where that is refused, give it up: its tensors go on and take no
        new ones from it."""
        cdef vmm_pool *handle = self.handle
        cdef vmm_status status
        if handle == NULL:
            return
        self.forget_callbacks()
        self.handle = NULL
        if self.users:
            self.given_up = handle  # leave() releases it
            return
        with nogil:
            status = vmm_pool_close(handle)
            if status != VMM_OK:
                vmm_pool_release(handle)

    def __reduce__(self):
        raise TypeError("a Pool cannot be pickled or copied: make another, "
                        "pyvmm.Pool(pool.device, pool.block_size, pool.max_bytes)")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()


@cython.final
cdef class _Capture:
    """The context manager of Pool.capturing()."""
    cdef Pool pool

    def __cinit__(self, Pool pool not None):
        self.pool = pool

    def __enter__(self):
        self.pool.capture_begin()

    def __exit__(self, *exception):
        if self.pool.handle != NULL:
            self.pool.capture_end()


cdef dict _defaults = {}
cdef object _defaults_lock = threading.Lock()


def _after_fork_in_child():
    # The parent's pools are of no use here, and its lock may be held for ever.
    global _defaults, _defaults_lock
    _defaults = {}
    _defaults_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef Pool default_pool_of(str device):
    with _defaults_lock:
        pool = <Pool>_defaults.get(device)
        if pool is None or pool.handle == NULL:
            pool = Pool(device)
            _defaults[device] = pool
        return pool


def default_pool(device):
    """The pool that tensors of a device use unless they are given another: block sizes
    "auto", no budget. One for each device and process.

    Raises ValueError (an unknown name), TypeError, VMMError (a device that cannot be used)."""
    return default_pool_of(canonical_name(device))
