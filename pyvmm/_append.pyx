# cython: language_level=3, embedsignature=True
"""Appending: to one tensor, or to many at once."""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport PyObject

from pyvmm._core cimport TensorCore
from pyvmm._dlpack cimport Region, is_same_device
from pyvmm._error cimport check, check_after_callbacks
from pyvmm._lanes cimport Lanes, close_lanes, read_lanes
from pyvmm._libvmm cimport (
    VMM_OK,
    VMM_STREAM_LEGACY,
    vmm_add_reader,
    vmm_append,
    vmm_append_lanes,
    vmm_append_many,
    vmm_array,
    vmm_device,
    vmm_has_cursor,
    vmm_is_ragged,
    vmm_last_stream,
    vmm_length,
    vmm_length_count,
    vmm_mapped,
    vmm_pin,
    vmm_pin_shown,
    vmm_status,
    vmm_stream,
    vmm_stream_wait,
    vmm_tensor,
    vmm_unpin,
)
from pyvmm._pool cimport Pool
from pyvmm._source cimport (
    Source,
    begin_source,
    check_shape,
    close_source,
    describe,
    has_table,
    read_source,
)
from pyvmm._stream cimport drop_what_was_read, keep_last_stream, keep_until_read, stream_of
from pyvmm._view cimport View

# Copies up to this size are made without letting other threads run: they take less time
# than a change of threads.
cdef Py_ssize_t SHORT_COPY_BYTES = 65536


cdef struct _Append:
    PyObject *tensor  # both borrowed from the caller
    PyObject *x
    const Source *seen  # see append_at()
    Source source
    vmm_pin *pin  # on the rows of another tensor, where they are the source


cdef int append_one(TensorCore tensor, object x, object stream) except -1:
    """VTensor.append()."""
    cdef Source source
    if stream is None and not tensor.on_host:
        drop_what_was_read()  # first, for what goes may have a finaliser
        if has_table(x):
            read_source(x, &tensor.target, NULL, &source)
            if source.producer != NULL:
                return _append_in_order(tensor, &source)
            return _append_any(tensor, x, &source, None, -1, NULL)
        if isinstance(x, TensorCore) and _append_rows_in_order(tensor, <TensorCore>x):
            return 0
    return _append_any(tensor, x, NULL, stream, -1, NULL)


# Most appends are of one array that is on the tensor's device already, on the stream that its
# producer works on: there is nothing to wait for, to keep alive or to give back. These two do the
# same as _append_all() in half the time, which counts: it is the host's part of each step.

cdef int _append_in_order(TensorCore tensor, const Source *source) except -1:
    """Append what was read by its type's exchange table."""
    while not tensor.available("append"):
        pass
    tensor.take(PyThread_get_thread_ident())
    return _append_and_leave(tensor, source)


cdef bint _append_rows_in_order(TensorCore tensor, TensorCore x) except -1:
    """Append the rows of another tensor, or return False where that may take longer. Here x is
    not pinned but shut to other threads, as the tensor is. So it must not map, which may call back
    into a program that looks at x, nor look where a graph has moved the cursor to, which waits for
    the device."""
    cdef Source source
    cdef Py_ssize_t n_rows
    cdef unsigned long me
    if (
        x.handle == NULL
        or tensor.handle == NULL
        or vmm_has_cursor(tensor.handle)
        or x.owner_of_all[0] != 0
        or tensor.owner_of_all[0] != 0
        or x.owner_of_all == tensor.owner_of_all
        or x.target.ndim != tensor.target.ndim
        or x.target.axis != tensor.target.axis
        or not is_same_device(x.target.device, tensor.target.device)
    ):
        return False
    n_rows = vmm_length(x.handle)
    if n_rows > <Py_ssize_t>(vmm_mapped(tensor.handle) - vmm_length(tensor.handle)):
        return False
    begin_source(&source)
    source.array.data = x.base
    describe(&source, &tensor.target, x.target.device, x.target.dtype, x.target.ndim,
             x.target.row_shape, x.byte_strides, 1)
    source.shape[x.target.axis] = n_rows
    source.producer = vmm_last_stream(x.handle)
    if source.producer == NULL:
        source.producer = VMM_STREAM_LEGACY
    check(vmm_add_reader(x.handle, source.producer))
    me = PyThread_get_thread_ident()
    x.take(me)
    tensor.take(me)
    try:
        _append_and_leave(tensor, &source)
    finally:
        x.leave()
    return True


