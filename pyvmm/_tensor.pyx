# cython: language_level=3, embedsignature=True
"""Tensors that grow in place, and views of them."""

from operator import index

import numpy

cimport cython
from cpython.buffer cimport Py_buffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport PyObject
from cpython.slice cimport PySlice_AdjustIndices, PySlice_Check, PySlice_Unpack
from libc.stdint cimport int64_t
from libc.string cimport memcpy
from posix.unistd cimport getpid, usleep

from pyvmm._buffer cimport fill_buffer, release_buffer
from pyvmm._device cimport canonical_name
from pyvmm._dlpack cimport DL_CPU, Region, make_capsule
from pyvmm._error cimport check, raise_status
from pyvmm._libvmm cimport (
    VMM_ERR_BUSY,
    VMM_ERR_CAPACITY,
    VMM_ERR_CLOSED,
    VMM_ERR_FORKED,
    VMM_LAYOUT_C,
    VMM_LAYOUT_LANE,
    VMM_LAYOUT_SEQ,
    VMM_MAX_NDIM,
    VMM_OK,
    VMM_STREAM_LEGACY,
    VMM_STREAM_NONE,
    vmm_append,
    vmm_append_many,
    vmm_array,
    vmm_axis,
    vmm_base,
    vmm_capacity,
    vmm_close,
    vmm_device,
    vmm_dtype,
    vmm_fork,
    vmm_grow,
    vmm_handoff,
    vmm_layout,
    vmm_length,
    vmm_map,
    vmm_mapped,
    vmm_ndim,
    vmm_pin,
    vmm_pin_rows,
    vmm_pool,
    vmm_release,
    vmm_reserve,
    vmm_row_bytes,
    vmm_row_shape,
    vmm_spec,
    vmm_stats,
    vmm_status,
    vmm_stream,
    vmm_stream_wait,
    vmm_strides,
    vmm_tensor,
    vmm_tensor_stats,
    vmm_trim,
    vmm_truncate,
    vmm_unpin,
)
from pyvmm._pool cimport Pool, block_bytes_of, calls_by_name, default_pool_of
from pyvmm._source cimport Source, check_shape, close_source, describe, read_source
from pyvmm._stream cimport drop_what_was_read, keep_until_read, stream_of

from pyvmm._dtypes import element_of, format_of
from pyvmm._sizes import count

cdef dict _LAYOUTS = {
    "seq": <int>VMM_LAYOUT_SEQ,
    "lane": <int>VMM_LAYOUT_LANE,
    "c": <int>VMM_LAYOUT_C,
}
# Copies up to this size are made without letting other threads run: they take less time
# than a change of threads.
cdef Py_ssize_t SHORT_COPY_BYTES = 65536


cdef Py_ssize_t _rows(object n, str name) except -1:
    """A number of rows, 0 or more."""
    cdef int overflow = 0
    cdef long value
    if PyLong_CheckExact(n):
        value = PyLong_AsLongAndOverflow(n, &overflow)
        if value >= 0 and not overflow:
            return value
    return count(n, name)


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
    device:     "host" (or "cpu"), "cuda:0"; the pool's where a pool is given, else "host"
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
    cdef vmm_tensor *handle
    cdef vmm_pool *pool_handle
    cdef vmm_status status
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

    cdef VTensor tensor = VTensor.__new__(VTensor)
    pool_handle = memory.enter("empty")
    with nogil:
        status = vmm_reserve(pool_handle, &spec, &handle)
    memory.leave()
    check(status)
    tensor.adopt(handle, memory, element.dtype, layout, block_size, spec.zero)
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


# ---- appending --------------------------------------------------------------------

