from libc.stdint cimport uint64_t

from pyvmm._libvmm cimport vmm_device, vmm_pool
from pyvmm._dlpack cimport DLDevice


cdef size_t block_bytes_of(object block_size) except 0
cdef dict calls_by_name(const uint64_t *counts)


cdef class Pool:
    cdef vmm_pool *handle  # NULL once closed
    cdef vmm_device *opened
    cdef DLDevice location
    cdef str device_name
    cdef object budget
    cdef object asked_block_size
    cdef list callbacks
    cdef Py_ssize_t users  # threads inside a call on the pool, with the GIL released
    cdef vmm_pool *given_up  # to be released when the last of them has left
    cdef object __weakref__

    cdef vmm_pool *enter(self, str operation) except NULL
    cdef void leave(self) noexcept
    cdef void forget_callbacks(self) noexcept


cdef Pool default_pool_of(str device)
cdef int before_answers(object let_go) except -1