cdef int _append_and_leave(TensorCore tensor, const Source *source) except -1:
    cdef vmm_tensor *handle = tensor.handle
    cdef vmm_status status
    with nogil:
        status = vmm_append(handle, &source.array, source.producer)
    tensor.leave()
    if status == VMM_OK and source.shape[tensor.target.axis] > 0:
        keep_last_stream(tensor.handle, source.producer)
    return check_after_callbacks(status)


cdef int append_to_lanes(TensorCore tensor, object x, object stream, object lanes,
                         object counts) except -1:
    """VTensor.append(lanes=, counts=)."""
    cdef Lanes named
    _read_lanes(tensor, lanes, counts, &named)
    try:
        return _append_any(tensor, x, NULL, stream, -1, &named)
    finally:
        close_lanes(&named)


cdef int _read_lanes(TensorCore first, object lanes, object counts, Lanes *out) except -1:
    first.live("append")
    read_lanes(lanes, counts, out)
    if lanes is None and counts is None:
        out.n = vmm_length_count(first.handle)
    return 0


cdef int append_at(TensorCore tensor, object x, const Source *seen, Py_ssize_t n_rows) except -1:
    return _append_any(tensor, x, seen, None, n_rows, NULL)


cdef int _append_any(TensorCore tensor, object x, const Source *seen, object stream,
                     Py_ssize_t n_rows, const Lanes *lanes) except -1:
    cdef _Append append
    cdef vmm_array array
    cdef vmm_tensor *handle
    append.tensor = <PyObject *>tensor
    append.x = <PyObject *>x
    append.seen = seen
    return _append_all(1, &append, &array, &handle, stream, n_rows, lanes)


def append_many(tensors, sources, stream=None, *, lanes=None, counts=None):
    """Append sources[i] to tensors[i], to all or to none of them.

    tensors: VTensors of one device, each at most once
    sources: as many arrays, see VTensor.append()
    stream:  where the copies run, see VTensor.append()
    lanes, counts: see VTensor.append(); the same for all tensors

    On a GPU, sources in its memory are copied by one kernel launch: for up to 160 tensors, or
    lanes of them, where all copies are dense or alike, as with the layers of a model; for up to
    32 otherwise.
    Raises what VTensor.append() does; then no tensor has changed."""
    if not isinstance(tensors, (list, tuple)) or not isinstance(sources, (list, tuple)):
        raise TypeError("append_many takes a list of tensors and a list of sources")
    # Tuples of our own: the caller's lists may change while other threads run.
    cdef tuple targets = tuple(tensors), given = tuple(sources)
    cdef Py_ssize_t i, n = len(targets)
    cdef Lanes named
    cdef bint in_lanes = lanes is not None or counts is not None
    if n != len(given):
        raise ValueError(f"{n} tensors and {len(given)} sources")
    if n == 0:
        return
    _check_tensors(targets)
    # Two are the keys and values of a layer, at each step: for these there is room here.
    cdef _Append two_appends[2]
    cdef vmm_array two_arrays[2]
    cdef vmm_tensor *two_handles[2]
    cdef _Append *appends = two_appends
    cdef vmm_array *arrays = two_arrays
    cdef vmm_tensor **handles = two_handles
    if in_lanes:
        _read_lanes(<TensorCore>targets[0], lanes, counts, &named)
    try:
        if n > 2:
            appends = <_Append *>PyMem_Malloc(n * sizeof(_Append))
            arrays = <vmm_array *>PyMem_Malloc(n * sizeof(vmm_array))
            handles = <vmm_tensor **>PyMem_Malloc(n * sizeof(vmm_tensor *))
            if appends == NULL or arrays == NULL or handles == NULL:
                raise MemoryError
        for i in range(n):
            appends[i].tensor = <PyObject *>targets[i]
            appends[i].x = <PyObject *>given[i]
            appends[i].seen = NULL
        _append_all(n, appends, arrays, handles, stream, -1, &named if in_lanes else NULL)
    finally:
        if in_lanes:
            close_lanes(&named)
        if n > 2:
            PyMem_Free(appends)
            PyMem_Free(arrays)
            PyMem_Free(handles)


