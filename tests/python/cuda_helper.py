"""A GPU for the tests by ctypes: device memory, streams, and arrays that name their stream.

Everything comes from the driver library that pyvmm itself loads, real or simulated: CUDA's, or
HIP's where PYVMM_TEST_DEVICE says so. Calls have CUDA's names here.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import threading

import numpy as np

import dlpack_struct

IS_HIP = os.environ.get("PYVMM_TEST_DEVICE", "") in ("sim-hip", "hip:0")
if IS_HIP:
    LIBRARY = os.environ.get("VMM_HIP_LIBRARY") or "libamdhip64.so"
else:
    LIBRARY = os.environ.get("VMM_CUDA_LIBRARY") or "libcuda.so.1"
NAME = "hip:0" if IS_HIP else "cuda:0"
DLPACK_TYPE = dlpack_struct.ROCM if IS_HIP else dlpack_struct.CUDA
DEFAULT_STREAM = 0 if IS_HIP else 1  # as DLPack names it
OUT_OF_MEMORY = "hipErrorOutOfMemory" if IS_HIP else "CUDA_ERROR_OUT_OF_MEMORY"
# No event stands for the whole device, so the fence waits for the device. It is taken where
# waiting is allowed alone: by trim(wait=True), and by growth that gets no memory otherwise.
FENCE_WAITS = IS_HIP
# What HIP calls by another name than CUDA's with "hip" before it.
HIP_NAMES = {
    "cuCtxSynchronize": "hipDeviceSynchronize",
    "cuEventCreate": "hipEventCreateWithFlags",
    "cuLaunchKernel": "hipModuleLaunchKernel",
    "cuMemAlloc": "hipMalloc",
    "cuMemFree": "hipFree",
    "cuStreamCreate": "hipStreamCreateWithFlags",
}
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with the legacy default stream
NOT_READY = 600

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_context = None


@functools.cache
def load():
    return ctypes.CDLL(LIBRARY)


def driver_name(name):
    """What the driver that is tested calls CUDA's call of that name."""
    if not IS_HIP:
        return name
    name = name.removesuffix("_v2")
    return HIP_NAMES.get(name, f"hip{name[2:]}")


def call(name, *args):
    """One driver call; a failure is a RuntimeError with the driver's code."""
    code = getattr(load(), driver_name(name))(*args)
    if code:
        raise RuntimeError(f"{name} failed with {code}")


