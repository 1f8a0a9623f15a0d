# cython: language_level=3, embedsignature=True
"""concat(): equal to a framework's own concatenate, and an append where it can be.

What a cache is, is found out from its memory: libvmm says which tensor begins at its address,
and shape and strides say which rows of it these are. So nothing is kept here of any tensor;
it lives by what was made from it, and goes with the last of that. What a framework has to
do for this is a Framework, of its own module.
"""

import importlib
import os
import sys
import warnings
from operator import index

from cpython.long cimport PyLong_CheckExact
from libc.stdint cimport int64_t

from pyvmm._append cimport append_at, append_one
from pyvmm._core cimport TensorCore
from pyvmm._dlpack cimport DL_CPU, DLDevice
from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    VMM_BLOCK_AUTO,
    VMM_LAYOUT_C,
    VMM_LAYOUT_LANE,
    VMM_LAYOUT_SEQ,
    VMM_STREAM_LEGACY,
    vmm_array,
    vmm_axis,
    vmm_base,
    vmm_device,
    vmm_device_of,
    vmm_find,
    vmm_length,
    vmm_ndim,
    vmm_pool,
    vmm_pool_of,
    vmm_release,
    vmm_reserve,
    vmm_row_shape,
    vmm_spec,
    vmm_spec_of,
    vmm_status,
    vmm_stream_is_capturing,
    vmm_strides,
    vmm_tensor,
    vmm_user,
)
from pyvmm._pool cimport Pool, default_pool_of
from pyvmm._source cimport Source, device_name, look_at
from pyvmm._tensor cimport VTensor
from pyvmm._view cimport View, reserved_view

from pyvmm._dtypes import element_of, name_of
from pyvmm._error import VMMError
from pyvmm._sizes import count
from pyvmm._tensor import empty

cdef dict _LAYOUTS = {
    <int>VMM_LAYOUT_SEQ: "seq",
    <int>VMM_LAYOUT_LANE: "lane",
    <int>VMM_LAYOUT_C: "c",
}
# Rows of address space for what is taken in, where the caller says nothing: at least this
# many, and so many times what it has. They cost no memory.
cdef Py_ssize_t LEAST_CAPACITY = 65536
cdef Py_ssize_t CAPACITY_FACTOR = 4
# Lanes of what is taken in on the host without a layout. Each takes a page at least, and two of
# the mappings that the kernel has 65530 of for all tensors of a process.
cdef Py_ssize_t MOST_LANES = 256
# Steps after each of which a cache was taken in that the step before had returned.
cdef int STEPS_TO_WARN = 8


# ---- what a framework does --------------------------------------------------------

cdef class Framework:
    """What concat() asks of a framework. An instance is registered for its type of arrays.

    counts_elements: strides count elements and not bytes
    default_layout:  of what is taken in, None for pyvmm.empty()'s
    """

    cpdef object unfit(self, object cache, object new):
        """None, or why only the framework's own concatenate gives the right result for these:
        types that are not its own, gradients, elements that are not what lies in memory. Of
        their dtype, shape and device nothing need be asked."""
        raise NotImplementedError

    cpdef object concatenate(self, object cache, object new, object axis):
        """The framework's own concatenate of the two."""
        raise NotImplementedError

    cpdef object anchor(self, object cache):
        """The address of the memory that an array without elements is of, 0 for none."""
        raise NotImplementedError

    cpdef object wrap(self, View reserved):
        """An array over a whole reservation; it and all that is cut from it keep the memory."""
        raise NotImplementedError

    cpdef object cut(self, object array, tuple shape, tuple strides):
        """An array that starts where `array` does, in the same memory and keeping it; None
        where that ends too early for the shape, or begins elsewhere."""
        raise NotImplementedError

    cpdef object dense(self, object array):
        """A contiguous array of these elements."""
        raise NotImplementedError

    def address(self, array):
        """The address of the first element, 0 where there is none: for inplace blocks."""
        raise NotImplementedError


cdef dict _frameworks = {}
cdef tuple _ADAPTERS = ("torch", "paddle", "cupy", "numpy")


def register(kind, framework):
    """Let concat() take arrays of a type."""
    _frameworks[kind] = framework


