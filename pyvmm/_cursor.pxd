from pyvmm._core cimport TensorCore
from pyvmm._dlpack cimport Region
from pyvmm._libvmm cimport vmm_pin, vmm_stream


cdef Cursor cursor_of(TensorCore tensor)
cdef int advance_one(TensorCore tensor, Py_ssize_t n_rows) except -1


cdef class Cursor:
    cdef TensorCore tensor
    cdef vmm_pin *interface_pin

    cdef TensorCore made(self)
    cdef vmm_pin *pin(self) except NULL
    cdef int region(self, vmm_stream stream, Region *out) except -1
