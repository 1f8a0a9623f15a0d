"""Tensors that grow in place, on CUDA virtual memory and on the host.

For example:

    t = pyvmm.empty((8, 0, 32, 128), "float16", axis=1, capacity=131072, device="cuda:0")
    t.append(x)                    # any array, any number of rows along axis 1
    keys = torch.from_dlpack(t)    # shares memory, as with NumPy, CuPy, JAX, Paddle

The README is the introduction; help(pyvmm.empty) and help(pyvmm.VTensor) say the rest.
"""

from __future__ import annotations

import os

from pyvmm._append import append_many
from pyvmm._concat import concat, concat_stats
from pyvmm._cursor import Cursor, advance_many
from pyvmm._device import device_info, devices, library_version
from pyvmm._error import CapacityError, OutOfMemoryError, VMMError
from pyvmm._graph_pins import GraphPins
from pyvmm._pool import Pool, default_pool
from pyvmm._tensor import VTensor, empty, map_many
from pyvmm._view import View

__version__ = library_version()

__all__ = [
    "CapacityError",
    "Cursor",
    "GraphPins",
    "OutOfMemoryError",
    "Pool",
    "VMMError",
    "VTensor",
    "View",
    "advance_many",
    "append_many",
    "concat",
    "concat_stats",
    "default_pool",
    "device_info",
    "devices",
    "empty",
    "get_include",
    "map_many",
]


def get_include() -> str:
    """The folder that holds vmm.h, for compiling against libvmm."""
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "include")
    in_place = os.path.join(os.path.dirname(package), "libvmm", "include")
    for folder in (installed, in_place):
        if os.path.exists(os.path.join(folder, "vmm.h")):
            return folder
    raise FileNotFoundError(f"vmm.h is neither in {installed} nor in {in_place}")