def append_many(tensors, sources, stream=None):
    """Append sources[i] to tensors[i], to all or to none of them.

    tensors: VTensors of one device, each at most once
    sources: as many arrays, see VTensor.append()
    stream:  where the copies run, see VTensor.append()

    On a GPU, sources in its memory are copied by one kernel launch for up to 32 tensors.
    Raises what VTensor.append() does; then no tensor has changed."""
    if not isinstance(tensors, (list, tuple)) or not isinstance(sources, (list, tuple)):
        raise TypeError("append_many takes a list of tensors and a list of sources")
    if len(tensors) != len(sources):
        raise ValueError(f"{len(tensors)} tensors and {len(sources)} sources")
    for tensor in tensors:
        if not isinstance(tensor, VTensor):
            raise TypeError(f"append_many takes VTensors, not {type(tensor).__name__}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"tensors of one device are needed, not of {tensors[0].device} and {tensor.device}"
            )
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ValueError("a tensor is named twice")
    if not tensors:
        return
    cdef Py_ssize_t i, n = len(tensors)
    cdef _Append *appends = <_Append *>PyMem_Malloc(n * sizeof(_Append))
    cdef vmm_array *arrays = <vmm_array *>PyMem_Malloc(n * sizeof(vmm_array))
    cdef vmm_tensor **handles = <vmm_tensor **>PyMem_Malloc(n * sizeof(vmm_tensor *))
    # Lists of our own: the caller's may change while other threads run.
    tensors, sources = list(tensors), list(sources)
    try:
        if appends == NULL or arrays == NULL or handles == NULL:
            raise MemoryError
        for i in range(n):
            appends[i].tensor = <PyObject *>tensors[i]
            appends[i].x = <PyObject *>sources[i]
        _append_all(n, appends, arrays, handles, stream)
    finally:
        PyMem_Free(appends)
        PyMem_Free(arrays)
        PyMem_Free(handles)


cdef struct _Append:
    PyObject *tensor  # both borrowed from the caller
    PyObject *x
    Source source
    vmm_pin *pin  # on the rows of another VTensor, where they are the source


cdef int _append_all(Py_ssize_t n, _Append *appends, vmm_array *arrays, vmm_tensor **handles,
                     object stream) except -1:
    """Append to n tensors of one device. `arrays` and `handles` are room for n of each."""
    cdef VTensor first = <VTensor>appends[0].tensor
    cdef vmm_stream chosen = NULL
    cdef Py_ssize_t i, n_read = 0
    cdef bint foreign = False
    if stream is not None:
        stream_of(stream, &chosen)
    if not first.on_host:
        drop_what_was_read()
    try:
        for i in range(n):
            _read(<VTensor>appends[i].tensor, <object>appends[i].x, chosen, &appends[i])
            n_read += 1
            # Where the caller names no stream, the first producer does.
            if chosen == NULL:
                chosen = appends[i].source.producer
                if chosen == NULL and appends[i].source.outlives:
                    chosen = VMM_STREAM_LEGACY
            arrays[i] = appends[i].source.array
        if chosen == NULL:
            chosen = VMM_STREAM_LEGACY
        for i in range(n):
            if _is_foreign(&appends[i].source, chosen):
                foreign = True
        if foreign:
            _wait_for_producers(n, appends, chosen)
        _copy(n, appends, arrays, handles, chosen)
        if not first.on_host:
            _after_copy(n, appends, chosen)
    finally:
        for i in range(n_read):
            _close(&appends[i])
    return 0


cdef int _read(VTensor target, object x, vmm_stream stream, _Append *out) except -1:
    """Describe x. Where it fails, nothing is held."""
    cdef View view
    out.pin = NULL
    if isinstance(x, VTensor):
        (<VTensor>x).live("append")
        return (<VTensor>x).read(target, 0, vmm_length((<VTensor>x).handle), &out.source, &out.pin)
    if isinstance(x, View):
        view = <View>x
        return view.live("append").read(target, view.start_, view.link.stop, &out.source,
                                        &out.pin)
    return read_source(x, &target.target, stream, &out.source)


cdef void _close(_Append *append) noexcept:
    close_source(&append.source)
    if append.pin != NULL:
        with nogil:
            vmm_unpin(append.pin)
        append.pin = NULL


cdef bint _is_foreign(const Source *source, vmm_stream stream) noexcept:
    """Does the producer work on another stream?"""
    return source.producer != NULL and source.producer != stream


