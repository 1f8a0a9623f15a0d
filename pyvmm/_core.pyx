# cython: language_level=3, embedsignature=True
"""A tensor of the library's: its lifetime, who may call it and when, where its rows lie."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t
from libc.string cimport memcpy
from posix.unistd cimport getpid, usleep

from pyvmm._dlpack cimport DL_CPU, Region
from pyvmm._error cimport check, raise_status
from pyvmm._libvmm cimport (
    VMM_ERR_BUSY,
    VMM_ERR_CLOSED,
    VMM_ERR_FORKED,
    VMM_STREAM_NONE,
    vmm_add_reader,
    vmm_axis,
    vmm_base,
    vmm_capacity,
    vmm_handoff,
    vmm_ndim,
    vmm_pin,
    vmm_pin_rows,
    vmm_release,
    vmm_row_bytes,
    vmm_row_shape,
    vmm_spec_of,
    vmm_status,
    vmm_stream,
    vmm_strides,
    vmm_tensor,
    vmm_unpin,
    vmm_user,
)
from pyvmm._pool cimport Pool

from pyvmm._dtypes import element_of, format_of
from pyvmm._sizes import count


cdef class TensorCore:
    """What views, exports and appends need of a VTensor, which adds what its users call."""

    cdef void adopt(self, vmm_tensor *handle, Pool pool, object dtype, str layout,
                    object block_size, bint zero):
        """Become the owner of a new tensor of the library's."""
        element = element_of(dtype)
        format = format_of(element)
        self.hold(handle, pool)
        self.dtype_ = dtype
        self.layout_ = layout
        self.block_size_ = block_size
        self.strides_ = tuple([self.byte_strides[i] for i in range(self.target.ndim)])
        self.zero = zero
        self.format = None if format is None else format.encode()

    cdef void hold(self, vmm_tensor *handle, Pool pool) noexcept:
        """Take over a reference to a tensor, with what appending to it and exporting it by
        DLPack need. The pool names the device."""
        self.pool_ = pool
        self.target.device = pool.location
        self.target.dtype = vmm_spec_of(handle).dtype
        self.target.ndim = vmm_ndim(handle)
        self.target.axis = vmm_axis(handle)
        self.target.row_shape = vmm_row_shape(handle)
        self.byte_strides = vmm_strides(handle)
        self.base = <char *>vmm_base(handle)
        self.capacity_ = vmm_capacity(handle)
        self.itemsize = self.target.dtype.bits // 8
        self.row_bytes = vmm_row_bytes(handle)
        self.on_host = pool.location.device_type == DL_CPU
        self.process = getpid()
        self.owner_of_all = <unsigned long *>vmm_user(handle)
        self.handle = handle

    def __dealloc__(self):
        cdef Link *link = self.views
        # In a cycle that is being cleared, views may go after their tensor.
        while link != NULL:
            link.previous = NULL
            link = link.next
        # The memory of a tensor on the host goes back here, which takes its time.
        with nogil:
            vmm_unpin(self.interface_pin)
            vmm_release(self.handle)

    # -- who may call, and when

    cdef int live(self, str operation) except -1:
        if self.handle == NULL:
            raise_status(VMM_ERR_CLOSED, operation, f"{operation}: the tensor has been closed")
        return 0

    cdef bint available(self, str operation) except -1:
        """True when no thread is inside a call on this tensor. False after a little wait: ask
        again."""
        self.live(operation)
        if self.owner_of_all[0] == 0:
            return True
        if self.owner_of_all[0] == PyThread_get_thread_ident():
            raise_status(VMM_ERR_BUSY, operation, f"{operation}: the tensor is growing; an "
                         "out-of-memory callback must leave it alone")
        if self.process != getpid():
            raise_status(VMM_ERR_FORKED, operation,
                         f"{operation}: the tensor belongs to the parent process")
        with nogil:
            usleep(20)
        PyErr_CheckSignals()
        return False

    cdef int wait_for_others(self, str operation) except -1:
        """Until no other thread is inside a call: to read what calls change."""
        self.live(operation)
        if self.owner_of_all[0] != PyThread_get_thread_ident():
            while not self.available(operation):
                pass
        return 0

    cdef vmm_tensor *enter(self, str operation) except NULL:
        """Shut other threads out, wait for one that is inside; then leave()."""
        while not self.available(operation):
            pass
        self.take(PyThread_get_thread_ident())
        return self.handle

    cdef void take(self, unsigned long thread) noexcept:
        self.owner = self.owner_of_all[0] = thread

    cdef void leave(self) noexcept:
        cdef vmm_tensor *handle
        self.owner = 0
        if self.handle != NULL:  # else the tensor has gone
            self.owner_of_all[0] = 0
        if self.given_up:
            self.given_up = False
            handle = self.handle
            self.handle = NULL
            with nogil:
                vmm_release(handle)

    # -- where its rows lie, and who looks at them

    cdef tuple shape_of(self, Py_ssize_t n_rows):
        sizes = [self.target.row_shape[i] for i in range(self.target.ndim)]
        sizes[self.target.axis] = n_rows
        return tuple(sizes)

    cdef int region_of(self, Py_ssize_t start, Py_ssize_t stop, Region *out) except -1:
        out.data = self.base + start * self.byte_strides[self.target.axis]
        out.device = self.target.device
        out.dtype = self.target.dtype
        out.itemsize = self.itemsize
        out.ndim = self.target.ndim
        memcpy(out.shape, self.target.row_shape, out.ndim * sizeof(int64_t))
        memcpy(out.strides, self.byte_strides, out.ndim * sizeof(int64_t))
        out.shape[self.target.axis] = stop - start
        return 0

    cdef void mark_stale(self, Py_ssize_t n_rows) noexcept:
        """Rows from here on have been truncated away: views that show one are none any more."""
        cdef Link *link = self.views
        self.n_given_up += 1
        while link != NULL:
            link.stale = link.stale or link.stop > n_rows
            link = link.next

    cdef vmm_pin *pin(self, Py_ssize_t n_rows) except NULL:
        cdef vmm_pin *pin
        check(vmm_pin_rows(self.handle, n_rows, &pin))
        return pin

    cdef int handoff(self, vmm_stream stream) except -1:
        """Make a stream wait for all that was written so far."""
        cdef vmm_status status
        cdef vmm_tensor *handle
        if self.on_host or stream == VMM_STREAM_NONE:
            return 0
        handle = self.enter("handoff")
        with nogil:
            status = vmm_handoff(handle, stream)
        self.leave()
        return check(status)

    cdef int add_reader(self, vmm_stream stream) except -1:
        """Make the next write wait for what a stream will have been given by then."""
        cdef vmm_status status
        cdef vmm_tensor *handle
        if self.on_host:
            return 0
        handle = self.enter("append")
        with nogil:
            status = vmm_add_reader(handle, stream)
        self.leave()
        return check(status)


cdef Py_ssize_t row_count(object n, str name) except -1:
    """A number of rows, 0 or more."""
    cdef int overflow = 0
    cdef long value
    if PyLong_CheckExact(n):
        value = PyLong_AsLongAndOverflow(n, &overflow)
        if value >= 0 and not overflow:
            return value
    return count(n, name)


cdef object no_copies(str what, str instead):
    return TypeError(f"a {what} cannot be pickled or copied: {instead}")
