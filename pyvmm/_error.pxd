from pyvmm._libvmm cimport VMM_OK, vmm_status


cdef int raise_last(vmm_status status) except -1 nogil
cdef int raise_status(vmm_status status, str operation, str message) except -1
cdef int explain_shortages(object who_holds_what) except -1


cdef inline int check(vmm_status status) except -1 nogil:
    """Raise what the calling thread's last failed call says of itself, unless status is OK."""
    if status != VMM_OK:
        raise_last(status)
    return 0