cdef int _wait_for_producers(Py_ssize_t n, _Append *appends, vmm_stream stream) except -1:
    """Order what the producers' streams have been given before the copy on `stream`."""
    cdef Pool pool = (<VTensor>appends[0].tensor).pool_
    cdef vmm_device *device = pool.opened
    cdef VTensor owner
    cdef vmm_stream producer
    cdef vmm_status status
    cdef Py_ssize_t i
    for i in range(n):
        check_shape(&appends[i].source, &(<VTensor>appends[i].tensor).target)
    for i in range(n):
        producer = appends[i].source.producer
        if not _is_foreign(&appends[i].source, stream):
            continue
        if appends[i].pin != NULL:
            x = <object>appends[i].x
            owner = <VTensor>x if isinstance(x, VTensor) else (<View>x).base_
            owner.handoff(stream)
            continue
        with nogil:
            status = vmm_stream_wait(device, stream, producer)
        check(status)
    return 0


cdef int _copy(Py_ssize_t n, _Append *appends, vmm_array *arrays, vmm_tensor **handles,
               vmm_stream stream) except -1:
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef VTensor tensor
    cdef vmm_status status
    cdef Py_ssize_t i = 0, n_bytes = 0
    while i < n:
        # All at once, or two threads could wait for each other's tensors.
        i = i + 1 if (<VTensor>appends[i].tensor).available("append") else 0
    for i in range(n):
        tensor = <VTensor>appends[i].tensor
        tensor.owner = me
        handles[i] = tensor.handle
        n_bytes += _bytes_if_short(tensor, &appends[i].source)
    if n_bytes <= SHORT_COPY_BYTES:
        # Neither the driver nor a lock of the pool has a part in it.
        status = vmm_append_many(n, handles, arrays, stream)
    else:
        with nogil:
            if n == 1:
                status = vmm_append(handles[0], arrays, stream)
            else:
                status = vmm_append_many(n, handles, arrays, stream)
    for i in range(n):
        (<VTensor>appends[i].tensor).leave()
    check(status)
    return 0


cdef Py_ssize_t _bytes_if_short(VTensor tensor, const Source *source) noexcept:
    """The bytes of a copy on the host into mapped rows, more than SHORT_COPY_BYTES for any
    other append."""
    cdef Py_ssize_t n_rows
    if tensor.on_host and source.array.ndim == tensor.target.ndim:
        n_rows = source.shape[tensor.target.axis]
        if (
            n_rows <= SHORT_COPY_BYTES
            and n_rows <= <Py_ssize_t>(vmm_mapped(tensor.handle) - vmm_length(tensor.handle))
        ):
            return min(n_rows * tensor.row_bytes, SHORT_COPY_BYTES + 1)
    return SHORT_COPY_BYTES + 1


cdef int _after_copy(Py_ssize_t n, _Append *appends, vmm_stream stream) except -1:
    cdef Source *source
    cdef Py_ssize_t i
    kept = None
    for i in range(n):
        source = &appends[i].source
        if source.shape[(<VTensor>appends[i].tensor).target.axis] == 0:
            continue
        (<VTensor>appends[i].tensor).last_stream = stream
        # The producer takes memory that is dropped for work after ours on its own stream.
        # On another it must not be dropped before the copy has been made.
        if source.outlives or (_is_foreign(source, stream) and appends[i].pin == NULL):
            kept = [] if kept is None else kept
            kept.append(<object>appends[i].x)
            if source.capsule != NULL:
                kept.append(<object>source.capsule)
    if kept is not None:
        keep_until_read((<VTensor>appends[0].tensor).pool_, stream, kept)
    return 0


# ---- exports ----------------------------------------------------------------------
#
# Of rows [start, stop) of a tensor, with a pin on its first `n_pinned` rows.

cdef object _to_dlpack(VTensor tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                       object stream, object max_version, object dl_device, object copy):
    cdef vmm_stream consumer = VMM_STREAM_NONE
    cdef Region region
    cdef vmm_pin *pin
    if dl_device is not None and tuple(dl_device) != _dlpack_device(tensor):
        raise BufferError(f"this memory is on {tensor.pool_.device_name} and is exported there "
                          "only: import it, then copy it to the other device")
    if copy:
        raise BufferError("an export shares memory: copy what was made from it instead")
    if tensor.on_host:
        if stream is not None and stream != -1:
            raise ValueError(f"stream must be None for memory on the host, not {stream!r}")
    elif stream is None:
        consumer = VMM_STREAM_LEGACY
    elif stream == 0:
        raise ValueError("stream 0 is ambiguous: 1 is the legacy default stream, 2 the "
                         "per-thread one, -1 asks for no synchronization")
    elif stream != -1:
        stream_of(stream, &consumer)
    versioned = max_version is not None and max_version[0] >= 1

    tensor.region_of(start, stop, &region)
    pin = tensor.pin(n_pinned)
    try:
        tensor.handoff(consumer)
    except BaseException:
        vmm_unpin(pin)
        raise
    return make_capsule(&region, pin, versioned)


