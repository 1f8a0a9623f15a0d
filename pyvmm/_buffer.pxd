from cpython.buffer cimport Py_buffer

from pyvmm._dlpack cimport Region
from pyvmm._libvmm cimport vmm_pin


cdef int fill_buffer(Py_buffer *buffer, int flags, const Region *region, vmm_pin *pin,
                     const char *format) except -1
cdef void release_buffer(Py_buffer *buffer) noexcept
