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