cdef tuple _dlpack_device(VTensor tensor):
    return (tensor.target.device.device_type, tensor.target.device.device_id)


cdef int _to_buffer(VTensor tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                    Py_buffer *buffer, int flags, bytes format) except -1:
    cdef Region region
    if not tensor.on_host:
        raise BufferError(f"this memory is on {tensor.pool_.device_name}, out of the buffer "
                          f"protocol's reach: {_DLPACK_ADVICE}")
    if format is None:
        raise BufferError(f"the buffer protocol has no {tensor.dtype_}: use numpy.asarray(), "
                          f"__array__() or {_DLPACK_ADVICE}")
    tensor.region_of(start, stop, &region)
    return fill_buffer(buffer, flags, &region, tensor.pin(n_pinned), format)


cdef str _DLPACK_ADVICE = "import it by DLPack, as torch.from_dlpack() or cupy.from_dlpack() do"


@cython.final
cdef class _Bits:
    """The buffer of a VTensor or View whose elements have no format, as unsigned integers."""
    cdef object exporter

    def __cinit__(self, exporter):
        self.exporter = exporter

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef View view
        cdef VTensor tensor
        if isinstance(self.exporter, View):
            view = <View>self.exporter
            tensor = view.live("export")
            _to_buffer(tensor, view.start_, view.link.stop, view.pinned(), buffer, flags,
                       b"B" if tensor.itemsize == 1 else b"H")
        else:
            tensor = <VTensor>self.exporter
            tensor.live("export")
            _to_buffer(tensor, 0, vmm_length(tensor.handle), vmm_length(tensor.handle), buffer,
                       flags, b"B" if tensor.itemsize == 1 else b"H")
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)


cdef object _to_numpy(object exporter, VTensor tensor, object dtype, object copy):
    """What __array__(dtype, copy) returns."""
    if not tensor.on_host:
        raise TypeError(f"this memory is on {tensor.pool_.device_name}, out of NumPy's reach: "
                        f"{_DLPACK_ADVICE}, and copy that to the host")
    if tensor.format is None:
        array = numpy.asarray(_Bits(exporter)).view(tensor.dtype_)
    else:
        array = numpy.asarray(memoryview(exporter))
    if dtype is None or numpy.dtype(dtype) == tensor.dtype_:
        return array.copy() if copy else array
    if copy is not None and not copy:
        raise ValueError(f"{tensor.dtype_} cannot be seen as {numpy.dtype(dtype)} without a copy")
    return array.astype(dtype)


cdef dict _interface(VTensor tensor, Py_ssize_t start, Py_ssize_t stop):
    """What __cuda_array_interface__ returns."""
    cdef Region region
    cdef vmm_stream stream = VMM_STREAM_LEGACY
    if tensor.last_stream != NULL:
        stream = tensor.last_stream
    tensor.region_of(start, stop, &region)
    shape = tuple([region.shape[i] for i in range(region.ndim)])
    return {
        "shape": shape,
        "typestr": tensor.dtype_.str,
        "data": (0 if 0 in shape else <size_t>region.data, False),
        # CuPy takes strides over no elements for memory that it then asks the driver about.
        "strides": None if 0 in shape else tensor.strides_,
        "version": 3,
        # The reader makes its own stream wait for this one.
        "stream": <size_t>stream,
    }


cdef object _no_copies(str what, str instead):
    return TypeError(f"a {what} cannot be pickled or copied: {instead}")


# ---- the tensor -------------------------------------------------------------------

