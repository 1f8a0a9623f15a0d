from cpython.ref cimport PyObject
from libc.stdint cimport int64_t

from pyvmm._dlpack cimport DLDevice
from pyvmm._libvmm cimport VMM_MAX_NDIM, vmm_array, vmm_dtype, vmm_stream


# What a tensor takes.
ctypedef struct Target:
    DLDevice device
    vmm_dtype dtype
    int ndim
    int axis
    const int64_t *row_shape


# What an append reads: `array`, and what has to be given back when it has.
ctypedef struct Source:
    vmm_array array
    DLDevice device  # in whose memory: DL_CPU for all that the CPU reads, pinned or not
    int64_t shape[VMM_MAX_NDIM]
    int64_t strides[VMM_MAX_NDIM]
    # The stream that the producer works on, where it names one (then not NULL).
    vmm_stream producer
    # It was not told, and is on the GPU: the object must live until the append has read it. What
    # look_at() finds like this can be appended only after it has been read again.
    bint outlives
    PyObject *capsule
    Py_buffer buffer
    bint has_buffer


# Is x read by its type's exchange table? Then read_source() holds nothing of it.
cdef bint has_table(object x) except -1
cdef int read_source(object x, const Target *target, vmm_stream stream, Source *out) except -1
# `target` is NULL for a look at x, wherever it lies and whatever it is of.
cdef int describe(Source *out, const Target *target, DLDevice device, vmm_dtype dtype, int ndim,
                  const int64_t *shape, const int64_t *strides, int64_t stride_unit) except -1
cdef int check_shape(const Source *source, const Target *target) except -1
cdef void begin_source(Source *out) noexcept
cdef void close_source(Source *source) noexcept
cdef int look_at(object x, Source *out) except -1
cdef str device_name(DLDevice device)
