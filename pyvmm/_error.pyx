# cython: language_level=3, embedsignature=True
"""The exceptions of pyvmm, and how a vmm_status becomes one."""

from cpython.pythread cimport PyThread_get_thread_ident

from pyvmm._libvmm cimport (
    VMM_ERR_CAPACITY,
    VMM_ERR_DTYPE,
    VMM_ERR_INVALID,
    VMM_ERR_OUT_OF_MEMORY,
    VMM_ERR_OVERFLOW,
    VMM_ERR_PINNED,
    VMM_ERR_SHAPE,
    vmm_error,
    vmm_last_error,
    vmm_status,
    vmm_status_name,
)


class VMMError(Exception):
    """An operation failed for a reason that is no mistake in its arguments.

    status:      the library's name for it, such as "VMM_ERR_DRIVER"
    driver_code: the driver's own code (a CUresult, an errno), 0 where it had no part
    operation:   the driver's call that failed ("cuMemCreate"), else the verb ("append")

    Whatever failed has changed nothing, and may be tried again.
    """

    __module__ = "pyvmm"

    def __init__(self, message="", status="VMM_ERR_DRIVER", driver_code=0, operation=""):
        super().__init__(message)
        self.status = status
        self.driver_code = driver_code
        self.operation = operation


class OutOfMemoryError(VMMError, MemoryError):
    """No memory left on the device, or the pool's budget is exhausted.

    holders: who holds memory in this process, as tuples of device, name ("pyvmm.Pool",
             "torch", "cupy", "paddle"), in_use_bytes and unused_bytes; the message has
             them as a table
    """

    __module__ = "pyvmm"
    holders = ()


class CapacityError(VMMError, ValueError):
    """More rows than the capacity, which is fixed when the tensor is made."""

    __module__ = "pyvmm"


# Mistakes in the arguments are Python's own exceptions; what is not here is a VMMError.
cdef dict _PLAIN = {
    <int>VMM_ERR_INVALID: ValueError,
    <int>VMM_ERR_SHAPE: ValueError,
    <int>VMM_ERR_DTYPE: TypeError,
    <int>VMM_ERR_OVERFLOW: OverflowError,
    <int>VMM_ERR_PINNED: BufferError,
}
cdef dict _OURS = {
    <int>VMM_ERR_CAPACITY: CapacityError,
    <int>VMM_ERR_OUT_OF_MEMORY: OutOfMemoryError,
}


cdef object _exception(vmm_status status, str message, int driver_code, str operation):
    plain = _PLAIN.get(<int>status)
    if plain is not None:
        return plain(message)
    name = vmm_status_name(status).decode()
    return _OURS.get(<int>status, VMMError)(message, name, driver_code, operation)


# Who holds what (_memory.py, a layer above), for a shortage to tell: returns the holders, and
# the same as text. It asks the drivers, which may be short of memory for that, too: threads that
# are in it are listed, and what they meet there is told without.
cdef object _who_holds_what = None
cdef set _explaining = set()


cdef int explain_shortages(object who_holds_what) except -1:
    global _who_holds_what
    _who_holds_what = who_holds_what
    return 0


cdef int explain(exception) except -1:
    thread = PyThread_get_thread_ident()
    if thread in _explaining:
        return 0
    _explaining.add(thread)
    try:
        exception.holders, text = _who_holds_what()
    finally:
        _explaining.discard(thread)
    exception.args = (f"{exception.args[0]}\n{text}",)
    return 0


cdef int raise_last(vmm_status status) except -1 nogil:
    # Copied before the GIL is taken: what runs then may fail on this thread, too.
    cdef vmm_error error = vmm_last_error()[0]
    with gil:
        exception = _exception(
            status,
            error.message.decode("utf-8", "replace"),
            error.driver_code,
            error.operation.decode("utf-8", "replace") if error.operation else "",
        )
        if status == VMM_ERR_OUT_OF_MEMORY and _who_holds_what is not None:
            explain(exception)
        raise exception


cdef int raise_status(vmm_status status, str operation, str message) except -1:
    """Raise for a status that this layer found by itself."""
    raise _exception(status, message, 0, operation)


# What interrupted the out-of-memory callbacks of a call that is under way, by its thread.
cdef dict _interrupts = {}


cdef int keep_interrupt(object interrupt) except -1:
    """Have the call of this thread that is under way raise it."""
    global interrupted
    _interrupts.setdefault(PyThread_get_thread_ident(), interrupt)
    interrupted = True
    return 0


cdef int raise_interrupt() except -1:
    global interrupted
    interrupt = _interrupts.pop(PyThread_get_thread_ident(), None)
    interrupted = bool(_interrupts)
    if interrupt is not None:
        raise interrupt
    return 0
