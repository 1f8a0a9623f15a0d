from pyvmm._core cimport TensorCore


cdef int append_one(TensorCore tensor, object x, object stream) except -1