@cython.final
cdef class VTensor:
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

    cdef void adopt(self, vmm_tensor *handle, Pool pool, object dtype, str layout,
                    object block_size, bint zero):
        """Become the owner of a new tensor of the library's."""
        element = element_of(dtype)
        format = format_of(element)
        self.pool_ = pool
        self.dtype_ = dtype
        self.layout_ = layout
        self.block_size_ = block_size
        self.target.device = pool.location
        self.target.dtype = vmm_dtype(element.code, element.bits, 1)
        self.target.ndim = vmm_ndim(handle)
        self.target.axis = vmm_axis(handle)
        self.target.row_shape = vmm_row_shape(handle)
        self.byte_strides = vmm_strides(handle)
        self.strides_ = tuple([self.byte_strides[i] for i in range(self.target.ndim)])
        self.base = <char *>vmm_base(handle)
        self.capacity_ = vmm_capacity(handle)
        self.itemsize = element.bits // 8
        self.row_bytes = vmm_row_bytes(handle)
        self.on_host = pool.location.device_type == DL_CPU
        self.zero = zero
        self.format = None if format is None else format.encode()
        self.process = getpid()
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
        if self.owner == 0:
            return True
        if self.owner == PyThread_get_thread_ident():
            raise_status(VMM_ERR_BUSY, operation, f"{operation}: the tensor is growing; an "
                         "out-of-memory callback must leave it alone")
        if self.process != getpid():
            raise_status(VMM_ERR_FORKED, operation,
                         f"{operation}: the tensor belongs to the parent process")
        with nogil:
            usleep(20)
        PyErr_CheckSignals()
        return False

    cdef vmm_tensor *enter(self, str operation) except NULL:
        """Shut other threads out, wait for one that is inside; then leave()."""
        while not self.available(operation):
            pass
        self.owner = PyThread_get_thread_ident()
        return self.handle

    cdef void leave(self) noexcept:
        cdef vmm_tensor *handle
        self.owner = 0
        if self.given_up:
            self.given_up = False
            handle = self.handle
            self.handle = NULL
            with nogil:
                vmm_release(handle)

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
        """Rows in use."""
        self.live("length")
        return vmm_length(self.handle)

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
        """The device's name, "host" or "cuda:0"."""
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
        self.live("stats")
        if self.owner != PyThread_get_thread_ident():
            while not self.available("stats"):
                pass
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
        return (
            f"<pyvmm.VTensor {self.shape} {self.dtype_} on {self.device}, layout "
            f"{self.layout_!r}, axis {self.axis}: length {self.length}, mapped {self.mapped}, "
            f"capacity {self.capacity_}>"
        )

    cdef tuple shape_of(self, Py_ssize_t n_rows):
        sizes = [self.target.row_shape[i] for i in range(self.target.ndim)]
        sizes[self.target.axis] = n_rows
        return tuple(sizes)

    # -- growing and shrinking

    def append(self, x, stream=None):
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

        A source in host memory has been read when append returns.
        Raises TypeError (no array, another dtype), ValueError (another shape or device, a last
        dimension that is not dense), CapacityError, OutOfMemoryError, VMMError; then the
        tensor is as before."""
        cdef _Append append
        cdef vmm_array array
        cdef vmm_tensor *handle
        self.live("append")
        append.tensor = <PyObject *>self
        append.x = <PyObject *>x
        _append_all(1, &append, &array, &handle, stream)

    def grow(self, n):
        """Take the next n rows into use and return the View of them, to be written by a kernel
        or through out=. They hold undefined bytes, or zero for a tensor made with zero=True.

        Within mapped rows it costs nothing.
        Raises ValueError (negative), CapacityError, OutOfMemoryError, VMMError; then the
        tensor is as before."""
        cdef Py_ssize_t n_rows = _rows(n, "n")
        cdef vmm_tensor *handle = self.handle
        cdef Py_ssize_t start
        cdef vmm_status status
        if (
            handle != NULL
            and self.owner == 0
            and not self.zero
            and n_rows <= <Py_ssize_t>(vmm_mapped(handle) - vmm_length(handle))
        ):
            # Neither the driver nor a lock has a part in it: the GIL stays.
            start = vmm_length(handle)
            check(vmm_grow(handle, n_rows, NULL))
            return self.view_of(start, start + n_rows)
        handle = self.enter("grow")
        start = vmm_length(handle)
        with nogil:
            status = vmm_grow(handle, n_rows, NULL)
        self.leave()
        check(status)
        return self.view_of(start, start + n_rows)

    def map(self, n):
        """Back the first n rows with memory, as far as they are not yet. The length does not
        change; the rows stay mapped until trim().

        Raises ValueError (negative), CapacityError, OutOfMemoryError, VMMError; then the
        tensor is as before."""
        cdef Py_ssize_t n_rows = _rows(n, "n")
        cdef vmm_status status
        cdef vmm_tensor *handle = self.enter("map")
        with nogil:
            status = vmm_map(handle, n_rows)
        self.leave()
        check(status)

    def truncate(self, n, stream=None):
        """Make the length n, giving up the rows beyond. Memory stays mapped: trim() returns it.
        Views that end beyond n can be exported no more.

        stream: the next append waits for what this stream has been given by then, such as a
                kernel that still reads the rows

        Raises ValueError (more than the length, negative), BufferError while a live export
        covers a row beyond n, VMMError; then the tensor is as before."""
        cdef Py_ssize_t n_rows = _rows(n, "n")
        cdef vmm_stream reader = VMM_STREAM_NONE
        cdef vmm_status status
        cdef vmm_tensor *handle
        cdef Link *link
        if stream is not None:
            stream_of(stream, &reader)
        handle = self.enter("truncate")
        with nogil:
            status = vmm_truncate(handle, n_rows, reader)
        if status == VMM_OK:
            link = self.views
            while link != NULL:
                link.stale = link.stale or link.stop > n_rows
                link = link.next
        self.leave()
        check(status)

    def trim(self):
        """Give back every block that holds no row in use. Always allowed, also under live
        exports. Raises VMMError when closed."""
        cdef vmm_status status
        cdef vmm_tensor *handle = self.enter("trim")
        with nogil:
            status = vmm_trim(handle)
        self.leave()
        check(status)

    def fork(self, n=None):
        """A new VTensor with a copy of the first n rows, by default all; both grow on their
        own. It has the same capacity, layout and pool.

        Raises ValueError (more than the length, negative), OutOfMemoryError, VMMError."""
        cdef Py_ssize_t n_rows = 0 if n is None else _rows(n, "n")
        cdef vmm_tensor *copy
        cdef vmm_status status
        cdef VTensor tensor = VTensor.__new__(VTensor)
        cdef vmm_tensor *handle = self.enter("fork")
        if n is None:
            n_rows = vmm_length(handle)
        with nogil:
            status = vmm_fork(handle, n_rows, &copy)
        self.leave()
        check(status)
        tensor.adopt(copy, self.pool_, self.dtype_, self.layout_, self.block_size_, self.zero)
        tensor.last_stream = self.last_stream
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

    cdef View view_of(self, Py_ssize_t start, Py_ssize_t stop):
        cdef View view = View.__new__(View)
        view.base_ = self
        view.start_ = start
        view.link.stop = stop
        view.link.next = self.views
        view.link.previous = &self.views
        if self.views != NULL:
            self.views.previous = &view.link.next
        self.views = &view.link
        return view

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
        return self.view_of(start, max(start, stop))

    def view(self, start=0, stop=None):
        """The View of rows start to stop along the growth axis, the same as t[start:stop]."""
        return self[start:stop]

    def reserved(self):
        """The View of the whole capacity, backed by memory or not, for adapters that make one
        framework tensor and slice it. An export of it refuses close() and nothing else.

        Its holder stays within the rows in use: beyond them bytes are undefined, and touching
        rows that are not mapped ends the process on the host (SIGSEGV) and breaks the CUDA
        context on a GPU."""
        cdef View view = View.__new__(View)
        self.live("reserved")
        view.base_ = self
        view.link.stop = self.capacity_
        view.whole = True
        return view

    def __len__(self):
        raise TypeError("a VTensor has no len(): t.length is the number of rows in use")

    def __bool__(self):
        return True

    def __iter__(self):
        raise TypeError("a VTensor cannot be iterated over: iterate over what was made from it, "
                        "as numpy.asarray(t) or torch.from_dlpack(t)")

    def __reduce__(self):
        raise _no_copies("VTensor", "t.fork() copies it; save what was made from it, as "
                         "numpy.asarray(t)")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()

    # -- exports

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

    cdef int read(self, VTensor target, Py_ssize_t start, Py_ssize_t stop, Source *out,
                  vmm_pin **pin) except -1:
        """Be the source of an append to another tensor, or to this one."""
        cdef Region region
        self.region_of(start, stop, &region)
        out.producer = NULL
        out.outlives = False
        out.capsule = NULL
        out.has_buffer = False
        out.array.data = region.data
        describe(out, &target.target, region.device, region.dtype, region.ndim, region.shape,
                 region.strides, 1)
        if not self.on_host:
            out.producer = VMM_STREAM_LEGACY
            if self.last_stream != NULL:
                out.producer = self.last_stream
        pin[0] = self.pin(stop)
        return 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of the rows in use, sharing memory.

        stream: of the consumer, made to wait for the last append: an integer (1 the legacy
                default stream, 2 the per-thread one), -1 for no wait, None for the legacy
                default stream. On the host None.
        max_version: what the consumer understands; below (1, 0) the capsule is a legacy one
        dl_device: None or this tensor's; copy: None or False

        Raises BufferError for what an export does not do, ValueError (a stream that is none),
        VMMError when closed."""
        self.live("export")
        cdef Py_ssize_t length = vmm_length(self.handle)
        return _to_dlpack(self, 0, length, length, stream, max_version, dl_device, copy)

    def __dlpack_device__(self):
        """DLPack's (device type, device number): (1, 0) on the host, (2, N) for "cuda:N"."""
        self.live("export")
        return _dlpack_device(self)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.live("export")
        cdef Py_ssize_t length = vmm_length(self.handle)
        _to_buffer(self, 0, length, length, buffer, flags, self.format)
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)

    def __array__(self, dtype=None, copy=None):
        """The rows in use as a numpy.ndarray, sharing memory unless another dtype or a copy is
        asked for. Raises TypeError for memory on a GPU, ValueError where copy=False and a copy
        is needed, VMMError when closed."""
        self.live("export")
        return _to_numpy(self, self, dtype, copy)

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
        return _interface(self, 0, length)


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

    cdef VTensor live(self, str operation):
        """The tensor, if these rows can still be used."""
        if self.base_ is None:
            raise TypeError("a View is made by t[a:b] or t.grow(n)")
        self.base_.live(operation)
        if self.link.stale:
            raise BufferError(f"rows of this view, [{self.start_}, {self.link.stop}), were "
                              "truncated away: take a new view")
        return self.base_

    cdef VTensor made(self):
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
        cdef VTensor tensor = self.made()
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
        """The device's name, "host" or "cuda:0"."""
        return self.made().device

    @property
    def ptr(self):
        """The address of the first element, an integer."""
        cdef VTensor tensor = self.made()
        tensor.live("ptr")
        return <size_t>(tensor.base + self.start_ * tensor.byte_strides[tensor.target.axis])

    @property
    def nbytes(self):
        """Bytes of these rows."""
        return (self.link.stop - self.start_) * self.made().row_bytes

    def __repr__(self):
        cdef VTensor tensor = self.base_
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
                f"{tensor.device}{state}>")

    def __reduce__(self):
        raise _no_copies("View", "copy what was made from it, as numpy.asarray(v)")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of these rows, see VTensor.__dlpack__(). Raises BufferError, too,
        once rows of the view have been truncated away."""
        cdef VTensor tensor = self.live("export")
        return _to_dlpack(tensor, self.start_, self.link.stop, self.pinned(), stream, max_version,
                          dl_device, copy)

    def __dlpack_device__(self):
        """DLPack's (device type, device number): (1, 0) on the host, (2, N) for "cuda:N"."""
        cdef VTensor tensor = self.made()
        tensor.live("export")
        return _dlpack_device(tensor)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef VTensor tensor = self.live("export")
        _to_buffer(tensor, self.start_, self.link.stop, self.pinned(), buffer, flags,
                   tensor.format)
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)

    def __array__(self, dtype=None, copy=None):
        """These rows as a numpy.ndarray, see VTensor.__array__()."""
        return _to_numpy(self, self.live("export"), dtype, copy)

    @property
    def __cuda_array_interface__(self):
        """Version 3 of the interface, see VTensor. Once it has been read, the rows stay pinned
        until this view is collected."""
        cdef VTensor tensor = self.made()
        if tensor.on_host or tensor.format is None:
            raise AttributeError("__cuda_array_interface__")
        self.live("export")
        if self.interface_pin == NULL:
            self.interface_pin = tensor.pin(self.pinned())
        return _interface(tensor, self.start_, self.link.stop)
