# cython: language_level=3, embedsignature=True
"""Tensors that grow in place."""

from operator import index

import numpy

cimport cython
from cpython.buffer cimport Py_buffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.slice cimport PySlice_AdjustIndices, PySlice_Check, PySlice_Unpack
from libc.stdint cimport int64_t

from pyvmm._append cimport append_one, append_to_lanes
from pyvmm._buffer cimport release_buffer
from pyvmm._core cimport TensorCore, no_copies, row_count
from pyvmm._cursor cimport advance_one, cursor_of
from pyvmm._device cimport canonical_name
from pyvmm._dlpack cimport DL_CPU
from pyvmm._error cimport check, check_after_callbacks, raise_status
from pyvmm._export cimport dlpack_device, interface_of, to_buffer, to_dlpack, to_numpy
from pyvmm._lanes cimport lengths_of, truncate_lanes
from pyvmm._libvmm cimport (
    VMM_ERR_CAPACITY,
    VMM_LAYOUT_C,
    VMM_LAYOUT_LANE,
    VMM_LAYOUT_SEQ,
    VMM_MAX_NDIM,
    VMM_OK,
    VMM_STREAM_NONE,
    vmm_close,
    vmm_dtype,
    vmm_fork,
    vmm_grow,
    vmm_has_cursor,
    vmm_is_ragged,
    vmm_layout,
    vmm_length,
    vmm_map,
    vmm_map_many,
    vmm_mapped,
    vmm_pin,
    vmm_pool,
    vmm_release,
    vmm_reserve,
    vmm_spec,
    vmm_stats,
    vmm_status,
    vmm_stream,
    vmm_tensor,
    vmm_tensor_stats,
    vmm_trim,
    vmm_truncate,
    vmm_unpin,
)
from pyvmm._pool cimport Pool, block_bytes_of, calls_by_name, default_pool_of
from pyvmm._stream cimport drop_what_was_read, stream_of
from pyvmm._view cimport reserved_view, view_of

from pyvmm._dtypes import element_of
from pyvmm._frameworks import is_capturing
from pyvmm._sizes import count

cdef dict _LAYOUTS = {
    "seq": <int>VMM_LAYOUT_SEQ,
    "lane": <int>VMM_LAYOUT_LANE,
    "c": <int>VMM_LAYOUT_C,
}


# ---- making tensors ---------------------------------------------------------------

def empty(shape, dtype="float32", *, axis=None, capacity, device=None, layout=None,
          block_size=None, pool=None, zero=False):
    """Reserve address space for a tensor that grows along one axis, and return the VTensor.

    shape:      the sizes, each at least 1 but for the growth axis: there the number of rows
                that the tensor begins with, usually 0. (8, 0, 32, 128)
    dtype:      an element type in any framework's own form: "bfloat16", numpy.float16,
                torch.bfloat16. bool, integers, float16/32/64, bfloat16, float8_e4m3fn,
                float8_e5m2, complex64/128
    axis:       the growth axis; where it is left out, the only one of size 0
    capacity:   rows of address space, fixed from now on. It costs no memory.
    device:     "host" (or "cpu"), "cuda:0", "hip:0"; the pool's where one is given, else "host"
    layout:     how memory is ordered: "seq" (growth axis outermost: an append is one dense
                copy), "lane" (dimension 0, then the growth axis, then the rest) or "c" (as
                the shape says). None is "seq" on a GPU, where each lane costs a block, and
                "c" on the host.
    block_size: bytes of every block ("32MiB"), or "auto"; None is the pool's
    pool:       a Pool; None is default_pool(device)
    zero:       rows taken by grow() read zero, instead of undefined bytes

    Raises ValueError, TypeError, IndexError or OverflowError for arguments, VMMError for a
    device that cannot be used or an address range that it refuses, OutOfMemoryError."""
    cdef Pool memory
    cdef vmm_spec spec
    cdef int64_t sizes[VMM_MAX_NDIM]
    cdef Py_ssize_t rows, n_rows
    cdef int ndim, i

    sizes_given = _shape(shape)
    ndim = len(sizes_given)
    spec.ndim = ndim
    spec.axis = _axis(axis, sizes_given)
    for i in range(ndim):
        sizes[i] = count(sizes_given[i], f"the size of dimension {i}")
    spec.shape = sizes
    n_rows = sizes[spec.axis]
    rows = count(capacity, "capacity", 1)
    spec.capacity = rows
    if n_rows > rows:
        raise_status(VMM_ERR_CAPACITY, "empty",
                     f"the shape has {n_rows} rows along axis {spec.axis} and the capacity is "
                     f"{rows}")
    element = element_of(dtype)
    spec.dtype = vmm_dtype(element.code, element.bits, 1)
    spec.zero = bool(zero)
    spec.block_bytes = 0 if block_size is None else block_bytes_of(block_size)
    layout = _check_layout(layout)

    if pool is None:
        memory = default_pool_of("host" if device is None else canonical_name(device))
    elif not isinstance(pool, Pool):
        raise TypeError(f"pool must be a pyvmm.Pool, not {type(pool).__name__}")
    else:
        memory = <Pool>pool
        if device is not None and canonical_name(device) != memory.device_name:
            raise ValueError(f"device is '{device}' and the pool's '{memory.device_name}'")
    if layout is None:
        layout = "c" if memory.location.device_type == DL_CPU else "seq"
    spec.layout = <vmm_layout><int>_LAYOUTS[layout]
    if block_size is None:
        block_size = memory.asked_block_size
    elif block_size != "auto":
        block_size = spec.block_bytes

    if memory.location.device_type == DL_CPU or not is_capturing():
        return _reserve(memory, &spec, element.dtype, layout, block_size, n_rows)
    with memory.capturing():
        return _reserve(memory, &spec, element.dtype, layout, block_size, n_rows)


