# cython: language_level=3, embedsignature=True
"""Reading what is appended, whatever array it is.

Tried in this order, the fastest first: the exchange table of DLPack 1.3 on x's type,
__cuda_array_interface__ (for a tensor on a GPU), NumPy arrays by their buffer, __dlpack__,
other buffers. Nothing here touches an element.
"""

import sys
from types import GetSetDescriptorType

import numpy

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_STRIDES,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.long cimport PyLong_AsVoidPtr, PyLong_Check
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from libc.stdint cimport int64_t

from pyvmm._dlpack cimport (
    DL_CPU,
    DL_CUDA,
    DL_CUDA_HOST,
    DL_CUDA_MANAGED,
    DL_ROCM,
    DL_ROCM_HOST,
    DLDevice,
    DLPackExchangeAPI,
    DLPackExchangeAPIHeader,
    DLTensor,
    is_on_gpu,
    is_same_device,
    read_capsule,
)
from pyvmm._libvmm cimport (
    VMM_MAX_NDIM,
    VMM_MEMORY_DEVICE,
    VMM_MEMORY_HOST,
    VMM_STREAM_LEGACY,
    vmm_dtype,
    vmm_stream,
)

from pyvmm._stream cimport number_of

from pyvmm._dtypes import element_of, name_of

cdef type _ndarray = numpy.ndarray
cdef tuple _MAX_VERSION = (1, 0)
# The kinds of typestr as DLPack's codes.
cdef dict _CODES = {"b": 6, "i": 0, "u": 1, "f": 2, "c": 5}
cdef str _NATIVE_TYPESTR = "<|" if sys.byteorder == "little" else ">|"


cdef int read_source(object x, const Target *target, vmm_stream stream, Source *out) except -1:
    """Describe `x` for an append to `target` on `stream`, or on the producer's when NULL.

    Raises TypeError (no array, another dtype), ValueError (another device), BufferError (the
    producer refuses). Then nothing is held; else close_source() is due."""
    cdef _Table table = _table_of(type(x))
    begin_source(out)
    if table is not None:  # which holds nothing
        return _read_by_table(x, table, target, out)
    try:
        if target.device.device_type != DL_CPU:
            interface = getattr(x, "__cuda_array_interface__", None)
            if interface is not None and _is_enough(x, interface):
                return _read_interface(x, interface, target, out)
        if isinstance(x, _ndarray):
            return _read_buffer(x, target, out)
        if hasattr(x, "__dlpack__"):
            return _read_by_dlpack(x, target, stream, out)
        if PyObject_CheckBuffer(x) and not isinstance(x, numpy.generic):
            return _read_buffer(x, target, out)
    except BaseException:
        close_source(out)
        raise
    if hasattr(x, "__cuda_array_interface__"):
        raise ValueError("x is in a GPU's memory and the tensor on "
                         f"{device_name(target.device)}: copy it there first")
    raise TypeError(
        f"append takes an array (DLPack, __cuda_array_interface__ or a buffer), not "
        f"{type(x).__name__}: numpy.asarray(x) first"
    )


cdef void begin_source(Source *out) noexcept:
    """Nothing is held yet, and no stream named."""
    out.producer = NULL
    out.outlives = False
    out.capsule = NULL
    out.has_buffer = False


cdef void close_source(Source *source) noexcept:
    if source.has_buffer:
        source.has_buffer = False
        PyBuffer_Release(&source.buffer)
    Py_XDECREF(source.capsule)
    source.capsule = NULL


