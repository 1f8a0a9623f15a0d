# cython: language_level=3, embedsignature=True
"""The buffer protocol, for rows on the host.

An export owns its pin, shape and strides, since the tensor grows on, and gives them back
with the buffer.
"""

from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS,
    PyBUF_C_CONTIGUOUS,
    PyBUF_F_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_STRIDES,
)
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

from pyvmm._libvmm cimport VMM_MAX_NDIM, vmm_pin, vmm_unpin


cdef struct Export:
    vmm_pin *pin
    Py_ssize_t shape[VMM_MAX_NDIM]
    Py_ssize_t strides[VMM_MAX_NDIM]


cdef bint _is_dense(const Region *region, bint from_last) noexcept:
    """C-contiguous, counted from the last dimension, or Fortran-contiguous from the first."""
    cdef int64_t dense = region.itemsize
    cdef bint follows = True
    cdef int i, n, d = region.ndim
    for i in range(d):
        n = d - 1 - i if from_last else i
        if region.shape[n] == 0:
            return True
        if region.shape[n] > 1:
            follows = follows and region.strides[n] == dense
            dense *= region.shape[n]
    return follows


cdef int fill_buffer(Py_buffer *buffer, int flags, const Region *region, vmm_pin *pin,
                     const char *format) except -1:
    """Answer a request for the buffer of `region`, but for its owner. Takes the pin over, also
    when it fails."""
    cdef bint c_dense = _is_dense(region, True)
    cdef bint f_dense = _is_dense(region, False)
    cdef bint with_strides = flags & PyBUF_STRIDES == PyBUF_STRIDES
    cdef Export *export
    cdef int i
    wanted = None
    if flags & PyBUF_C_CONTIGUOUS == PyBUF_C_CONTIGUOUS and not c_dense:
        wanted = "C-contiguous"
    elif flags & PyBUF_F_CONTIGUOUS == PyBUF_F_CONTIGUOUS and not f_dense:
        wanted = "Fortran-contiguous"
    elif flags & PyBUF_ANY_CONTIGUOUS == PyBUF_ANY_CONTIGUOUS and not (c_dense or f_dense):
        wanted = "contiguous"
    elif not with_strides and not c_dense:
        wanted = "without strides"
    if wanted is not None:
        vmm_unpin(pin)
        raise BufferError(f"these rows do not lie {wanted} in memory: numpy.ascontiguousarray() "
                          "makes a copy that does")
    export = <Export *>malloc(sizeof(Export))
    if export == NULL:
        vmm_unpin(pin)
        raise MemoryError
    export.pin = pin

    buffer.buf = region.data
    buffer.itemsize = region.itemsize
    buffer.len = region.itemsize
    for i in range(region.ndim):
        export.shape[i] = region.shape[i]
        export.strides[i] = region.strides[i]
        buffer.len *= region.shape[i]
    buffer.readonly = 0
    buffer.format = <char *>format if flags & PyBUF_FORMAT else NULL
    buffer.ndim = region.ndim if flags & PyBUF_ND else 1
    buffer.shape = export.shape if flags & PyBUF_ND else NULL
    buffer.strides = export.strides if with_strides else NULL
    buffer.suboffsets = NULL
    buffer.internal = export
    return 0


cdef void release_buffer(Py_buffer *buffer) noexcept:
    cdef Export *export = <Export *>buffer.internal
    # The last export of a tensor that was given up gives its memory back.
    with nogil:
        vmm_unpin(export.pin)
    free(export)