cdef VTensor _reserve(Pool memory, const vmm_spec *spec, object dtype, str layout,
                      object block_size, Py_ssize_t n_rows):
    cdef VTensor tensor = VTensor.__new__(VTensor)
    cdef vmm_tensor *handle
    cdef vmm_status status
    cdef vmm_pool *pool_handle = memory.enter("empty")
    with nogil:
        status = vmm_reserve(pool_handle, spec, &handle)
    memory.leave()
    check(status)
    tensor.adopt(handle, memory, dtype, layout, block_size, spec.zero)
    if n_rows:
        tensor.grow(n_rows)
    return tensor


cdef tuple _shape(object shape):
    try:
        sizes = (index(shape),) if hasattr(shape, "__index__") else tuple(shape)
    except TypeError:
        raise TypeError(f"shape must be a sequence of integers, not {type(shape).__name__}"
                        ) from None
    if not 1 <= len(sizes) <= VMM_MAX_NDIM:
        raise ValueError(f"{len(sizes)} dimensions: 1 to {VMM_MAX_NDIM} are possible")
    return sizes


cdef int _axis(object axis, tuple shape) except -1:
    cdef Py_ssize_t n
    if axis is None:
        if len(shape) == 1:
            return 0
        if shape.count(0) != 1:
            raise ValueError(f"which axis of the shape {shape} grows? Give axis=, or one size of 0")
        return shape.index(0)
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"axis must be an integer, not {type(axis).__name__}")
    given = index(axis)
    if not -len(shape) <= given < len(shape):
        raise _AxisError(f"axis {given} is out of range for {len(shape)} dimensions")
    n = given
    return n if n >= 0 else n + len(shape)


class _AxisError(ValueError, IndexError):
    """As NumPy has it: an axis out of range is both."""

    __module__ = "pyvmm"
    __qualname__ = __name__ = "AxisError"


cdef object _check_layout(object layout):
    if layout is None or (isinstance(layout, str) and layout in _LAYOUTS):
        return layout
    raise ValueError(f"unknown layout {layout!r}: known are {', '.join(map(repr, _LAYOUTS))}")


# ---- several at once --------------------------------------------------------------

