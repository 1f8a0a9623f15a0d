# cython: language_level=3, embedsignature=True
"""Streams that users name, and objects kept alive until a stream has read them."""

from operator import index

cimport cython
from cpython.bool cimport PyBool_Check
from cpython.long cimport PyLong_AsVoidPtr, PyLong_Check, PyLong_FromVoidPtr

from pyvmm._dlpack cimport DL_ROCM, DLDevice
from pyvmm._libvmm cimport (
    VMM_OK,
    VMM_STREAM_LEGACY,
    vmm_device,
    vmm_event,
    vmm_event_close,
    vmm_event_query,
    vmm_event_record,
    vmm_status,
    vmm_stream,
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