cdef int look_at(object x, Source *out) except -1:
    """Describe x where it lies, to recognise its memory. Nothing is held, and whether the
    elements are what lies there is not asked: the caller knows, by the framework.

    Raises TypeError, ValueError, BufferError or RuntimeError for what has no memory that can be
    named."""
    cdef _Table table = _table_of(type(x))
    begin_source(out)
    try:
        if table is not None:
            return _read_by_table(x, table, NULL, out)
        if isinstance(x, _ndarray):
            return _read_buffer(x, NULL, out)
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is not None and _is_enough(x, interface):
            return _read_interface(x, interface, NULL, out)
        if hasattr(x, "__dlpack__"):
            _read_by_dlpack(x, NULL, NULL, out)
            return _check_elements(out)
    finally:
        close_source(out)
    raise TypeError(f"{type(x).__name__} does not say where its memory is")


cdef int _check_elements(const Source *source) except -1:
    """Elements without an address are not in memory yet, or in none."""
    cdef int d
    if source.array.data != NULL:
        return 0
    for d in range(source.array.ndim):
        if source.shape[d] == 0:
            return 0
    raise ValueError("x has elements and no address")


cdef str device_name(DLDevice device):
    if device.device_type == DL_CUDA:
        return f"cuda:{device.device_id}"
    if device.device_type == DL_ROCM:
        return f"hip:{device.device_id}"
    if device.device_type == DL_CPU:
        return "host"
    return f"a device of DLPack's type {device.device_type}"


cdef int _check_device(DLDevice device, const Target *target) except -1:
    """May an append read memory of that device?"""
    cdef bint is_here = (
        device.device_type == DL_CPU
        or device.device_type == DL_CUDA_HOST
        or device.device_type == DL_ROCM_HOST
        or (device.device_type == DL_CUDA_MANAGED and target.device.device_type == DL_CUDA)
        or (device.device_type == target.device.device_type
            and device.device_id == target.device.device_id)
    )
    if not is_here:
        raise ValueError(f"x is on {device_name(device)} and the tensor on "
                         f"{device_name(target.device)}: copy it there first")
    return 0


cdef int _check_dtype(vmm_dtype dtype, const Target *target) except -1:
    if (
        dtype.code != target.dtype.code
        or dtype.bits != target.dtype.bits
        or dtype.lanes != target.dtype.lanes
    ):
        raise TypeError(
            f"x is {name_of(dtype.code, dtype.bits, dtype.lanes)} and the tensor "
            f"{name_of(target.dtype.code, target.dtype.bits)}: append converts nothing, "
            "so convert x or make the tensor of its dtype"
        )
    return 0


cdef int describe(Source *out, const Target *target, DLDevice device, vmm_dtype dtype, int ndim,
                  const int64_t *shape, const int64_t *strides, int64_t stride_unit) except -1:
    """Fill `out.array` but for its address. `strides` may be NULL (dense), and count units of
    `stride_unit` bytes. Shape and strides are copied: an append lets other threads run, and
    they may change x."""
    cdef int i
    if target != NULL:
        if not is_same_device(device, target.device):
            _check_device(device, target)
        _check_dtype(dtype, target)
    elif not is_on_gpu(device) and device.device_type not in (DL_CPU, DL_CUDA_HOST, DL_ROCM_HOST):
        raise TypeError(f"x is on {device_name(device)}")
    if ndim > VMM_MAX_NDIM:
        raise ValueError(f"x has {ndim} dimensions: at most {VMM_MAX_NDIM} are possible")
    out.array.memory = VMM_MEMORY_HOST
    out.array.device_index = 0
    out.device = DLDevice(DL_CPU, 0)
    if is_on_gpu(device):
        out.array.memory = VMM_MEMORY_DEVICE
        out.device = device
        if device.device_type == DL_CUDA_MANAGED:
            out.device.device_type = DL_CUDA
        out.array.device_index = (device if target == NULL else target.device).device_id
    out.array.dtype = dtype
    out.array.ndim = ndim
    out.array.shape = out.shape
    out.array.strides = NULL if strides == NULL else out.strides
    for i in range(ndim):
        if shape[i] < 0:
            raise ValueError(f"x says that its dimension {i} has size {shape[i]}")
        out.shape[i] = shape[i]
        if strides != NULL:
            out.strides[i] = strides[i] * stride_unit
    return 0