def map_many(tensors, n):
    """Back the first rows of these VTensors with memory, of all or of none: their
    VTensor.map() in one call.

    tensors: VTensors of one device, each at most once
    n:       how many rows: one number, or a list, tuple or array of one for each of them

    Where memory is short, what fits for all together is had; mapped one after the other, the
    first could take what the last needs.
    Raises what map() does, and TypeError or ValueError for such a list; then no tensor has
    changed."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError("map_many takes a list of tensors")
    cdef tuple targets = tuple(tensors)  # the caller's list may change meanwhile
    cdef Py_ssize_t i, n_tensors = len(targets)
    for tensor in targets:
        if not isinstance(tensor, TensorCore):
            raise TypeError(f"map_many takes VTensors, not {type(tensor).__name__}")
    cdef tuple given = (n,) * n_tensors if numpy.ndim(n) == 0 else tuple(n)
    if len(given) != n_tensors:
        raise ValueError(f"{n_tensors} tensors and {len(given)} numbers of rows")
    # One more than there are: never nothing.
    cdef vmm_tensor **handles = <vmm_tensor **>PyMem_Malloc((n_tensors + 1) * sizeof(vmm_tensor *))
    cdef size_t *n_rows = <size_t *>PyMem_Malloc((n_tensors + 1) * sizeof(size_t))
    try:
        if handles == NULL or n_rows == NULL:
            raise MemoryError
        for i in range(n_tensors):
            n_rows[i] = row_count(given[i], "n")
        _map_all(targets, handles, n_rows)
    finally:
        PyMem_Free(handles)
        PyMem_Free(n_rows)


cdef int _map_all(tuple tensors, vmm_tensor **handles, const size_t *n_rows) except -1:
    """`handles` is room for as many."""
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef Py_ssize_t i = 0, n = len(tensors)
    cdef vmm_status status
    while i < n:
        # All at once, or two threads could wait for each other's tensors.
        i = i + 1 if (<TensorCore>tensors[i]).available("map") else 0
    for i in range(n):
        (<TensorCore>tensors[i]).take(me)
        handles[i] = (<TensorCore>tensors[i]).handle
    with nogil:
        status = vmm_map_many(n, handles, n_rows)
    for i in range(n):
        (<TensorCore>tensors[i]).leave()
    check_after_callbacks(status)
    return 0


# ---- the tensor -------------------------------------------------------------------

@cython.final
cdef class VTensor(TensorCore):
    """A tensor that grows in place along one axis; pyvmm.empty() makes one.

    Its address never changes and a row that is in use never moves: views taken earlier stay
    right while it grows. NumPy, torch, CuPy, JAX and Paddle share its memory:
    numpy.asarray(t), torch.from_dlpack(t). What they make covers the rows of that moment, and
    while it lives, those rows cannot be truncated and the tensor not be closed.

    Reading and exporting are safe from any thread; calls that change the tensor wait for each
    other. Works as a context manager.
    """

    def __init__(self):
        raise TypeError("a VTensor is made by pyvmm.empty()")

    # -- what it is

    @property
    def shape(self):
        """The sizes; along the growth axis, the length."""
        self.live("shape")
        return self.shape_of(vmm_length(self.handle))

    @property
    def strides(self):
        """Bytes from one element to the next, for each dimension. They never change."""
        self.live("strides")
        return self.strides_

    @property
    def dtype(self):
        """The element type, a numpy.dtype (of ml_dtypes for bfloat16 and float8)."""
        return self.dtype_

    @property
    def ndim(self):
        """The number of dimensions."""
        return self.target.ndim

    @property
    def axis(self):
        """The growth axis, 0 .. ndim - 1."""
        return self.target.axis

    @property
    def layout(self):
        """How memory is ordered: "seq", "lane" or "c"."""
        return self.layout_

    @property
    def length(self):
        """Rows in use; of a ragged tensor, the largest of lengths."""
        self.live("length")
        return vmm_length(self.handle)

    @property
    def lengths(self):
        """Rows in use in each lane, a tuple: one for each index of dimension 0 in layout "lane",
        and in "c" where the axis is not 0; of any other tensor one. They differ after append()
        or truncate() with lanes. Rows of a lane past its own length hold undefined bytes, also
        where they are shown because another lane is longer."""
        return lengths_of(self)

    @property
    def ragged(self):
        """Whether the lanes differ in length."""
        self.live("ragged")
        return bool(vmm_is_ragged(self.handle))

    @property
    def capacity(self):
        """Rows of address space, as asked for."""
        return self.capacity_

    @property
    def mapped(self):
        """Rows backed by memory: length <= mapped <= capacity."""
        self.live("mapped")
        return vmm_mapped(self.handle)

    @property
    def device(self):
        """The device's name: "host", "cuda:0", "hip:0"."""
        return None if self.pool_ is None else self.pool_.device_name

    @property
    def ptr(self):
        """The address of the first element, an integer. It never changes."""
        self.live("ptr")
        return <size_t>self.base

    @property
    def nbytes(self):
        """Bytes of the rows in use: the length times the bytes of a row."""
        self.live("nbytes")
        return vmm_length(self.handle) * self.row_bytes

    @property
    def pool(self):
        """The Pool that its memory comes from."""
        return self.pool_

    @property
    def block_size(self):
        """Bytes of every block, or "auto"."""
        return self.block_size_

    @property
    def closed(self):
        """Whether it can be used no more."""
        return self.handle == NULL

    def stats(self):
        """What the tensor holds, as a dict.

        reserved_bytes (address space), mapped_bytes (memory in its blocks), used_bytes
        (length times bytes of a row), slack_bytes (mapped less used), block_count,
        driver_calls (made by calls on this tensor, a dict by name).
        Raises VMMError when closed."""
        cdef vmm_tensor_stats stats
        self.wait_for_others("stats")
        check(vmm_stats(self.handle, &stats))
        return {
            "reserved_bytes": stats.reserved_bytes,
            "mapped_bytes": stats.mapped_bytes,
            "used_bytes": stats.used_bytes,
            "slack_bytes": stats.slack_bytes,
            "block_count": stats.block_count,
            "driver_calls": calls_by_name(stats.driver_calls),
        }

    def __repr__(self):
        if self.handle == NULL:
            return f"<pyvmm.VTensor {self.dtype_} on {self.device}, closed>"
        length = f"length {self.length}"
        if vmm_is_ragged(self.handle):
            lengths = self.lengths
            length = (f"lengths {', '.join(map(str, lengths))}" if len(lengths) <= 8 else
                      f"lengths {min(lengths)} to {max(lengths)} in {len(lengths)} lanes")
        return (
            f"<pyvmm.VTensor {self.shape} {self.dtype_} on {self.device}, layout "
            f"{self.layout_!r}, axis {self.axis}: {length}, mapped {self.mapped}, "
            f"capacity {self.capacity_}>"
        )

    # -- growing and shrinking

    def append(self, x, stream=None, *, lanes=None, counts=None):
        """Grow by the rows of x and copy them in. Elements are never converted.

        x:      an array of this tensor's dtype and, but for the growth axis, shape, with any
                number of rows along that; its last dimension dense. Anything with DLPack,
                __cuda_array_interface__ or a buffer, or another VTensor or View: in the memory
                of the tensor's GPU or of the host, for a tensor on the host in host memory.
        stream: where the copy runs on a GPU: an integer, or a stream object of torch, CuPy
                or anything with __cuda_stream__. None is the stream that x's producer names,
                else the legacy default stream. On another stream than the producer's, the copy
                waits for the producer, and x is kept alive until it has been read. It must
                live as long as the tensor.

        lanes:  the lanes to append to, a sequence of integers, each a different index of
                dimension 0: index i of x goes to lane lanes[i], behind what that has. None
                is all of them. See lengths; a tensor with one length has lane 0.
        counts: how many rows of each index of x are taken, from the first on; None is all

        A source in host memory has been read when append returns.
        Raises TypeError (no array, another dtype), ValueError (another shape or device, a last
        dimension that is not dense, lanes that are none or are named twice), CapacityError,
        OutOfMemoryError, VMMError; then the tensor is as before."""
        self.live("append")
        if lanes is None and counts is None:
            append_one(self, x, stream)
        else:
            append_to_lanes(self, x, stream, lanes, counts)

    def grow(self, n):
        """Take the next n rows into use and return the View of them, to be written by a kernel
        or through out=. They hold undefined bytes, or zero for a tensor made with zero=True.

        Within mapped rows it costs nothing.
        Raises ValueError (negative; lanes of different lengths), CapacityError,
        OutOfMemoryError, VMMError; then the tensor is as before."""
        cdef Py_ssize_t n_rows = row_count(n, "n")
        cdef vmm_tensor *handle = self.handle
        cdef Py_ssize_t start
        cdef vmm_status status
        if (
            handle != NULL
            and self.owner_of_all[0] == 0
            and not self.zero
            and not vmm_has_cursor(handle)
            and n_rows <= <Py_ssize_t>(vmm_mapped(handle) - vmm_length(handle))
        ):
            # Neither the driver nor a lock has a part in it: the GIL stays.
            start = vmm_length(handle)
            check(vmm_grow(handle, n_rows, NULL))
            return view_of(self, start, start + n_rows)
        handle = self.enter("grow")
        start = vmm_length(handle)
        with nogil:
            status = vmm_grow(handle, n_rows, NULL)
        self.leave()
        check_after_callbacks(status)
        return view_of(self, start, start + n_rows)

    def advance(self, n=1):
        """Follow a replayed graph that has appended n rows: the length becomes n more.

        A captured append counts nothing. Each replay of the graph appends at t.cursor, as far
        as t.mapped: map(t.length + n) before it, replay, advance(n). No driver call, and no
        wait: the rows are there once the replay has run. Only where a call has failed to set
        t.cursor it waits for the device, to see where replays have begun.
        Raises ValueError (negative, no graph that appends has been captured), CapacityError when
        the replay cannot have appended, since it came to the end of what was mapped (nothing was
        written: map(), and replay again), VMMError (after such a failure); then the tensor is as
        before."""
        advance_one(self, row_count(n, "n"))

    @property
    def cursor(self):
        """The length, or t.lengths, in memory of the tensor's device: an int32 array, made at the
        first use, for kernels to read. See Cursor."""
        self.live("cursor")
        return cursor_of(self)

    def map(self, n):
        """Back the first n rows with memory, as far as they are not yet. The length does not
        change; the rows stay mapped until trim().

        Raises ValueError (negative), CapacityError, OutOfMemoryError, VMMError; then the
        tensor is as before."""
        cdef Py_ssize_t n_rows = row_count(n, "n")
        cdef vmm_status status
        cdef vmm_tensor *handle = self.enter("map")
        with nogil:
            status = vmm_map(handle, n_rows)
        self.leave()
        check_after_callbacks(status)

    def truncate(self, n, stream=None, *, lanes=None):
        """Make the length n, giving up the rows beyond; of a ragged tensor, that of each lane
        that is longer. Memory stays mapped: trim() returns it. Views that end beyond n can be
        exported no more.

        stream: the next append waits for what this stream has been given by then, such as a
                kernel that still reads the rows
        lanes:  make the lengths of these lanes n and leave the others, see append(). n is one
                number or one for each of them, at most what the lane has.

        Raises ValueError (more than the length, negative; lanes that are none or are named
        twice), BufferError while a live export covers a row beyond n, VMMError; then the tensor
        is as before."""
        cdef Py_ssize_t n_rows
        cdef vmm_stream reader = VMM_STREAM_NONE
        cdef vmm_status status
        cdef vmm_tensor *handle
        if lanes is not None:
            truncate_lanes(self, n, stream, lanes)
            return
        n_rows = row_count(n, "n")
        if stream is not None:
            stream_of(stream, &reader)
        handle = self.enter("truncate")
        with nogil:
            status = vmm_truncate(handle, n_rows, reader)
        if status == VMM_OK:
            self.mark_stale(n_rows)
        self.leave()
        check(status)

    def trim(self):
        """Give back every block that holds no row in use. Allowed under live exports, too.
        Raises VMMError when closed; between the replay of a graph that has appended and its
        advance(), and while appends of such a graph are being captured."""
        cdef vmm_status status
        cdef vmm_tensor *handle = self.enter("trim")
        self.n_given_up += 1
        with nogil:
            status = vmm_trim(handle)
        self.leave()
        check(status)

    @property
    def _given_up(self):
        """How often truncate() and trim() have been called: what lies behind the length may be
        anything since."""
        return self.n_given_up

    def fork(self, n=None):
        """A new VTensor with a copy of the first n rows, by default all; both grow on their
        own. It has the same capacity, layout and pool.

        Raises ValueError (more than the length, negative), OutOfMemoryError, VMMError."""
        cdef Py_ssize_t n_rows = 0 if n is None else row_count(n, "n")
        cdef vmm_tensor *copy
        cdef vmm_status status
        cdef VTensor tensor = VTensor.__new__(VTensor)
        cdef vmm_tensor *handle = self.enter("fork")
        if n is None:
            n_rows = vmm_length(handle)
        with nogil:
            status = vmm_fork(handle, n_rows, &copy)
        self.leave()
        if status == VMM_OK:
            tensor.adopt(copy, self.pool_, self.dtype_, self.layout_, self.block_size_, self.zero)
        check_after_callbacks(status)
        return tensor

    def close(self):
        """Give the memory back: on the host at once, on a GPU to the pool's queue.

        Raises BufferError while exports of it live, VMMError while it grows; then it is as
        before. Closing twice is fine."""
        cdef vmm_status status
        cdef vmm_tensor *handle
        if self.handle == NULL:
            return
        if not self.on_host:
            drop_what_was_read()  # which may be a view of this tensor
        handle = self.enter("close")
        # Taken away first: no other thread may use it while it is being closed.
        self.handle = NULL
        with nogil:
            status = vmm_close(handle)
        if status != VMM_OK:
            self.handle = handle
        self.leave()
        check(status)

    def __enter__(self):
        self.live("enter")
        return self

    def __exit__(self, *exception):
        """Close the tensor. Never raises: while exports live, the tensor can be used no more
        and its memory goes with the last of them."""
        cdef vmm_tensor *handle = self.handle
        if handle == NULL:
            return
        if self.owner != 0:
            self.given_up = True  # leave() does the rest
            return
        self.handle = NULL
        with nogil:
            vmm_release(handle)

    # -- views

    def __getitem__(self, key):
        """t[a:b]: the View of rows a to b along the growth axis, wherever that stands."""
        cdef Py_ssize_t start, stop, step
        if not PySlice_Check(key):
            raise TypeError(
                "a VTensor takes one slice along its growth axis, t[a:b]: index what was made "
                "from it, as in numpy.asarray(t)[key] or torch.from_dlpack(t)[key]"
            )
        PySlice_Unpack(key, &start, &stop, &step)
        if step != 1:
            raise ValueError(f"slices of a VTensor have step 1, not {step}: slice what was made "
                             "from it")
        self.live("view")
        PySlice_AdjustIndices(vmm_length(self.handle), &start, &stop, step)
        return view_of(self, start, max(start, stop))

    def view(self, start=0, stop=None):
        """The View of rows start to stop along the growth axis, the same as t[start:stop]."""
        return self[start:stop]

    def reserved(self):
        """The View of the whole capacity, backed by memory or not, for adapters that make one
        framework tensor and slice it. An export of it refuses close() and nothing else.

        Its holder stays within the rows in use: beyond them bytes are undefined, and touching
        rows that are not mapped ends the process on the host (SIGSEGV) and breaks the CUDA
        context on a GPU."""
        self.live("reserved")
        return reserved_view(self)

    def __len__(self):
        raise TypeError("a VTensor has no len(): t.length is the number of rows in use")

    def __bool__(self):
        return True

    def __iter__(self):
        raise TypeError("a VTensor cannot be iterated over: iterate over what was made from it, "
                        "as numpy.asarray(t) or torch.from_dlpack(t)")

    def __reduce__(self):
        raise no_copies("VTensor", "t.fork() copies it; save what was made from it, as "
                        "numpy.asarray(t)")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()

    # -- exports

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of the rows in use, sharing memory.

        stream: of the consumer, made to wait for the last append: an integer (1 the legacy
                default stream, 2 the per-thread one; on ROCm 0, the default stream), -1 for no
                wait, None for the default stream. On the host None.
        max_version: what the consumer understands; below (1, 0) the capsule is a legacy one
        dl_device: None or this tensor's; copy: None or False

        Raises BufferError for what an export does not do, ValueError (a stream that is none),
        VMMError when closed."""
        self.live("export")
        cdef Py_ssize_t length = vmm_length(self.handle)
        return to_dlpack(self, 0, length, length, stream, max_version, dl_device, copy)

    def __dlpack_device__(self):
        """DLPack's (device type, device number): (1, 0) on the host, (2, N) for "cuda:N", (10, N)
        for "hip:N"."""
        self.live("export")
        return dlpack_device(self)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.live("export")
        cdef Py_ssize_t length = vmm_length(self.handle)
        to_buffer(self, 0, length, length, buffer, flags, self.format)
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)

    def __array__(self, dtype=None, copy=None):
        """The rows in use as a numpy.ndarray, sharing memory unless another dtype or a copy is
        asked for. Raises TypeError for memory on a GPU, ValueError where copy=False and a copy
        is needed, VMMError when closed."""
        self.live("export")
        cdef Py_ssize_t length = vmm_length(self.handle)
        return to_numpy(self, 0, length, length, self, dtype, copy)

    @property
    def __cuda_array_interface__(self):
        """Version 3 of the interface, for the rows in use; absent on the host and for bfloat16
        and float8, which it has no name for. It cannot say when its reader is done: once it
        has been read, the rows stay pinned for this tensor's life."""
        cdef vmm_pin *pin
        cdef Py_ssize_t length
        if self.on_host or self.format is None:
            raise AttributeError("__cuda_array_interface__")
        self.live("export")
        length = vmm_length(self.handle)
        if self.interface_pin == NULL or length > self.interface_rows:
            pin = self.pin(length)
            vmm_unpin(self.interface_pin)
            self.interface_pin = pin
            self.interface_rows = length
        return interface_of(self, 0, length)
