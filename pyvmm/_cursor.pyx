# cython: language_level=3, embedsignature=True
"""The lengths of a tensor in memory that its device reads."""

import numpy

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer
from libc.stdint cimport int32_t

from pyvmm._buffer cimport fill_buffer, release_buffer
from pyvmm._core cimport no_copies, row_count
from pyvmm._dlpack cimport make_capsule
from pyvmm._error cimport check
from pyvmm._export cimport consumer_of, dlpack_device
from pyvmm._libvmm cimport (
    VMM_OK,
    VMM_STREAM_LEGACY,
    VMM_STREAM_NONE,
    vmm_advance,
    vmm_advance_waits,
    vmm_cursor,
    vmm_dtype,
    vmm_last_stream,
    vmm_length,
    vmm_length_count,
    vmm_mapped,
    vmm_pin,
    vmm_pin_cursor,
    vmm_status,
    vmm_tensor,
    vmm_unpin,
)
from pyvmm._stream cimport number_of

cdef extern from *:
    Py_ssize_t PY_SSIZE_T_MAX

cdef object _INT32 = numpy.dtype("int32")


cdef Cursor cursor_of(TensorCore tensor):
    """The Cursor of a tensor, which now has one."""
    cdef Region region
    cdef Cursor cursor = Cursor.__new__(Cursor)
    cursor.tensor = tensor
    cursor.region(VMM_STREAM_NONE, &region)
    return cursor


cdef inline bint advances_at_once(TensorCore tensor) noexcept:
    """Neither the driver nor a lock has a part in it: the GIL stays."""
    return (tensor.handle != NULL and tensor.owner_of_all[0] == 0
            and not vmm_advance_waits(tensor.handle))


cdef int advance_one(TensorCore tensor, Py_ssize_t n_rows) except -1:
    """VTensor.advance()."""
    cdef vmm_status status
    cdef vmm_tensor *handle
    tensor.live("advance")
    if advances_at_once(tensor):
        return check(vmm_advance(tensor.handle, n_rows))
    handle = tensor.enter("advance")  # raises, or waits for another thread
    with nogil:
        status = vmm_advance(handle, n_rows)
    tensor.leave()
    check(status)
    return tensor.live("advance")  # another thread may have given it up meanwhile


def advance_many(tensors, n=1):
    """Follow a replayed graph that has appended n rows to each of these VTensors: their
    VTensor.advance() in one call. Returns how many more rows fit behind what is in use, of the
    tensor where the fewest do: t.mapped - t.length. As long as that is n or more, the graph may be
    replayed without a look at any of them.

    Raises what advance() does, for the first that cannot follow; those after it have followed if
    they could."""
    cdef Py_ssize_t n_rows, i, room, least = PY_SSIZE_T_MAX
    cdef TensorCore tensor
    cdef vmm_status status
    cdef bint at_once
    if not isinstance(tensors, (list, tuple)):
        raise TypeError("advance_many takes a list of tensors")
    n_rows = row_count(n, "n")
    refused = None
    cdef tuple all_of_them = tuple(tensors)  # the caller's list may change meanwhile
    for i in range(len(all_of_them)):
        if not isinstance(all_of_them[i], TensorCore):
            raise TypeError(f"advance_many takes VTensors, not {type(all_of_them[i]).__name__}")
    for i in range(len(all_of_them)):
        tensor = <TensorCore>all_of_them[i]
        at_once = advances_at_once(tensor)
        status = vmm_advance(tensor.handle, n_rows) if at_once else VMM_OK
        if not at_once or status != VMM_OK:
            error = _refusal(tensor, n_rows, at_once, status)
            if error is not None:
                refused = error if refused is None else refused
                continue
        room = <Py_ssize_t>(vmm_mapped(tensor.handle) - vmm_length(tensor.handle))
        least = min(least, room)
    if refused is not None:
        raise refused
    return least if least != PY_SSIZE_T_MAX else 0


cdef object _refusal(TensorCore tensor, Py_ssize_t n_rows, bint at_once, vmm_status status):
    """What its advance() raises, None where it has followed. Apart, for a try block costs those who
    have followed, too; `status` is that of one which has been made `at_once`."""
    try:
        check(status)
        if not at_once:
            advance_one(tensor, n_rows)
    except Exception as error:
        return error


