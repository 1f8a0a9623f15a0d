# cython: language_level=3, embedsignature=True
"""The first rows of a live tensor as bytes, for a framework that shares memory with a buffer."""

cimport cython
from cpython.buffer cimport Py_buffer, PyBuffer_FillInfo

from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    vmm_axis,
    vmm_find,
    vmm_ndim,
    vmm_pin,
    vmm_pin_rows,
    vmm_release,
    vmm_spec_of,
    vmm_status,
    vmm_strides,
    vmm_tensor,
    vmm_unpin,
)


@cython.final
cdef class Rows:
    """Pins rows [0, n) of the tensor that begins at an address and offers the bytes from there
    to the end of the last row, lanes and the gaps between them included.

    address: of row 0, on the host: what lies on a GPU is no buffer
    shape:   of the rows, one size for each dimension of the tensor; none is 0

    Raises ValueError where no tensor begins or the shape is another's."""
    cdef vmm_pin *pin
    cdef const char *data
    cdef Py_ssize_t n_bytes

    def __init__(self, size_t address, shape):
        cdef vmm_tensor *tensor
        cdef vmm_status status
        cdef int d
        if self.pin != NULL:
            raise RuntimeError("Rows are made once")
        check(vmm_find(<const void *>address, &tensor))
        if tensor == NULL:
            raise ValueError(f"no tensor begins at {address:#x}")
        try:
            if len(shape) != vmm_ndim(tensor):
                raise ValueError(f"{len(shape)} sizes for {vmm_ndim(tensor)} dimensions")
            self.n_bytes = vmm_spec_of(tensor).dtype.bits // 8
            for d in range(vmm_ndim(tensor)):
                self.n_bytes += (shape[d] - 1) * vmm_strides(tensor)[d]
            self.data = <const char *>address
            status = vmm_pin_rows(tensor, shape[vmm_axis(tensor)], &self.pin)
        finally:
            with nogil:  # the last reference, perhaps, which frees memory
                vmm_release(tensor)
        check(status)

    def __dealloc__(self):
        with nogil:
            vmm_unpin(self.pin)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.data, self.n_bytes, False, flags)
