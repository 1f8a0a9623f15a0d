from pyvmm._libvmm cimport VMM_OK, vmm_status


cdef int raise_last(vmm_status status) except -1 nogil
cdef int raise_status(vmm_status status, str operation, str message) except -1
cdef int explain_shortages(object who_holds_what) except -1


cdef int keep_interrupt(object interrupt) except -1
cdef int raise_interrupt() except -1
cdef bint interrupted  # some thread's call has one to raise


cdef inline int check(vmm_status status) except -1 nogil:
    """Raise what the calling thread's last failed call says of itself, unless status is OK."""
    if status != VMM_OK:
        raise_last(status)
    return 0


cdef inline int check_after_callbacks(vmm_status status) except -1:
    """The same for a call that may have run out-of-memory callbacks: where one of them was
    interrupted, that is what is raised, whether the call has failed or not."""
    if interrupted:
        raise_interrupt()
    return check(status)