cdef int check_shape(const Source *source, const Target *target) except -1:
    """What vmm_append() finds out, too: for when something is done before it is called."""
    cdef int i
    if source.array.ndim != target.ndim:
        raise ValueError(f"x has {source.array.ndim} dimensions and the tensor {target.ndim}")
    for i in range(target.ndim):
        if i != target.axis and source.shape[i] != target.row_shape[i]:
            raise ValueError(f"dimension {i} of x has size {source.shape[i]} and that of the "
                             f"tensor {target.row_shape[i]}")
    return 0


# ---- the exchange table of DLPack 1.3 ---------------------------------------------

cdef extern from "Python.h":
    ctypedef struct PyGetSetDef:
        object (*get)(object, void *)
        void *closure
    ctypedef struct PyGetSetDescrObject:
        PyGetSetDef *d_getset


@cython.final
cdef class _Table:
    """A type's exchange table, and what it does not tell and __dlpack__() would refuse."""
    cdef const DLPackExchangeAPI *api
    cdef bint of_torch
    # The attribute that tells of gradients, "" where there is none; what it says where an append
    # would lose some; and how the type computes it, where it can be asked without a look-up.
    cdef str gradients
    cdef bint has_gradients
    cdef const PyGetSetDef *computed


# By type; None for a type without a table. Most appends are of the type of the one before.
cdef dict _tables = {}
cdef type _last_type = None
cdef _Table _last_table = None


cdef _Table _table_of(type kind):
    global _last_type, _last_table
    if kind is not _last_type:
        if kind not in _tables:
            _tables[kind] = _find_table(kind)
        _last_table = _tables[kind]
        _last_type = kind
    return _last_table


cdef bint has_table(object x) except -1:
    return _table_of(type(x)) is not None


cdef _Table _find_table(type kind):
    cdef _Table table
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    cdef const DLPackExchangeAPIHeader *header = <const DLPackExchangeAPIHeader *>(
        PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    )
    while header != NULL and header.version.major > 1:
        header = header.prev_api
    if header == NULL or header.version.major != 1:
        return None
    table = _Table.__new__(_Table)
    table.api = <const DLPackExchangeAPI *>header
    if table.api.dltensor_from_py_object_no_sync == NULL:
        return None
    table.of_torch = hasattr(kind, "requires_grad") and hasattr(kind, "is_neg")
    table.gradients = ""
    if table.of_torch:
        table.gradients, table.has_gradients = "requires_grad", True
    elif hasattr(kind, "stop_gradient"):
        table.gradients, table.has_gradients = "stop_gradient", False
    if table.gradients and kind.__getattribute__ is object.__getattribute__:
        descriptor = getattr(kind, table.gradients)
        # What was taken from another type would be given an object that is none of its own.
        if type(descriptor) is GetSetDescriptorType and issubclass(kind, descriptor.__objclass__):
            table.computed = (<PyGetSetDescrObject *>descriptor).d_getset
    return table


cdef bint _has_gradients(object x, _Table table) except -1:
    if not table.gradients:
        return False
    if table.computed != NULL and table.computed.get != NULL:
        answer = table.computed.get(x, table.computed.closure)
    else:
        answer = getattr(x, table.gradients)
    return bool(answer) == table.has_gradients


cdef int _read_by_table(object x, _Table table, const Target *target, Source *out) except -1:
    cdef DLTensor tensor
    if target != NULL and _has_gradients(x, table):
        raise BufferError("x requires gradients, which an append does not record: x.detach() first")
    table.api.dltensor_from_py_object_no_sync(<void *>x, &tensor)
    _read_dltensor(&tensor, target, out)
    if target == NULL:
        _check_elements(out)
    elif table.of_torch and _is_lazy(x, &tensor):
        raise BufferError("x is conjugated or negated only when it is read: x.resolve_conj() or "
                          "x.resolve_neg() first")
    if tensor.device.device_type == DL_CUDA or tensor.device.device_type == DL_ROCM:
        table.api.current_work_stream(tensor.device.device_type, tensor.device.device_id,
                                      &out.producer)
        if out.producer == NULL:
            out.producer = VMM_STREAM_LEGACY
    return 0