cdef Framework _framework_of(object kind):
    framework = _frameworks.get(kind)
    if framework is not None:
        return framework
    for base in kind.__mro__:
        if base in _frameworks:
            return _frameworks[base]
        root = base.__module__.partition(".")[0]
        if root in _ADAPTERS:
            module = "_numpy" if root == "numpy" else root
            importlib.import_module(f"pyvmm.{module}")  # registers its types
            if base in _frameworks:
                return _frameworks[base]
    if issubclass(kind, (TensorCore, View)):
        raise TypeError("concat takes a framework's array: a VTensor has append()")
    raise TypeError(f"concat takes an array of NumPy, torch, CuPy or Paddle, not {kind.__name__}")


# ---- statistics -------------------------------------------------------------------

cdef long long _appended = 0
cdef long long _forked = 0
cdef long long _moved = 0
cdef long long _taken_in = 0
cdef long long _copied_bytes = 0
cdef dict _reasons = {}


def concat_stats(*, reset=False):
    """How often concat() and what is built on it did what, in this process, as a dict.

    appended:     to the tip of a tensor, in place
    forked:       an older or shorter view of a tensor was copied into a new one
    moved:        the capacity was used up: copied into a reservation of twice the size
    taken_in:     an ordinary array was copied into a new tensor
    fell_back:    left to the framework's own concatenate
    reasons:      how often for each reason it fell back, a dict
    copied_bytes: of caches, by the copies above

    With reset=True counting begins anew after this answer."""
    global _appended, _forked, _moved, _taken_in, _copied_bytes, _reasons
    stats = {
        "appended": _appended,
        "forked": _forked,
        "moved": _moved,
        "taken_in": _taken_in,
        "fell_back": sum(_reasons.values()),
        "reasons": dict(_reasons),
        "copied_bytes": _copied_bytes,
    }
    if reset:
        _appended = _forked = _moved = _taken_in = _copied_bytes = 0
        _reasons = {}
    return stats


cpdef object fall_back(str reason, dict counts=None):
    """Count a concatenate that is left to the framework, there too. Returns None."""
    _reasons[reason] = _reasons.get(reason, 0) + 1
    if counts is not None:
        counts[reason] = counts.get(reason, 0) + 1


# ---- concat -----------------------------------------------------------------------

def concat(cache, new, axis=0, *, capacity=None, layout=None, pool=None):
    """The rows of `cache`, then those of `new`: equal in value to the framework's own
    concatenate, and an array of the framework.

    cache: an array of NumPy, torch, CuPy or Paddle
    new:   an array of the same framework, dtype and device and, but for the axis, shape
    axis:  along which they are joined; negative counts from the last

    What happens depends on what `cache` is, whatever name or attributes it has:

    - the whole of a VTensor, or what the last concat returned: `new` is appended in place,
      any number of rows, and the result shares memory with `cache`.
    - fewer rows of one, from the first on, because it has grown since: these rows are copied
      into a new tensor and `new` is appended there. Both results stay right.
    - any other array: copied into a new tensor, once, if the result is what the next concat
      gets. A warning says so when it happens at every step.
    - past the capacity the rows move to a reservation of twice the size.
    - what cannot grow in place (another dtype or shape, gradients, subclasses, no memory of
      its own), and all that is captured into a graph, is left to the framework, with its own
      result or error.

    concat_stats() counts each of these. The result is equal in value and not in strides:
    it is contiguous only where its layout says so. As with any view, writing into it in place
    is seen through `cache`. It keeps its memory alive, and the last of the results gives it
    back. Calls from several threads with one cache are safe: the first to come appends, the
    others fork.

    For a tensor that is taken in:
    capacity: rows of address space; by default 65536 or four times the result, whichever
              is more
    layout:   "seq", "lane" or "c", see pyvmm.empty(); by default as there, but "seq" on the host
              too where "c" would make more than 256 lanes
    pool:     a Pool of the array's device; by default default_pool()

    Raises what the framework's concatenate raises, ValueError and TypeError for parameters,
    OutOfMemoryError and VMMError; then nothing has changed."""
    cdef Framework framework = _framework_of(type(cache))
    result = join(framework, cache, new, axis, capacity, layout, pool, True)
    if result is None:
        return framework.concatenate(cache, new, axis)
    return result


