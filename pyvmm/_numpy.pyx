# cython: language_level=3, embedsignature=True
"""NumPy, for concat()."""

import numpy

cimport cython
from cpython.buffer cimport Py_buffer, PyBuffer_FillInfo

from pyvmm._concat cimport Framework
from pyvmm._core cimport TensorCore
from pyvmm._libvmm cimport vmm_lane_bytes, vmm_lane_count, vmm_pin, vmm_unpin
from pyvmm._view cimport View

from pyvmm._concat import register

cdef type _ndarray = numpy.ndarray
cdef object _concatenate = numpy.concatenate


@cython.final
cdef class Reservation:
    """All bytes of a tensor's address space, mapped or not: the base of arrays."""
    cdef vmm_pin *pin
    cdef char *data
    cdef Py_ssize_t n_bytes

    def __dealloc__(self):
        with nogil:
            vmm_unpin(self.pin)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.n_bytes, False, flags)


@cython.final
cdef class NumPy(Framework):
    cpdef object unfit(self, object cache, object new):
        if type(cache) is not _ndarray or type(new) is not _ndarray:
            return "types"
        return None

    cpdef object concatenate(self, object cache, object new, object axis):
        return _concatenate((cache, new), axis)

    cpdef object anchor(self, object cache):
        base = _owner_of(cache)
        if isinstance(base, Reservation):
            return <size_t>(<Reservation>base).data
        owner = base.obj if isinstance(base, memoryview) else None
        if isinstance(owner, TensorCore):
            return owner.ptr
        if isinstance(owner, View):
            return owner.base.ptr if owner.start == 0 else 0
        return 0

    cpdef object wrap(self, View reserved):
        cdef TensorCore tensor = reserved.live("concat")
        cdef Reservation whole = Reservation.__new__(Reservation)
        whole.pin = tensor.pin(0)
        whole.data = tensor.base
        whole.n_bytes = vmm_lane_count(tensor.handle) * vmm_lane_bytes(tensor.handle)
        return _ndarray((0,), tensor.dtype_, whole)

    cpdef object cut(self, object array, tuple shape, tuple strides):
        whole = _owner_of(array)
        if type(whole) is not Reservation:
            return None
        return _ndarray(shape, array.dtype, whole, 0, strides)

    cpdef object dense(self, object array):
        return numpy.ascontiguousarray(array)


cdef object _owner_of(object array):
    """What holds the memory that an array shows."""
    while type(array) is _ndarray:
        array = array.base
    return array


NUMPY = NumPy()
register(_ndarray, NUMPY)
