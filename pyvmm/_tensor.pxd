from pyvmm._core cimport TensorCore


cdef class VTensor(TensorCore):
    pass
