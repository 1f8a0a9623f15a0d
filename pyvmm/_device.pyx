# cython: language_level=3, embedsignature=True
"""Devices by name, and what is known of them."""

import re

from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    VMM_DEVICE_CUDA,
    VMM_DEVICE_HIP,
    VMM_DEVICE_HOST,
    VMM_ERR_NO_DEVICE,
    VMM_ERR_NO_DRIVER,
    VMM_ERR_UNSUPPORTED,
    VMM_OK,
    VMM_VERSION_MAJOR,
    VMM_VERSION_MINOR,
    vmm_device,
    vmm_device_close,
    vmm_device_info,
    vmm_device_open,
    vmm_device_query,
    vmm_status,
    vmm_version,
)

cdef object _GPU = re.compile(r"(cuda|hip)(?::(\d{1,4}))?", re.ASCII)
cdef dict _KINDS = {VMM_DEVICE_HOST: "host", VMM_DEVICE_CUDA: "cuda", VMM_DEVICE_HIP: "hip"}


def library_version():
    """The version of the libvmm.so that is loaded, "0.1.0".

    Raises ImportError where it is not the one that pyvmm was built with."""
    cdef int version = vmm_version()
    major, minor, patch = version // 10000, version // 100 % 100, version % 100
    if (major, minor) != (VMM_VERSION_MAJOR, VMM_VERSION_MINOR):
        raise ImportError(
            f"pyvmm was built for libvmm {VMM_VERSION_MAJOR}.{VMM_VERSION_MINOR} and has found "
            f"libvmm {major}.{minor}: build it anew"
        )
    return f"{major}.{minor}.{patch}"


cdef str canonical_name(object device):
    """ "host", "cuda:N" or "hip:N". """
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'host' or 'cuda:0', "
                        f"not {type(device).__name__}")
    if device == "host" or device == "cpu":
        return "host"
    match = _GPU.fullmatch(device)
    if match is None:
        raise ValueError(f"unknown device '{device}': known are 'host' (or 'cpu'), 'cuda:N' and "
                         "'hip:N'")
    return f"{match[1]}:{int(match[2] or 0)}"


cdef vmm_device *open_device(str name) except NULL:
    cdef bytes encoded = name.encode()
    cdef const char *text = encoded
    cdef vmm_device *device
    cdef vmm_status status
    with nogil:
        status = vmm_device_open(text, &device)
    check(status)
    return device


def devices():
    """The names of the devices that pyvmm can use here: "host", then "cuda:0" and so on, then
    "hip:0" and so on.

    Opens each of them, which creates the primary context of a GPU. Raises VMMError where a
    GPU's driver is there and fails."""
    cdef bytes name
    cdef const char *text
    cdef vmm_device *device
    cdef vmm_status status
    names = ["host"]
    for kind in ("cuda", "hip"):
        for index in range(10_000):
            candidate = f"{kind}:{index}"
            name = candidate.encode()
            text = name
            with nogil:
                status = vmm_device_open(text, &device)
                if status == VMM_OK:
                    vmm_device_close(device)
            if status == VMM_ERR_NO_DRIVER or status == VMM_ERR_NO_DEVICE:
                break
            if status != VMM_ERR_UNSUPPORTED:
                check(status)
                names.append(candidate)
    return names


def device_info(device):
    """What is known of a device, as a dict.

    kind ("host", "cuda" or "hip"), index, name, description, granularity_bytes, recommended_bytes,
    reservable_bytes (the largest single reservation), free_bytes, total_bytes,
    driver_version (13000 for CUDA 13.0, 60342134 for HIP 6.3.42134; 0 on the host),
    exportable_handles (bool), kernel (which form of the append kernel is used: "fatbin", "ptx",
    "hipfb" or "memcpy").

    Makes a dozen driver calls. Raises ValueError (a name of another form) and VMMError (no
    driver, no such device, a failure of the driver), which says why."""
    cdef vmm_device_info info
    cdef vmm_status status
    cdef vmm_device *handle = open_device(canonical_name(device))
    with nogil:
        status = vmm_device_query(handle, &info)
        vmm_device_close(handle)
    check(status)
    return {
        "kind": _KINDS[info.kind],
        "index": info.index,
        "name": info.name.decode(),
        "description": info.description.decode("utf-8", "replace"),
        "granularity_bytes": info.granularity_bytes,
        "recommended_bytes": info.recommended_bytes,
        "reservable_bytes": info.reservable_bytes,
        "free_bytes": info.free_bytes,
        "total_bytes": info.total_bytes,
        "driver_version": info.driver_version,
        "exportable_handles": bool(info.exportable_handles),
        "kernel": info.kernel.decode(),
    }
