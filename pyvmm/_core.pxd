from libc.stdint cimport int64_t

from pyvmm._dlpack cimport Region
from pyvmm._libvmm cimport vmm_pin, vmm_stream, vmm_tensor
from pyvmm._pool cimport Pool
from pyvmm._source cimport Target


cdef struct Link:
    # A live view in its tensor's list, so that truncation can mark it.
    Link *next
    Link **previous  # what points here; NULL outside of a list
    Py_ssize_t stop
    bint stale


cdef Py_ssize_t row_count(object n, str name) except -1


cdef class TensorCore:
    cdef vmm_tensor *handle  # NULL once closed
    cdef Pool pool_
    cdef object dtype_
    cdef str layout_
    cdef object block_size_
    cdef tuple strides_
    cdef Target target  # its row_shape is the library's, and lives as long as the handle
    cdef const int64_t *byte_strides  # likewise
    cdef char *base
    cdef Py_ssize_t capacity_
    cdef Py_ssize_t row_bytes
    cdef int itemsize
    cdef bint on_host
    cdef bint zero
    cdef bytes format  # of the buffer protocol, None for none
    cdef vmm_pin *interface_pin  # see __cuda_array_interface__
    cdef Py_ssize_t interface_rows
    cdef Link *views
    cdef Py_ssize_t n_given_up  # calls that gave up rows, or memory behind them

    # Calls that let other threads run shut them out: the thread inside, 0 for none, by this
    # object and by any object of the same tensor.
    cdef unsigned long owner
    cdef unsigned long *owner_of_all
    cdef int process
    cdef bint given_up  # to be released when the owner has left
    cdef object __weakref__

    cdef void adopt(self, vmm_tensor *handle, Pool pool, object dtype, str layout,
                    object block_size, bint zero)
    cdef void hold(self, vmm_tensor *handle, Pool pool) noexcept
    cdef int live(self, str operation) except -1
    cdef bint available(self, str operation) except -1
    cdef int wait_for_others(self, str operation) except -1
    cdef vmm_tensor *enter(self, str operation) except NULL
    cdef void take(self, unsigned long thread) noexcept
    cdef void leave(self) noexcept
    cdef tuple shape_of(self, Py_ssize_t n_rows)
    cdef int region_of(self, Py_ssize_t start, Py_ssize_t stop, Region *out) except -1
    cdef void mark_stale(self, Py_ssize_t n_rows) noexcept
    cdef vmm_pin *pin(self, Py_ssize_t n_rows) except NULL
    cdef int handoff(self, vmm_stream stream) except -1
    cdef int add_reader(self, vmm_stream stream) except -1


cdef object no_copies(str what, str instead)
