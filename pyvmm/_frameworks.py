"""What frameworks call their devices, and what pyvmm does. Nothing is imported here."""

from __future__ import annotations

from typing import Any


def gpu_kind(framework: Any) -> str:
    """ "cuda" or "hip": whose GPUs those are that torch, cupy or paddle, the module, calls "cuda".
    Builds for ROCm call AMD's so."""
    is_hip = {
        "torch": lambda: framework.version.hip is not None,
        "cupy": lambda: framework.cuda.runtime.is_hip,
        "paddle": lambda: framework.is_compiled_with_rocm(),
    }[framework.__name__]()
    return "hip" if is_hip else "cuda"


def gpu_name(framework: Any, index: int) -> str:
    """pyvmm's name for the GPU of that number of the framework: "cuda:0", "hip:0"."""
    return f"{gpu_kind(framework)}:{index}"