@contextlib.contextmanager
def context():
    """The primary context of device 0, current on this thread for the while; of HIP, device 0."""
    global _context
    if IS_HIP:
        before = ctypes.c_int()
        call("cuInit", 0)
        call("cuGetDevice", ctypes.byref(before))
        call("cuSetDevice", 0)
        try:
            yield
        finally:
            call("cuSetDevice", before)
        return
    if _context is None:
        call("cuInit", 0)
        primary = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), 0)
        _context = primary
    call("cuCtxPushCurrent_v2", _context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def current_context():
    """The thread's context; its device's number in HIP."""
    if IS_HIP:
        device = ctypes.c_int()
        call("cuGetDevice", ctypes.byref(device))
        return device.value
    current = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    return current.value


def synchronize():
    with context():
        call("cuCtxSynchronize")


def free_bytes():
    """Device memory that nobody holds, of this process or another."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with context():
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Stream:
    """A stream; `int(stream)` is its handle. Lives until close()."""

    def __init__(self, flags=NON_BLOCKING):
        self.handle = ctypes.c_void_p()
        with context():
            call("cuStreamCreate", ctypes.byref(self.handle), flags)

    def __int__(self):
        return self.handle.value

    def synchronize(self):
        with context():
            call("cuStreamSynchronize", self.handle)

    def is_done(self):
        with context():
            code = getattr(load(), driver_name("cuStreamQuery"))(self.handle)
        if code not in (0, NOT_READY):
            raise RuntimeError(f"cuStreamQuery failed with {code}")
        return code == 0

    def close(self):
        with context():
            call("cuStreamSynchronize", self.handle)
            call("cuStreamDestroy_v2", self.handle)


class Capture:
    """What is submitted to a stream within the block becomes a graph, in the mode of
    torch.cuda.graph: nothing unsafe on any thread meanwhile."""

    def __init__(self, stream):
        self._stream = stream
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()

    def __enter__(self):
        with context():
            call("cuStreamBeginCapture_v2", self._stream.handle, 0)
        return self

    def __exit__(self, *exception):
        with context():
            call("cuStreamEndCapture", self._stream.handle, ctypes.byref(self._graph))
            arguments = ctypes.byref(self._executable), self._graph, ctypes.c_ulonglong(0)
            call("cuGraphInstantiateWithFlags", *arguments)

    def launch(self, stream):
        with context():
            call("cuGraphLaunch", self._executable, stream.handle)

    def close(self):
        with context():
            call("cuGraphExecDestroy", self._executable)
            call("cuGraphDestroy", self._graph)


class Gate:
    """Work on a stream that is not done until open() is called: `with Gate(stream) as g`."""

    def __init__(self, stream):
        self._event = threading.Event()
        # Not for ever, so that a test which fails does not hang.
        self._callback = _HostFunction(lambda _: self._event.wait(60) and None)
        with context():
            call("cuLaunchHostFunc", ctypes.c_void_p(int(stream)), self._callback, None)

    def open(self):
        self._event.set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.open()
        synchronize()


class DeviceArray:
    """Device memory with the contents of a NumPy array, strides included."""

    def __init__(self, array):
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self._memory = ctypes.c_void_p()
        self.n_bytes = max(array.nbytes, 1)
        with context():
            call("cuMemAlloc_v2", ctypes.byref(self._memory), ctypes.c_size_t(self.n_bytes))
        self.pointer = self._memory.value
        self.set(array)

    def set(self, array):
        write(self.pointer, self.strides, array)

    def get(self):
        return read(self.pointer, self.shape, self.strides, self.dtype)

    def copy_from(self, other, stream):
        """Copy the bytes of another, or at an address, on a stream."""
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        address = getattr(other, "pointer", other)
        with context():
            call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_void_p(self.pointer),
                ctypes.c_void_p(address),
                ctypes.c_size_t(n_bytes),
                ctypes.c_void_p(int(stream)),
            )

    def free(self):
        """Give the memory back, once nothing reads it any more."""
        with context():
            call("cuCtxSynchronize")
            call("cuMemFree_v2", self._memory)


class Interface:
    """Device memory of someone, through __cuda_array_interface__; names `stream` there."""

    def __init__(self, pointer, shape, strides, dtype, stream=None):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "strides": strides,
            "typestr": dtype.str,
            "data": (pointer, False),
            "version": 3,
            "stream": None if stream is None else int(stream),
        }


class InterfaceArray(DeviceArray, Interface):
    """The same with memory of its own."""

    def __init__(self, array, stream=None):
        DeviceArray.__init__(self, array)
        Interface.__init__(self, self.pointer, self.shape, self.strides, self.dtype, stream)


class CapsuleArray(DeviceArray):
    """Exports through DLPack alone; `producer.asked_streams` is what it was asked."""

    def __init__(self, array):
        super().__init__(array)
        device = (DLPACK_TYPE, 0)
        self.producer = dlpack_struct.Producer(
            self.pointer, self.shape, self.strides, self.dtype, device
        )

    def __dlpack_device__(self):
        return self.producer.__dlpack_device__()

    def __dlpack__(self, **arguments):
        return self.producer.__dlpack__(**arguments)


class TableArray(DeviceArray, dlpack_struct.Tabled):
    """Is read by the exchange table of its type; Tabled.current_stream is the producer's."""

    def __init__(self, array):
        DeviceArray.__init__(self, array)
        dlpack_struct.Tabled.__init__(
            self, self.pointer, self.shape, self.strides, self.dtype, (DLPACK_TYPE, 0)
        )


def _pieces(shape, strides, itemsize):
    """The dense pieces of a strided array: (index of the piece, byte offset, bytes). The
    index counts in an array whose dimensions are ordered by stride."""
    dims = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    n_bytes, inner = itemsize, len(dims)
    while inner and (strides[dims[inner - 1]] == n_bytes or shape[dims[inner - 1]] == 1):
        inner -= 1
        n_bytes *= shape[dims[inner]]
    outer = dims[:inner]
    for index in itertools.product(*(range(shape[dim]) for dim in outer)):
        yield index, sum(i * strides[dim] for i, dim in zip(index, outer, strict=True)), n_bytes


def _in_memory_order(array, strides):
    return array.transpose(sorted(range(array.ndim), key=lambda dim: (-strides[dim], dim)))


def read(pointer, shape, strides, dtype):
    """A copy of device memory as a NumPy array, once all submitted work is done. Only
    the elements are read, not what lies between them."""
    strides = tuple(strides)
    out = np.empty(shape, dtype)
    if out.size == 0:
        return out
    ordered = np.empty(_in_memory_order(out, strides).shape, dtype)
    with context():
        call("cuCtxSynchronize")
        for index, offset, n_bytes in _pieces(shape, strides, out.itemsize):
            call(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(ordered[(*index, ...)].ctypes.data),
                ctypes.c_void_p(pointer + offset),
                ctypes.c_size_t(n_bytes),
            )
    _in_memory_order(out, strides)[...] = ordered
    return out


def write(pointer, strides, array):
    """Copy a NumPy array to device memory with these strides, now."""
    if array.size == 0:
        return
    strides = tuple(strides)
    ordered = np.ascontiguousarray(_in_memory_order(array, strides))
    with context():
        call("cuCtxSynchronize")
        for index, offset, n_bytes in _pieces(array.shape, strides, array.itemsize):
            call(
                "cuMemcpyHtoD_v2",
                ctypes.c_void_p(pointer + offset),
                ctypes.c_void_p(ordered[(*index, ...)].ctypes.data),
                ctypes.c_size_t(n_bytes),
            )
        call("cuCtxSynchronize")
