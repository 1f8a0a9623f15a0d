# cython: language_level=3, embedsignature=True
"""Streams that users name, streams and objects kept alive until they are not needed."""

import sys
from operator import index

cimport cython
from cpython.bool cimport PyBool_Check
from cpython.long cimport PyLong_AsVoidPtr, PyLong_Check, PyLong_FromVoidPtr

from pyvmm._dlpack cimport DL_ROCM, DLDevice
from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    VMM_OK,
    VMM_STREAM_LEGACY,
    VMM_STREAM_PER_THREAD,
    vmm_base,
    vmm_device,
    vmm_event,
    vmm_event_close,
    vmm_event_query,
    vmm_event_record,
    vmm_find,
    vmm_release,
    vmm_status,
    vmm_stream,
    vmm_tensor,
)
from pyvmm._pool cimport Pool, before_answers


cdef int stream_of(object stream, vmm_stream *out) except -1:
    """The stream that an integer or a framework's stream object means. 0 and 1 are the legacy
    default stream, 2 the per-thread one."""
    handle = stream
    if not PyLong_Check(stream):
        if hasattr(stream, "__cuda_stream__"):
            handle = stream.__cuda_stream__()[1]  # (version of the protocol, handle)
        elif hasattr(stream, "cuda_stream"):  # torch
            handle = stream.cuda_stream
        elif hasattr(stream, "ptr"):  # CuPy
            handle = stream.ptr
        elif hasattr(stream, "__index__"):
            handle = index(stream)
    if not PyLong_Check(handle) or PyBool_Check(handle):
        raise TypeError(
            "stream must be an integer or a stream object of a framework (__cuda_stream__, "
            f".cuda_stream or .ptr), not {type(stream).__name__}"
        )
    if handle < 0:
        raise ValueError(f"{handle} is no stream")
    out[0] = PyLong_AsVoidPtr(handle)
    if out[0] == NULL:
        out[0] = VMM_STREAM_LEGACY
    return 0


cdef object number_of(vmm_stream stream, DLDevice device):
    """The stream as the protocols name it: the default one is 1 for CUDA and 0 for ROCm."""
    if stream == VMM_STREAM_LEGACY and device.device_type == DL_ROCM:
        return 0
    return PyLong_FromVoidPtr(stream)


# ---- the stream of a tensor's last write ---------------------------------------------
#
# The next write on another stream waits for it, and the driver follows its handle. Frameworks
# that have a few streams for good need nothing here; CuPy destroys a stream with the last
# object of it, so of each tensor that was written on one, by its address, that is kept.

cdef dict _modules = sys.modules
cdef dict _last_streams = {}
cdef Py_ssize_t _look_from = 64  # as many, before it is looked whose tensors are gone


cdef int keep_last_stream(vmm_tensor *handle, vmm_stream stream) except -1:
    """`handle` has been written on `stream`, which its framework named and not the caller. NULL is
    a tensor that has gone meanwhile."""
    cdef size_t base
    if handle == NULL or stream == VMM_STREAM_LEGACY or stream == VMM_STREAM_PER_THREAD:
        return 0
    cupy = _modules.get("cupy")
    if cupy is None:
        return 0
    base = <size_t>vmm_base(handle)
    number = PyLong_FromVoidPtr(stream)
    kept = _last_streams.get(base)
    if kept is not None and kept.ptr == number:
        return 0
    try:
        current = cupy.cuda.get_current_stream()
    except Exception:
        return 0  # half imported; the write has been made, and is not to fail now
    if current.ptr != number:
        return 0
    _last_streams[base] = current
    if len(_last_streams) >= _look_from:
        _forget_last_streams()
    return 0


cdef int _forget_last_streams() except -1:
    global _look_from
    cdef vmm_tensor *handle
    for base in list(_last_streams):
        check(vmm_find(PyLong_AsVoidPtr(base), &handle))
        if handle == NULL:
            _last_streams.pop(base, None)
        else:
            with nogil:
                vmm_release(handle)
    _look_from = max(64, 2 * len(_last_streams))
    return 0


# ---- what appends read ----------------------------------------------------------------

@cython.final
cdef class _Kept:
    """An object, and the event after which nothing reads it any more."""
    cdef Pool pool  # keeps the device open
    cdef vmm_stream stream
    cdef vmm_event *event  # NULL while it could not be recorded
    cdef object owner

    def __dealloc__(self):
        with nogil:
            vmm_event_close(self.event)

    cdef bint try_record(self) noexcept:
        """Put the event behind what the stream has been given so far."""
        cdef vmm_device *device = self.pool.opened
        cdef vmm_status status
        with nogil:
            status = vmm_event_record(device, self.stream, &self.event)
        return status == VMM_OK

    cdef bint was_read(self) noexcept:
        cdef int done = 0
        cdef vmm_status status
        if self.event == NULL and not self.try_record():
            return False
        with nogil:
            status = vmm_event_query(self.event, &done)
            if status != VMM_OK:
                # Recorded inside a capture, it never says more: record another next time.
                vmm_event_close(self.event)
                self.event = NULL
        return done


# One place for all devices: what an append has left in flight, until a later one looks.
cdef list _kept = []


cdef int keep_until_read(Pool pool, vmm_stream stream, object owner) except -1:
    """Keep `owner` alive until what `stream` has been given so far is done."""
    cdef _Kept kept = _Kept.__new__(_Kept)
    kept.pool = pool
    kept.stream = stream
    kept.owner = owner
    kept.try_record()
    _kept.append(kept)
    return 0


cdef int drop_what_was_read() except -1:
    """Let go of the oldest objects that have been read."""
    cdef _Kept kept
    while _kept:
        kept = _kept.pop(0)
        if not kept.was_read():
            _kept.append(kept)  # looked at again after the others: streams differ
            return 0
    return 0


def _let_go():
    drop_what_was_read()


before_answers(_let_go)