cpdef object join(Framework framework, object cache, object new, object axis, object capacity,
                  object layout, object pool, bint take_in, dict counts=None):
    """What concat() does, but None, counted, where it is left to the framework. Without
    `take_in` only what a concat made is appended to, and anything else is "not growing"."""
    cdef Source old, rows
    cdef int dimension
    cdef TensorCore tensor
    reason = framework.unfit(cache, new)
    if reason is not None:
        return fall_back(reason, counts)
    try:
        look_at(cache, &old)
        look_at(new, &rows)
    except (TypeError, ValueError, BufferError, RuntimeError):
        return fall_back("memory that cannot be seen", counts)
    dimension = _dimension(axis, old.array.ndim)
    if dimension < 0:
        return fall_back("axis", counts)
    reason = _mismatch(&old, &rows, dimension)
    if reason is not None:
        return fall_back(reason, counts)

    tensor = _tensor_at(framework, cache, &old, dimension)
    if not take_in and (tensor is None or not _is_made_here(tensor.handle)):
        return fall_back("not growing", counts)
    if _is_captured(tensor, &rows):
        return fall_back("a stream capture", counts)
    if tensor is None:
        return _take_in(framework, cache, &old, new, &rows, dimension, capacity, layout, pool)
    try:
        return _continue(framework, tensor, cache, &old, new, &rows)
    except VMMError as error:
        if error.status != "VMM_ERR_BUSY":
            raise
        return fall_back("in an out-of-memory callback of its own growth", counts)


cdef bint _is_captured(TensorCore tensor, const Source *rows) except -1:
    """Is the stream that the append would be on being captured? A graph appends when it is
    replayed, and not before this returns."""
    cdef vmm_device *device
    cdef int captured = 0
    if rows.producer == NULL or rows.producer == VMM_STREAM_LEGACY:
        return False  # the host, or what is never captured
    if tensor is not None:
        device = vmm_device_of(tensor.handle)
    else:
        device = default_pool_of(device_name(rows.device)).opened
    check(vmm_stream_is_capturing(device, rows.producer, &captured))
    return captured


cdef int _dimension(object axis, int ndim):
    """The axis as a dimension, -1 for what only the framework can judge."""
    cdef Py_ssize_t n
    if not PyLong_CheckExact(axis):
        if isinstance(axis, bool) or not hasattr(axis, "__index__"):
            return -1
        axis = index(axis)
    if not -ndim <= axis < ndim:
        return -1
    n = axis
    return n if n >= 0 else n + ndim


cdef str _mismatch(const Source *old, const Source *rows, int axis):
    """Why these two do not make one tensor, or None."""
    cdef int d
    cdef const vmm_array *a = &old.array
    cdef const vmm_array *b = &rows.array
    if (
        old.device.device_type != rows.device.device_type
        or old.device.device_id != rows.device.device_id
    ):
        return "devices"
    if a.dtype.code != b.dtype.code or a.dtype.bits != b.dtype.bits:
        return "dtypes"
    if old.array.ndim != rows.array.ndim:
        return "shapes"
    for d in range(old.array.ndim):
        if d != axis and old.shape[d] != rows.shape[d]:
            return "shapes"
        if d != axis and old.shape[d] == 0:
            return "no elements"
    return None


# ---- which tensor -----------------------------------------------------------------

cdef TensorCore _tensor_at(Framework framework, object cache, const Source *old, int axis):
    """The tensor whose first rows `cache` is, None for none."""
    cdef const void *base = old.array.data
    cdef vmm_tensor *handle = NULL
    if old.shape[axis] == 0:
        base = <const void *><size_t>framework.anchor(cache)
    if base == NULL:
        return None
    check(vmm_find(base, &handle))
    if handle == NULL:
        return None
    if not _is_start_of(old, handle, axis):
        with nogil:
            vmm_release(handle)
        return None
    return _own(handle, old.device)


# A Pool of each device: not a tensor's own, which may be gone, but what names its device. That
# it may be closed does not matter.
cdef dict _pools = {}
cdef Pool _host_pool = None


def _after_fork_in_child():
    global _host_pool
    _host_pool = None
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef TensorCore _own(vmm_tensor *handle, DLDevice device):
    """An object for a tensor and for a reference to it, which it takes over."""
    global _host_pool
    cdef TensorCore tensor = TensorCore.__new__(TensorCore)
    cdef Pool pool = _host_pool
    if device.device_type != DL_CPU:
        pool = _pools.get((device.device_type, device.device_id))
    if pool is None:
        pool = default_pool_of(device_name(device))
        if device.device_type == DL_CPU:
            _host_pool = pool
        else:
            _pools[device.device_type, device.device_id] = pool
    tensor.hold(handle, pool)
    return tensor


