# cython: language_level=3, embedsignature=True
"""Views of tensors."""

cimport cython
from cpython.buffer cimport Py_buffer

from pyvmm._buffer cimport release_buffer
from pyvmm._core cimport TensorCore, no_copies
from pyvmm._export cimport dlpack_device, interface_of, to_buffer, to_dlpack, to_numpy
from pyvmm._libvmm cimport vmm_unpin


cdef View view_of(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop):
    """The View of rows [start, stop), which truncation below `stop` will mark."""
    cdef View view = View.__new__(View)
    view.base_ = tensor
    view.start_ = start
    view.link.stop = stop
    view.link.next = tensor.views
    view.link.previous = &tensor.views
    if tensor.views != NULL:
        tensor.views.previous = &view.link.next
    tensor.views = &view.link
    return view


cdef View reserved_view(TensorCore tensor):
    """The View of the whole capacity, which no truncation touches."""
    cdef View view = View.__new__(View)
    view.base_ = tensor
    view.link.stop = tensor.capacity_
    view.whole = True
    return view


@cython.final
@cython.freelist(64)
cdef class View:
    """Rows [start, stop) of a VTensor along its growth axis; t[a:b] and t.grow(n) make them.

    Shares the tensor's memory, and is exported like it: numpy.asarray(v),
    torch.from_dlpack(v). It pins its rows only while it is exported; once one of them has been
    truncated away, exporting it is a BufferError.
    """

    def __init__(self):
        raise TypeError("a View is made by t[a:b] or t.grow(n)")

    def __dealloc__(self):
        if self.link.previous != NULL:
            self.link.previous[0] = self.link.next
            if self.link.next != NULL:
                self.link.next.previous = self.link.previous
        if self.interface_pin != NULL:
            with nogil:
                vmm_unpin(self.interface_pin)

    cdef TensorCore live(self, str operation):
        """The tensor, if these rows can still be used."""
        if self.base_ is None:
            raise TypeError("a View is made by t[a:b] or t.grow(n)")
        self.base_.live(operation)
        if self.link.stale:
            raise BufferError(f"rows of this view, [{self.start_}, {self.link.stop}), were "
                              "truncated away: take a new view")
        return self.base_

    cdef TensorCore made(self):
        if self.base_ is None:
            raise TypeError("a View is made by t[a:b] or t.grow(n)")
        return self.base_

    cdef Py_ssize_t pinned(self):
        """How many of the tensor's rows an export pins."""
        return 0 if self.whole or self.start_ == self.link.stop else self.link.stop

    @property
    def base(self):
        """The VTensor."""
        return self.made()

    @property
    def start(self):
        """The first row."""
        return self.start_

    @property
    def stop(self):
        """The row after the last one."""
        return self.link.stop

    @property
    def shape(self):
        """The sizes; along the growth axis, stop - start."""
        cdef TensorCore tensor = self.made()
        tensor.live("shape")
        return tensor.shape_of(self.link.stop - self.start_)

    @property
    def strides(self):
        """Bytes from one element to the next, for each dimension: the tensor's."""
        return self.made().strides

    @property
    def dtype(self):
        """The element type, a numpy.dtype."""
        return self.made().dtype_

    @property
    def ndim(self):
        """The number of dimensions."""
        return self.made().target.ndim

    @property
    def axis(self):
        """The growth axis."""
        return self.made().target.axis

    @property
    def device(self):
        """The device's name: "host", "cuda:0", "hip:0"."""
        return self.made().pool_.device_name

    @property
    def ptr(self):
        """The address of the first element, an integer."""
        cdef TensorCore tensor = self.made()
        tensor.live("ptr")
        return <size_t>(tensor.base + self.start_ * tensor.byte_strides[tensor.target.axis])

    @property
    def nbytes(self):
        """Bytes of these rows."""
        return (self.link.stop - self.start_) * self.made().row_bytes

    def __repr__(self):
        cdef TensorCore tensor = self.base_
        if tensor is None:
            return "<pyvmm.View of nothing>"
        state = ""
        if tensor.handle == NULL:
            state = ", closed"
        elif self.link.stale:
            state = ", truncated away"
        elif self.whole:
            state = ", the whole reservation"
        return (f"<pyvmm.View of rows [{self.start_}, {self.link.stop}), {tensor.dtype_} on "
                f"{tensor.pool_.device_name}{state}>")

    def __reduce__(self):
        raise no_copies("View", "copy what was made from it, as numpy.asarray(v)")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of these rows, see VTensor.__dlpack__(). Raises BufferError, too,
        once rows of the view have been truncated away."""
        cdef TensorCore tensor = self.live("export")
        return to_dlpack(tensor, self.start_, self.link.stop, self.pinned(), stream, max_version,
                         dl_device, copy)

    def __dlpack_device__(self):
        """DLPack's (device type, device number): (1, 0) on the host, (2, N) for "cuda:N", (10, N)
        for "hip:N"."""
        cdef TensorCore tensor = self.made()
        tensor.live("export")
        return dlpack_device(tensor)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef TensorCore tensor = self.live("export")
        to_buffer(tensor, self.start_, self.link.stop, self.pinned(), buffer, flags,
                  tensor.format)
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)

    def __array__(self, dtype=None, copy=None):
        """These rows as a numpy.ndarray, see VTensor.__array__()."""
        cdef TensorCore tensor = self.live("export")
        return to_numpy(tensor, self.start_, self.link.stop, self.pinned(), self, dtype, copy)

    @property
    def __cuda_array_interface__(self):
        """Version 3 of the interface, see VTensor. Once it has been read, the rows stay pinned
        until this view is collected."""
        cdef TensorCore tensor = self.made()
        if tensor.on_host or tensor.format is None:
            raise AttributeError("__cuda_array_interface__")
        self.live("export")
        if self.interface_pin == NULL:
            self.interface_pin = tensor.pin(self.pinned())
        return interface_of(tensor, self.start_, self.link.stop)
