"""DLPack's structs by ctypes: a look into capsules, and capsules of our own."""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, ROCM = 1, 2, 3, 10
READ_ONLY, COPIED = 1, 2
CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}

Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # called with the GIL released


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class ExchangeAPI(ctypes.Structure):
    """The exchange table of DLPack 1.3; its functions are called with the GIL held."""

    Look = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
    CurrentStream = ctypes.PYFUNCTYPE(
        ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
    )
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", ctypes.c_void_p),
        ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", Look),
        ("current_work_stream", CurrentStream),
    ]


_api = ctypes.pythonapi
_api.PyCapsule_GetName.restype = ctypes.c_char_p
_api.PyCapsule_GetName.argtypes = [ctypes.py_object]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# For a capsule that is being destroyed, of which no reference may be taken.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _api)
)
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)
NAMES = {Legacy: b"dltensor", Versioned: b"dltensor_versioned"}
USED_NAMES = {Legacy: b"used_dltensor", Versioned: b"used_dltensor_versioned"}


def look(capsule):
    """The struct in a capsule that nobody has consumed; it keeps the capsule alive."""
    for struct, name in NAMES.items():
        if _api.PyCapsule_GetName(capsule) == name:
            managed = struct.from_address(_api.PyCapsule_GetPointer(capsule, name))
            managed.capsule = capsule
            return managed
    raise ValueError(f"{capsule!r} has been consumed")


class Consumer:
    """Takes a capsule over, as a framework does; delete() is the end of its tensor."""

    def __init__(self, capsule):
        self.managed = look(capsule)
        self.managed.capsule = None
        # A capsule keeps the pointer to its name, so names live as long as this module.
        _api.PyCapsule_SetName(capsule, USED_NAMES[type(self.managed)])
        self.tensor = self.managed.tensor

    @property
    def shape(self):
        return tuple(self.tensor.shape[: self.tensor.ndim])

    @property
    def strides(self):
        """In elements, as DLPack has them."""
        return tuple(self.tensor.strides[: self.tensor.ndim])

    def delete(self):
        self.managed.deleter(ctypes.addressof(self.managed))


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _destroy_capsule(capsule):
    for struct, name in NAMES.items():
        if _is_valid(capsule, name):
            managed = struct.from_address(_get_pointer(capsule, name))
            managed.deleter(ctypes.addressof(managed))


class Producer:
    """Exports one array through DLPack. Counts what is asked of it and what is alive."""

    def __init__(self, pointer, shape, strides, dtype, device=(CPU, 0)):
        self.pointer, self.shape, self.strides = pointer, tuple(shape), tuple(strides)
        self.dtype, self.device = np.dtype(dtype), device
        self.asked_streams = []
        self._alive = {}
        self._deleter = Deleter(lambda address: self._alive.pop(address) and None)

    @property
    def alive(self):
        return len(self._alive)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked_streams.append(stream)
        versioned = max_version is not None and max_version[0] >= 1
        managed = (Versioned if versioned else Legacy)()
        if versioned:
            managed.major = 1
        ndim = len(self.shape)
        shape = (ctypes.c_int64 * ndim)(*self.shape)
        strides = (ctypes.c_int64 * ndim)(*(n // self.dtype.itemsize for n in self.strides))
        tensor = managed.tensor
        tensor.data = self.pointer
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim = ndim
        tensor.code = CODES[self.dtype.kind]
        tensor.bits, tensor.lanes = self.dtype.itemsize * 8, 1
        tensor.shape, tensor.strides = shape, strides
        address = ctypes.addressof(managed)
        managed.manager_ctx = address
        managed.deleter = self._deleter
        self._alive[address] = managed, shape, strides, self
        return _api.PyCapsule_New(address, NAMES[type(managed)], _destroy_capsule)


class Tabled:
    """One array, read by the exchange table of its type as torch's are; `current_stream`, of the
    class, is the stream that the table says the work of all of them is on."""

    current_stream = 0

    def __init__(self, pointer, shape, strides, dtype, device=(CPU, 0)):
        self.dtype = np.dtype(dtype)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*(n // self.dtype.itemsize for n in strides))
        self.exported = DLTensor(
            pointer, *device, len(shape), CODES[self.dtype.kind], 8 * self.dtype.itemsize, 1
        )
        self.exported.shape, self.exported.strides = self._shape, self._strides


@ExchangeAPI.Look
def _look_at(x, out):
    out[0] = x.exported
    return 0


@ExchangeAPI.CurrentStream
def _current_stream(device_type, device_id, out):
    out[0] = Tabled.current_stream or None
    return 0


_TABLE_NAME = b"dlpack_exchange_api"  # a capsule keeps the pointer to it
_table = ExchangeAPI(1, 3, None, None, None, None, _look_at, _current_stream)
Tabled.__dlpack_c_exchange_api__ = _api.PyCapsule_New(ctypes.addressof(_table), _TABLE_NAME, None)