cdef bint _is_start_of(const Source *old, vmm_tensor *handle, int axis) noexcept:
    """Is it rows [0, n) of the tensor, n at most the length, in all other dimensions whole?"""
    cdef const int64_t *row_shape = vmm_row_shape(handle)
    cdef const int64_t *strides = vmm_strides(handle)
    cdef const vmm_spec *spec = vmm_spec_of(handle)
    cdef int d, ndim = vmm_ndim(handle)
    cdef int64_t dense = old.array.dtype.bits // 8, stride
    if (
        ndim != old.array.ndim
        or vmm_axis(handle) != axis
        or spec.dtype.code != old.array.dtype.code
        or spec.dtype.bits != old.array.dtype.bits
        or old.shape[axis] > <int64_t>vmm_length(handle)
    ):
        return False
    for d in range(ndim - 1, -1, -1):
        if d != axis and old.shape[d] != row_shape[d]:
            return False
        stride = old.strides[d] if old.array.strides != NULL else dense
        # Over one index or none a stride means nothing.
        if old.shape[d] > 1 and old.shape[axis] > 0 and stride != strides[d]:
            return False
        dense *= old.shape[d]
    return True


def is_tensor_at(size_t address):
    """Whether a tensor begins at this address."""
    cdef vmm_tensor *handle
    check(vmm_find(<const void *>address, &handle))
    with nogil:
        vmm_release(handle)
    return handle != NULL


def is_result_at(size_t address):
    """Whether a tensor that concat made begins at this address."""
    cdef vmm_tensor *handle
    cdef bint is_result
    if address == 0:
        return False
    check(vmm_find(<const void *>address, &handle))
    if handle == NULL:
        return False
    is_result = _is_made_here(handle)
    with nogil:
        vmm_release(handle)
    return is_result


cdef bint _is_made_here(vmm_tensor *handle) noexcept:
    return vmm_user(handle)[1] != NULL


cdef void _mark_made_here(vmm_tensor *handle) noexcept:
    vmm_user(handle)[1] = <void *>1


# ---- growing it -------------------------------------------------------------------

cdef object _continue(Framework framework, TensorCore tensor, object cache, const Source *old,
                      object new, const Source *rows):
    """Append to the tensor whose first rows `cache` is, or to a copy of these."""
    global _appended, _moved, _forked
    cdef int axis = tensor.target.axis
    cdef Py_ssize_t n_old = old.shape[axis], n_new = rows.shape[axis]
    cdef Py_ssize_t n_rows = n_old + n_new, room
    cdef vmm_spec spec
    cdef vmm_tensor *handle
    cdef vmm_pool *pool = vmm_pool_of(tensor.handle)
    cdef vmm_status status
    cdef bint is_tip = n_old == <Py_ssize_t>vmm_length(tensor.handle)
    if not _is_dense(rows):
        new, rows = framework.dense(new), NULL
    elif rows.outlives:
        rows = NULL
    if is_tip and n_rows <= tensor.capacity_:
        if append_at(tensor, new, rows, n_old) == 0:
            _appended += 1
            return _cut(framework, tensor, cache, n_rows)
        is_tip = False  # another thread was first

    spec = vmm_spec_of(tensor.handle)[0]
    room = tensor.capacity_
    while room < n_rows:
        room = room * 2
    spec.capacity = room
    with nogil:
        status = vmm_reserve(pool, &spec, &handle)
    check(status)
    result = _fill(framework, _own(handle, tensor.target.device), cache, old, new)
    if is_tip:
        _moved += 1
    else:
        _forked += 1
    return result


cdef object _take_in(Framework framework, object cache, const Source *old, object new,
                     const Source *rows, int axis, object capacity, object layout, object pool):
    global _taken_in
    cdef Py_ssize_t n_rows = old.shape[axis] + rows.shape[axis]
    cdef Py_ssize_t n_lanes = 1
    cdef int d
    shape = [old.shape[d] for d in range(old.array.ndim)]
    shape[axis] = 0
    for d in range(axis):
        n_lanes = n_lanes * old.shape[d]
    if layout is None and n_lanes > MOST_LANES:
        layout = "seq"
    if capacity is None:
        capacity = max(LEAST_CAPACITY, CAPACITY_FACTOR * n_rows)
    else:
        capacity = max(count(capacity, "capacity", 1), n_rows)
    if layout is None:
        layout = framework.default_layout
    dtype = name_of(old.array.dtype.code, old.array.dtype.bits)
    device = device_name(old.device)
    tensor = empty(shape, dtype, axis=axis, capacity=capacity, device=device, layout=layout,
                   pool=pool)
    result = _fill(framework, tensor, cache, old,
                   new if _is_dense(rows) else framework.dense(new))
    _taken_in += 1
    _watch((axis, dtype, device, tuple(shape)), old.shape[axis], n_rows)
    return result


