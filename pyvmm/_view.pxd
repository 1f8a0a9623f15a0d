from pyvmm._core cimport Link, TensorCore
from pyvmm._libvmm cimport vmm_pin


cdef View view_of(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop)
cdef View reserved_view(TensorCore tensor)


cdef class View:
    cdef TensorCore base_
    cdef Py_ssize_t start_
    cdef Link link
    cdef bint whole  # reserved(): pins no row
    cdef vmm_pin *interface_pin
    cdef object __weakref__

    cdef TensorCore live(self, str operation)
    cdef TensorCore made(self)
    cdef Py_ssize_t pinned(self)