cdef int _check_tensors(tuple tensors) except -1:
    """Are these VTensors of one device, each named once?"""
    cdef Py_ssize_t i, n = len(tensors)
    for tensor in tensors:
        if not isinstance(tensor, TensorCore):
            raise TypeError(f"append_many takes VTensors, not {type(tensor).__name__}")
    cdef TensorCore first = <TensorCore>tensors[0]
    for i in range(1, n):
        tensor = tensors[i]
        if (<TensorCore>tensor).pool_ is not first.pool_ and tensor.device != first.device:
            raise ValueError(
                f"tensors of one device are needed, not of {first.device} and {tensor.device}"
            )
    if tensors[0] is tensors[1] if n == 2 else len({id(tensor) for tensor in tensors}) != n:
        raise ValueError("a tensor is named twice")
    return 0


cdef int _append_all(Py_ssize_t n, _Append *appends, vmm_array *arrays, vmm_tensor **handles,
                     object stream, Py_ssize_t n_rows, const Lanes *lanes) except -1:
    """Append to n tensors of one device. `arrays` and `handles` are room for n of each. With
    `n_rows` of 0 or more see append_at()."""
    cdef TensorCore first = <TensorCore>appends[0].tensor
    cdef vmm_stream chosen = NULL
    cdef Py_ssize_t i, n_read = 0
    cdef bint foreign = False
    if stream is not None:
        stream_of(stream, &chosen)
    if not first.on_host:
        drop_what_was_read()
    try:
        for i in range(n):
            _read(<TensorCore>appends[i].tensor, <object>appends[i].x, chosen, &appends[i])
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
            _wait_for_producers(n, appends, chosen, lanes == NULL)
        for i in range(n):
            if appends[i].pin != NULL:
                _owner(&appends[i]).add_reader(chosen)
        if _copy(n, appends, arrays, handles, chosen, n_rows, lanes):
            return 1
        if not first.on_host:
            _after_copy(n, appends, chosen, stream is None)
        check_after_callbacks(VMM_OK)
    finally:
        for i in range(n_read):
            _close(&appends[i])
    return 0


cdef int _read(TensorCore target, object x, vmm_stream stream, _Append *out) except -1:
    """Describe x. Where it fails, nothing is held."""
    cdef View view
    out.pin = NULL
    if out.seen != NULL:
        out.source = out.seen[0]
        out.source.array.shape = out.source.shape
        if out.source.array.strides != NULL:
            out.source.array.strides = out.source.strides
        return 0
    if isinstance(x, TensorCore):
        (<TensorCore>x).live("append")
        return _read_rows(target, <TensorCore>x, 0, vmm_length((<TensorCore>x).handle), out)
    if isinstance(x, View):
        view = <View>x
        return _read_rows(target, view.live("append"), view.start_, view.link.stop, out)
    return read_source(x, &target.target, stream, &out.source)


cdef int _read_rows(TensorCore target, TensorCore tensor, Py_ssize_t start, Py_ssize_t stop,
                    _Append *out) except -1:
    """Describe rows of a tensor, which may be the target."""
    cdef Source *source = &out.source
    cdef Region region
    tensor.region_of(start, stop, &region)
    begin_source(source)
    source.array.data = region.data
    describe(source, &target.target, region.device, region.dtype, region.ndim, region.shape,
             region.strides, 1)
    if not tensor.on_host:
        source.producer = vmm_last_stream(tensor.handle)
        if source.producer == NULL:
            source.producer = VMM_STREAM_LEGACY
    out.pin = tensor.pin(stop)
    return 0


cdef void _close(_Append *append) noexcept:
    close_source(&append.source)
    if append.pin != NULL:
        # The GIL stays: to give it up twice costs a tenth of an append.
        vmm_unpin(append.pin)
        append.pin = NULL