cdef object _fill(Framework framework, TensorCore tensor, object cache, const Source *old,
                  object new):
    """Both into a new tensor, which then lives by the result."""
    global _copied_bytes
    if old.shape[tensor.target.axis] > 0:
        append_one(tensor, cache if _is_dense(old) else framework.dense(cache), None)
    _copied_bytes += vmm_length(tensor.handle) * tensor.row_bytes
    append_one(tensor, new, None)
    _mark_made_here(tensor.handle)
    return _cut(framework, tensor, None, vmm_length(tensor.handle))


cdef bint _is_dense(const Source *source) noexcept:
    """Is its last dimension, so that an append takes it?"""
    cdef int last = source.array.ndim - 1
    return (
        source.array.strides == NULL
        or source.shape[last] <= 1
        or source.strides[last] == source.array.dtype.bits // 8
    )


cdef object _cut(Framework framework, TensorCore tensor, object cache, Py_ssize_t n_rows):
    """The array of the first rows: out of the memory behind `cache`, where that is the whole
    reservation, else out of a new array over it."""
    cdef int d, ndim = tensor.target.ndim
    cdef int64_t unit = tensor.itemsize if framework.counts_elements else 1
    shape = tensor.shape_of(n_rows)
    strides = tuple([tensor.byte_strides[d] // unit for d in range(ndim)])
    result = None if cache is None else framework.cut(cache, shape, strides)
    if result is None:
        result = framework.cut(framework.wrap(_reserved(tensor)), shape, strides)
    return result


cdef View _reserved(TensorCore tensor):
    """VTensor.reserved(), of what may be no VTensor yet."""
    cdef vmm_tensor *handle
    cdef const vmm_spec *spec = vmm_spec_of(tensor.handle)
    cdef VTensor whole
    if isinstance(tensor, VTensor):
        return reserved_view(tensor)
    check(vmm_find(vmm_base(tensor.handle), &handle))
    whole = VTensor.__new__(VTensor)
    whole.adopt(handle, tensor.pool_, element_of(name_of(spec.dtype.code, spec.dtype.bits)).dtype,
                _LAYOUTS[<int>spec.layout],
                "auto" if spec.block_bytes == VMM_BLOCK_AUTO else spec.block_bytes, spec.zero)
    return reserved_view(whole)


# ---- what is taken in at every step -----------------------------------------------

# For each kind of tensor, how many steps led to a result of so many rows, each of which took
# in what had as many rows as the result before.
cdef dict _steps = {}
cdef bint _warned = False


cdef int _watch(tuple kind, Py_ssize_t n_old, Py_ssize_t n_rows) except -1:
    global _warned
    if _warned or n_rows == n_old:
        return 0
    if len(_steps) > 1000:
        _steps.clear()
    n_steps = _steps.pop((kind, n_old), 0) + 1
    # The layers of a model are of one kind: the first of them brings the count along.
    n_steps = _steps[kind, n_rows] = max(n_steps, _steps.get((kind, n_rows), 0))
    if n_steps >= STEPS_TO_WARN:
        _warned = True
        _steps.clear()
        warnings.warn(
            f"concat has copied a whole cache in each of {n_steps} steps, of {n_old} rows in the "
            "last: what it gets is not what it returned. Pass the result on as it is. A copy "
            "(clone, contiguous, assignment into another array) or another axis on the way make "
            "it an ordinary array again; pyvmm.concat_stats() counts these as taken_in.",
            stacklevel=_frames_of_ours() + 1,
        )
    return 0


cdef int _frames_of_ours() except -1:
    """Frames of Python's between here, which has none, and the caller of this package."""
    cdef int n = 0
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyvmm."):
        frame = frame.f_back
        n += 1
    return n
