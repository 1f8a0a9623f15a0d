from pyvmm._core cimport TensorCore


cdef int append_one(TensorCore tensor, object x, object stream) except -1
# Append x if the tensor has `n_rows` rows by then, and keep them all while any export lives.
# Else return 1.
cdef int append_at(TensorCore tensor, object x, Py_ssize_t n_rows) except -1
