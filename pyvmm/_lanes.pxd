from pyvmm._core cimport TensorCore


# Lanes that a call names, with a number of rows for each: see vmm_append_lanes(). `lanes` and
# `counts` are NULL where they were None; close_lanes() frees them.
ctypedef struct Lanes:
    size_t n
    size_t *lanes
    size_t *counts


cdef int read_lanes(object lanes, object counts, Lanes *out) except -1
cdef void close_lanes(Lanes *lanes) noexcept
cdef int truncate_lanes(TensorCore tensor, object n, object stream, object lanes) except -1
cdef tuple lengths_of(TensorCore tensor)