cdef bint _is_lazy(object x, const DLTensor *tensor) except -1:
    """Does torch change the elements of x on the way out? It conjugates complex numbers, and
    negates what is a view of imaginary parts of such. bfloat16 and the float8 types are parts
    of no complex number, and not asked: the question costs a third of the append."""
    if tensor.dtype.code == 4 or tensor.dtype.code > 6:
        return False
    return (tensor.dtype.code == 5 and x.is_conj()) or x.is_neg()


# ---- DLPack capsules --------------------------------------------------------------

cdef int _read_dltensor(const DLTensor *tensor, const Target *target, Source *out) except -1:
    out.array.data = <const char *>tensor.data + tensor.byte_offset if tensor.data else NULL
    return describe(out, target, tensor.device, tensor.dtype, tensor.ndim, tensor.shape,
                    tensor.strides, tensor.dtype.bits // 8)


cdef int _read_by_dlpack(object x, const Target *target, vmm_stream stream,
                         Source *out) except -1:
    # A producer on a device that we cannot read is not asked to export at all.
    cdef DLDevice device
    device.device_type, device.device_id = x.__dlpack_device__()
    if target != NULL:
        _check_device(device, target)
    if is_on_gpu(device):
        # The producer orders its work before ours, and is told no more: its memory may be
        # used anew, on a stream of its own, as soon as the export is dropped.
        if target == NULL:
            asked = -1  # only looked at
        else:
            asked = number_of(stream if stream != NULL else VMM_STREAM_LEGACY, device)
        out.outlives = True
        try:
            capsule = x.__dlpack__(stream=asked, max_version=_MAX_VERSION)
        except TypeError:
            capsule = x.__dlpack__(stream=asked)
    else:
        try:
            capsule = x.__dlpack__(max_version=_MAX_VERSION)
        except TypeError:
            capsule = x.__dlpack__()
    Py_INCREF(capsule)
    out.capsule = <PyObject *>capsule
    return _read_dltensor(read_capsule(capsule), target, out)


# ---- __cuda_array_interface__ -----------------------------------------------------

cdef bint _is_enough(object x, object interface) except -1:
    """Does the interface say all that DLPack would? Elements such as bfloat16 have no typestr
    of their own. Before version 3 it does not say when the data is there, and JAX's, which
    is of version 2, does not wait for it either."""
    typestr = interface["typestr"]
    if not isinstance(typestr, str) or len(typestr) < 3:
        raise TypeError(f"__cuda_array_interface__ of x has the typestr {typestr!r}")
    is_ordered = interface.get("version", 0) >= 3 or not hasattr(x, "__dlpack__")
    return is_ordered and typestr[1] != "V"


cdef int _read_interface(object x, object interface, const Target *target, Source *out) except -1:
    cdef DLDevice device
    cdef vmm_dtype dtype
    cdef int64_t shape[VMM_MAX_NDIM]
    cdef int64_t strides[VMM_MAX_NDIM]
    cdef int i, ndim
    # The interface does not say on which GPU the memory is.
    device = DLDevice(DL_CUDA, 0) if target == NULL else target.device
    if hasattr(x, "__dlpack_device__"):
        device.device_type, device.device_id = x.__dlpack_device__()

    typestr = interface["typestr"]
    code = _CODES.get(typestr[1])
    if code is None or typestr[0] not in _NATIVE_TYPESTR or not typestr[2:].isdecimal():
        raise TypeError(f"x has elements of the type {typestr!r}, which append cannot read")
    dtype.code, dtype.bits, dtype.lanes = code, 8 * int(typestr[2:]), 1
    if interface.get("mask") is not None:
        raise TypeError("x is masked: append cannot read the mask")

    sizes, steps = interface["shape"], interface.get("strides")
    if not isinstance(sizes, tuple) or not (steps is None or isinstance(steps, tuple)):
        raise TypeError("shape and strides in __cuda_array_interface__ of x must be tuples")
    if len(sizes) > VMM_MAX_NDIM or (steps is not None and len(steps) != len(sizes)):
        raise ValueError(f"x has {len(sizes)} dimensions: at most {VMM_MAX_NDIM} are possible")
    ndim = len(sizes)
    for i in range(ndim):
        shape[i] = sizes[i]
        strides[i] = steps[i] if steps is not None else 0
    describe(out, target, device, dtype, ndim, shape, strides if steps is not None else NULL, 1)

    data = interface["data"]
    if not isinstance(data, tuple) or not PyLong_Check(data[0]):
        raise TypeError("data in __cuda_array_interface__ of x must be (address, read-only)")
    out.array.data = PyLong_AsVoidPtr(data[0])
    if out.array.data == NULL and 0 not in sizes:
        raise ValueError("x has elements and no address")

    # Without a stream, what wrote x is ordered with the legacy default stream or done.
    stream = interface.get("stream")
    out.producer = VMM_STREAM_LEGACY
    if stream is not None:
        if not PyLong_Check(stream):
            raise TypeError(f"x names {stream!r} as its stream")
        if stream < 0 or (stream == 0 and device.device_type != DL_ROCM):
            raise ValueError(f"x names {stream} as its stream: 1 is the legacy default one")
        if stream != 0:
            out.producer = PyLong_AsVoidPtr(stream)
    return 0


# ---- buffers ----------------------------------------------------------------------

cdef char _NATIVE_ORDER = b"<" if sys.byteorder == "little" else b">"


cdef int _read_buffer(object x, const Target *target, Source *out) except -1:
    cdef vmm_dtype dtype
    cdef DLDevice host = DLDevice(DL_CPU, 0)
    cdef int code
    element = None
    try:
        PyObject_GetBuffer(x, &out.buffer, PyBUF_FORMAT | PyBUF_STRIDES)
    except ValueError:
        # NumPy has no format for ml_dtypes' elements: their bits have one.
        if not isinstance(x, _ndarray):
            raise
        element = element_of(x.dtype)
        x = x.view(f"u{element.bits // 8}")
        PyObject_GetBuffer(x, &out.buffer, PyBUF_FORMAT | PyBUF_STRIDES)
    out.has_buffer = True
    if element is not None:
        dtype.code, dtype.bits, dtype.lanes = element.code, element.bits, 1
    else:
        code = _code_of_format(out.buffer.format)
        if code < 0:
            raise TypeError(f"x has elements of the format {out.buffer.format.decode()!r}, which "
                            "append cannot read")
        dtype.code, dtype.bits, dtype.lanes = code, 8 * out.buffer.itemsize, 1
    out.array.data = out.buffer.buf
    return describe(out, target, host, dtype, out.buffer.ndim, <int64_t *>out.buffer.shape,
                    <int64_t *>out.buffer.strides, 1)


cdef int _code_of_format(const char *format) noexcept:
    """DLPack's code of an element in the struct module's notation, -1 for what has none."""
    if format == NULL:
        return 1  # bytes
    if format[0] == b"@" or format[0] == b"=" or format[0] == _NATIVE_ORDER:
        format += 1
    if format[0] == b"Z" and format[1] != 0 and format[2] == 0:
        return 5 if format[1] in b"fd" else -1
    if format[0] == 0 or format[1] != 0:
        return -1
    if format[0] in b"efd":
        return 2
    if format[0] in b"bhilqn":
        return 0
    if format[0] in b"BHILQN":
        return 1
    return 6 if format[0] == b"?" else -1