cdef TensorCore _owner(const _Append *append):
    """The tensor whose rows are the source."""
    x = <object>append.x
    return <TensorCore>x if isinstance(x, TensorCore) else (<View>x).base_


cdef bint _is_foreign(const Source *source, vmm_stream stream) noexcept:
    """Does the producer work on another stream?"""
    return source.producer != NULL and source.producer != stream


cdef int _wait_for_producers(Py_ssize_t n, _Append *appends, vmm_stream stream,
                             bint are_whole) except -1:
    """Order what the producers' streams have been given before the copy on `stream`."""
    cdef Pool pool = (<TensorCore>appends[0].tensor).pool_
    cdef vmm_device *device = pool.opened
    cdef vmm_stream producer
    cdef vmm_status status
    cdef Py_ssize_t i
    for i in range(n if are_whole else 0):
        check_shape(&appends[i].source, &(<TensorCore>appends[i].tensor).target)
    for i in range(n):
        producer = appends[i].source.producer
        if not _is_foreign(&appends[i].source, stream):
            continue
        if appends[i].pin != NULL:
            _owner(&appends[i]).handoff(stream)
            continue
        with nogil:
            status = vmm_stream_wait(device, stream, producer)
        check(status)
    return 0


cdef int _copy(Py_ssize_t n, _Append *appends, vmm_array *arrays, vmm_tensor **handles,
               vmm_stream stream, Py_ssize_t n_rows, const Lanes *lanes) except -1:
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef TensorCore tensor
    cdef vmm_status status
    cdef Py_ssize_t i = 0, n_bytes = 0
    while i < n:
        # All at once, or two threads could wait for each other's tensors.
        i = i + 1 if (<TensorCore>appends[i].tensor).available("append") else 0
    tensor = <TensorCore>appends[0].tensor
    if n_rows >= 0 and (
        <Py_ssize_t>vmm_length(tensor.handle) != n_rows or vmm_is_ragged(tensor.handle)
    ):
        return 1
    for i in range(n):
        tensor = <TensorCore>appends[i].tensor
        tensor.take(me)
        handles[i] = tensor.handle
        n_bytes += _bytes_if_short(tensor, &appends[i].source)
    if lanes != NULL:
        with nogil:
            status = vmm_append_lanes(n, handles, arrays, lanes.n, lanes.lanes, lanes.counts,
                                      stream)
    elif n_bytes <= SHORT_COPY_BYTES:
        # Neither the driver nor a lock of the pool has a part in it.
        status = vmm_append_many(n, handles, arrays, stream)
    else:
        with nogil:
            if n == 1:
                status = vmm_append(handles[0], arrays, stream)
            else:
                status = vmm_append_many(n, handles, arrays, stream)
    if n_rows >= 0 and status == VMM_OK:
        vmm_pin_shown(handles[0])
    for i in range(n):
        (<TensorCore>appends[i].tensor).leave()
    if status != VMM_OK:
        check_after_callbacks(status)
    return 0


cdef Py_ssize_t _bytes_if_short(TensorCore tensor, const Source *source) noexcept:
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


cdef int _after_copy(Py_ssize_t n, _Append *appends, vmm_stream stream,
                     bint is_producers) except -1:
    cdef Source *source
    cdef Py_ssize_t i
    kept = None
    for i in range(n):
        source = &appends[i].source
        if source.shape[(<TensorCore>appends[i].tensor).target.axis] == 0:
            continue
        if is_producers:
            keep_last_stream((<TensorCore>appends[i].tensor).handle, stream)
        # The producer takes memory that is dropped for work after ours on its own stream.
        # On another it must not be dropped before the copy has been made.
        if source.outlives or (_is_foreign(source, stream) and appends[i].pin == NULL):
            kept = [] if kept is None else kept
            kept.append(<object>appends[i].x)
            if source.capsule != NULL:
                kept.append(<object>source.capsule)
    if kept is not None:
        keep_until_read((<TensorCore>appends[0].tensor).pool_, stream, kept)
    return 0
