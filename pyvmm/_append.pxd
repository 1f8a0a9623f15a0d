from pyvmm._core cimport TensorCore
from pyvmm._source cimport Source


cdef int append_one(TensorCore tensor, object x, object stream) except -1
cdef int append_to_lanes(TensorCore tensor, object x, object stream, object lanes,
                         object counts) except -1
# Append x if the tensor has `n_rows` rows by then, in every lane, and keep them all while any
# export lives. Else return 1. `seen`, if it is not NULL, is what look_at() found; x fits.
cdef int append_at(TensorCore tensor, object x, const Source *seen, Py_ssize_t n_rows) except -1
