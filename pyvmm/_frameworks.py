"""What frameworks call their devices, and what pyvmm does. Nothing is imported here."""

from __future__ import annotations

import sys
from typing import Any


def gpu_kind(framework: Any) -> str:
    """ "cuda" or "hip": whose GPUs those are that torch, cupy or paddle, the module, calls "cuda".
    Builds for ROCm call AMD's so."""
    if framework.__name__ == "torch":
        is_hip = framework.version.hip is not None
    elif framework.__name__ == "cupy":
        is_hip = framework.cuda.runtime.is_hip
    else:
        is_hip = framework.is_compiled_with_rocm()
    return "hip" if is_hip else "cuda"


def gpu_name(framework: Any, index: int) -> str:
    """pyvmm's name for the GPU of that number of the framework: "cuda:0", "hip:0"."""
    return f"{gpu_kind(framework)}:{index}"


def is_capturing() -> bool:
    """Whether torch, where it is loaded, is capturing a graph on this thread. Its streams do not
    block the default stream, so the library cannot find out by itself."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    # A torch without CUDA has the question, and no answer.
    if cuda is None or not cuda.is_initialized():
        return False
    return bool(cuda.is_current_stream_capturing())