@cython.final
cdef class Cursor:
    """The lengths of a VTensor on its own device: int32, one for each of t.lengths; t.cursor.

    Append, grow, truncate and replayed graphs keep it current, in the order of their streams,
    so that kernels read how far the tensor goes (attention kernels call it the sequence
    lengths). torch.from_dlpack(t.cursor), cupy.asarray(t.cursor), on the host
    numpy.asarray(t.cursor): they share its memory, at an address that never changes. While one
    lives the tensor cannot be closed; truncating is allowed.

    To be read only: who writes there sends replayed appends to wrong rows. The exports say so
    and NumPy and JAX hold to it; torch, CuPy and Paddle make writable arrays of anything.
    """

    def __init__(self):
        raise TypeError("a Cursor is t.cursor of a VTensor")

    def __dealloc__(self):
        if self.interface_pin != NULL:
            with nogil:
                vmm_unpin(self.interface_pin)

    cdef TensorCore made(self):
        if self.tensor is None:
            raise TypeError("a Cursor is t.cursor of a VTensor")
        self.tensor.live("cursor")
        return self.tensor

    cdef int region(self, vmm_stream stream, Region *out) except -1:
        """Where it lies; work that `stream` is given from now on finds it current."""
        cdef TensorCore tensor = self.made()
        cdef int32_t *values
        cdef vmm_status status
        cdef vmm_tensor *handle = tensor.enter("cursor")
        with nogil:
            status = vmm_cursor(handle, stream, &values)
        out.shape[0] = vmm_length_count(handle)
        tensor.leave()
        check(status)
        self.made()  # another thread may have given it up meanwhile
        out.data = values
        out.device = tensor.target.device
        out.dtype = vmm_dtype(0, 32, 1)
        out.itemsize = 4
        out.ndim = 1
        out.strides[0] = 4
        return 0

    cdef vmm_pin *pin(self) except NULL:
        cdef vmm_pin *pin
        check(vmm_pin_cursor(self.made().handle, &pin))
        return pin

    @property
    def shape(self):
        """(n,), for n lengths."""
        return (vmm_length_count(self.made().handle),)

    @property
    def strides(self):
        """(4,): bytes from one length to the next."""
        return (4,)

    @property
    def dtype(self):
        """int32, a numpy.dtype."""
        return _INT32

    @property
    def ndim(self):
        """1."""
        return 1

    @property
    def nbytes(self):
        """4 for each length."""
        return 4 * vmm_length_count(self.made().handle)

    @property
    def device(self):
        """The tensor's device: "host", "cuda:0", "hip:0"."""
        return self.made().pool_.device_name

    @property
    def ptr(self):
        """The address, an integer. It never changes."""
        cdef Region region
        self.region(VMM_STREAM_NONE, &region)
        return <size_t>region.data

    @property
    def base(self):
        """The VTensor."""
        return self.made()

    def __repr__(self):
        if self.tensor is None or self.tensor.handle == NULL:
            return "<pyvmm.Cursor of a closed VTensor>"
        return f"<pyvmm.Cursor {self.shape} int32 on {self.device}>"

    def __reduce__(self):
        raise no_copies("Cursor", "copy what was made from it; t.lengths are the host's numbers")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule, sharing memory that is to be read only; a versioned one says so.
        `stream` is the consumer's, and finds it current; see VTensor.__dlpack__()."""
        cdef TensorCore tensor = self.made()
        cdef vmm_stream consumer = consumer_of(tensor, stream, dl_device, copy)
        cdef Region region
        self.region(consumer, &region)
        return make_capsule(&region, self.pin(), max_version is not None
                            and max_version[0] >= 1, read_only=True)

    def __dlpack_device__(self):
        """DLPack's (device type, device number), as the tensor's."""
        return dlpack_device(self.made())

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef TensorCore tensor = self.made()
        cdef Region region
        if not tensor.on_host:
            raise BufferError(f"this memory is on {self.device}, out of the buffer protocol's "
                              "reach: import it by DLPack, as torch.from_dlpack() does")
        if flags & PyBUF_WRITABLE:
            raise BufferError("a cursor is read only: append(), grow() and truncate() move it")
        self.region(VMM_STREAM_NONE, &region)
        fill_buffer(buffer, flags, &region, self.pin(), b"i")
        buffer.readonly = True
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)

    def __array__(self, dtype=None, copy=None):
        """The lengths as a numpy.ndarray, sharing memory unless another dtype or a copy is asked
        for. Raises TypeError for memory on a GPU."""
        if not self.made().on_host:
            raise TypeError(f"this memory is on {self.device}, out of NumPy's reach: t.lengths "
                            "are the host's numbers")
        array = numpy.frombuffer(memoryview(self), _INT32)
        if dtype is None or numpy.dtype(dtype) == _INT32:
            return array.copy() if copy else array
        if copy is not None and not copy:
            raise ValueError(f"int32 cannot be seen as {numpy.dtype(dtype)} without a copy")
        return array.astype(dtype)

    @property
    def __cuda_array_interface__(self):
        """Version 3 of the interface; absent on the host. Once it has been read, the tensor
        cannot be closed until this Cursor is collected."""
        cdef TensorCore tensor = self.made()
        cdef Region region
        cdef vmm_stream stream
        if tensor.on_host:
            raise AttributeError("__cuda_array_interface__")
        self.region(VMM_STREAM_NONE, &region)
        if self.interface_pin == NULL:
            self.interface_pin = self.pin()
        stream = vmm_last_stream(tensor.handle)
        return {
            "shape": self.shape,
            "typestr": _INT32.str,
            "data": (<size_t>region.data, True),
            "strides": None,
            "version": 3,
            "stream": number_of(VMM_STREAM_LEGACY if stream == NULL else stream,
                                tensor.target.device),
        }
