"""Arrays to concatenate on any device: NumPy's on the host; on CUDA those of a framework made
here, since the simulated driver bears no other."""

import gc
import weakref

import numpy as np

import cuda_helper
import pyvmm
from pyvmm._concat import Framework, register


class DeviceArray(cuda_helper.Interface):
    """An array on the GPU; `owner` keeps its memory."""

    stream = None  # on which this framework works at present, None for the legacy one

    def __init__(self, pointer, shape, strides, dtype, owner):
        super().__init__(pointer, shape, strides, dtype, DeviceArray.stream)
        self.pointer, self.shape, self.strides, self.dtype = pointer, shape, strides, dtype
        self.owner = owner

    @classmethod
    def of(cls, array):
        memory = cuda_helper.InterfaceArray(np.ascontiguousarray(array))
        owner = _Memory(memory)
        return cls(memory.pointer, memory.shape, memory.strides, memory.dtype, owner)

    def __dlpack_device__(self):
        return cuda_helper.DLPACK_TYPE, 0

    def get(self):
        return cuda_helper.read(self.pointer, self.shape, self.strides, self.dtype)

    def __getitem__(self, key):
        # NumPy knows what a slice is; nothing is read.
        like = np.lib.stride_tricks.as_strided(
            np.empty(1, self.dtype), self.shape, self.strides, writeable=False
        )
        part = like[key]
        offset = part.__array_interface__["data"][0] - like.__array_interface__["data"][0]
        return DeviceArray(self.pointer + offset, part.shape, part.strides, self.dtype, self.owner)


class _Memory:
    def __init__(self, memory):
        weakref.finalize(self, memory.free)


class _Exported:
    """Memory of a tensor, by its capsule, for as long as this lives."""

    def __init__(self, exporter):
        self.capsule = exporter.__dlpack__(max_version=(1, 0))


class _OfDeviceArrays(Framework):
    def unfit(self, cache, new):
        return None if type(new) is DeviceArray else "types"

    def concatenate(self, cache, new, axis):
        return DeviceArray.of(np.concatenate((value(cache), value(new)), axis))

    def anchor(self, cache):
        return cache.pointer if isinstance(cache.owner, _Exported) else 0

    def wrap(self, reserved):
        return export(reserved)

    def cut(self, array, shape, strides):
        if not isinstance(array.owner, _Exported):
            return None
        return DeviceArray(array.pointer, shape, strides, array.dtype, array.owner)

    def dense(self, array):
        return DeviceArray.of(array.get())


register(DeviceArray, _OfDeviceArrays())


def export(t):
    """A tensor's rows, or a view's, as an array that shares their memory."""
    if t.device == "host":
        return np.asarray(t)
    return DeviceArray(t.ptr, t.shape, t.strides, t.dtype, _Exported(t))


def array(device, contents):
    contents = np.ascontiguousarray(contents)
    return contents.copy() if device == "host" else DeviceArray.of(contents)


def value(array):
    return array.get() if isinstance(array, DeviceArray) else np.array(array)


def address(array):
    if isinstance(array, DeviceArray):
        return array.pointer
    return array.__array_interface__["data"][0]


def in_use(device):
    return pyvmm.default_pool(device).stats()["in_use_bytes"]


def counted():
    """How often concat() has done what, as far as it has."""
    counts = pyvmm.concat_stats()
    del counts["copied_bytes"], counts["reasons"]
    return {name: n for name, n in counts.items() if n}


class Uncollected:
    """With the collector off: what goes, goes by itself."""

    def __enter__(self):
        gc.collect()
        gc.disable()

    def __exit__(self, *exception):
        gc.enable()
