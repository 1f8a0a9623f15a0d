"""libvmm from Python by ctypes alone: reserve, append, read back. The structs are vmm.h's."""

import ctypes
from ctypes import byref, c_int64, c_void_p, cast

Int, Size, Dims = ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(c_int64)


def struct(**fields):
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields.items())})


Dtype = struct(code=ctypes.c_uint8, bits=ctypes.c_uint8, lanes=ctypes.c_uint16)
Spec = struct(
    ndim=Int, shape=Dims, axis=Int, dtype=Dtype, capacity=Size, layout=Int, block=Size, zero=Int
)
Array = struct(data=c_void_p, memory=Int, gpu=Int, dtype=Dtype, ndim=Int, shape=Dims, strides=Dims)
vmm = ctypes.CDLL("libvmm.so.0")
vmm.vmm_status_text.restype, vmm.vmm_base.restype = ctypes.c_char_p, c_void_p


def check(status):
    if status:
        raise RuntimeError(vmm.vmm_status_text(status).decode())


device, pool, tensor, float32 = c_void_p(), c_void_p(), c_void_p(), Dtype(2, 32, 1)
check(vmm.vmm_device_open(b"host", byref(device)))
check(vmm.vmm_pool_create(device, Size(0), Size(0), byref(pool)))
spec = Spec(ndim=2, shape=(c_int64 * 2)(0, 4), dtype=float32, capacity=1_000_000)
check(vmm.vmm_reserve(pool, byref(spec), byref(tensor)))
for i in range(1000):
    row = (ctypes.c_float * 4)(i, i + 0.25, i + 0.5, i + 0.75)
    source = Array(cast(row, c_void_p), 0, 0, float32, 2, (c_int64 * 2)(1, 4), None)
    check(vmm.vmm_append(tensor, byref(source), None))
data = cast(vmm.vmm_base(tensor), ctypes.POINTER(ctypes.c_float * 4))
print("row 999 is", list(data[999]), "at", hex(vmm.vmm_base(tensor)))
check(vmm.vmm_close(tensor) or vmm.vmm_pool_close(pool))
vmm.vmm_device_close(device)
