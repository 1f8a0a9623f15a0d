"""The custom operator that appends in place, for Paddle's static programs and to_static.

    @paddle.jit.to_static
    def step(keys, new):                              # keys: (tokens, batch, heads, dim)
        return pyvmm.paddle_op.concat(keys, new)      # memory of `keys`, one row longer

`concat(cache, rows, axis)` is paddle.concat([cache, rows], axis) in value, in eager mode, in
to_static and in static programs, in while loops too. It appends where `cache` is the result
of the last one, whoever made it: the operator, `pyvmm.paddle.concat` or a VTensor.

The growth axis must be the outermost in memory: keep caches as (tokens, batch, heads, dim)
with axis 0; with a batch of 1, axis 1 of (1, tokens, heads, dim) is as good. Paddle makes
the inputs of an operator contiguous by a hidden copy, and the kernels of its static executor
read memory without strides, so with any other order there is no right way to hand over such
a cache, and it is refused.

Paddle's executor lets an operation overwrite an input that is not used again, and does not know
that a longer cache is in the same memory. So `load()` switches that off for the programs that
are made after it, in the whole process: FLAGS_pir_apply_inplace_pass becomes False. An
inference program in C++ sets the flag itself.

The operator is compiled by paddle.utils.cpp_extension when it is first used, for this Paddle
and this libvmm, which takes a C++ compiler and about 20 seconds; PADDLE_EXTENSION_DIR says
where the result is kept. A program that was saved by paddle.jit.save needs `load()` before it
is loaded; an inference program in C++ loads the file that `library()` names.
"""

# mypy: disable-error-code="no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from operator import index
from typing import Any

try:
    import paddle
except ImportError as error:
    raise ImportError("pyvmm.paddle_op needs Paddle: pip install 'pyvmm[paddle]'") from error
from paddle.jit.marker import unified
from paddle.utils import cpp_extension

import pyvmm

__all__ = ["CAPACITY", "concat", "library", "load", "stats", "use_pool"]

# Rows of address space for what the operator takes in, where the caller says nothing.
CAPACITY = 65536

_HERE = os.path.dirname(os.path.abspath(__file__))
_SOURCE = os.path.join(_HERE, "concat.cc")
_LIBVMM = "libvmm.so.0"

_lock = threading.Lock()
_extension: Any = None
_pooled: set[str] = set()  # devices whose pool the operator has been told
os.register_at_fork(after_in_child=_pooled.clear)


@unified  # to_static calls it and does not translate it
def concat(cache: Any, rows: Any, axis: int = 0, *, capacity: int = CAPACITY) -> Any:
    """paddle.concat([cache, rows], axis) in value, by an append where `cache` allows it.

    cache:    a tensor, or a variable of a program, whose dimensions before `axis` are 1
    rows:     what is appended: of the same dtype, place and, but for the axis, shape
    capacity: rows of address space where the cache has to be copied into a new tensor;
              past it that happens again, to at least twice the size

    Earlier results stay what they were. Threads may go on from one cache at once if all of them
    do it by this operator. No gradient passes through: in eager mode tensors
    that require one are refused with a RuntimeError. Otherwise raises ValueError, TypeError,
    MemoryError, and RuntimeError where the operator cannot be built."""
    ndim = len(cache.shape)
    axis = index(axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} of a cache with {ndim} dimensions")
    axis %= ndim
    capacity = index(capacity)
    if capacity < 0:
        raise ValueError(f"a capacity of {capacity} rows")
    before = [size for size in cache.shape[:axis] if size not in (1, -1)]
    if before:
        raise ValueError(
            f"axis {axis} of a cache of shape {list(cache.shape)} is not the outermost in "
            "memory, so it cannot grow in place: keep the cache as (tokens, batch, heads, dim) "
            "and give axis 0"
        )
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled():
        if not (cache.stop_gradient and rows.stop_gradient):
            raise RuntimeError(
                "pyvmm.paddle_op.concat passes no gradient: call it under paddle.no_grad()"
            )
    load()
    _share_pool(_device_of(cache))
    return paddle._C_ops._run_custom_op("vmm_concat", cache, rows, axis, capacity)[0]


def stats() -> dict[str, int]:
    """How often the operator did what, in this process: appended in place; forked an older
    view; moved to a larger reservation; taken in an ordinary tensor; left to Paddle, since a
    size that the program did not know turned out to stand before the axis. All but the
    first copied the cache."""
    names = "appended", "forked", "moved", "taken_in", "left"
    return dict(zip(names, load().counts(), strict=True))


def use_pool(pool: pyvmm.Pool) -> None:
    """From now on, take the memory for new tensors on the pool's device from this pool. It
    cannot be closed before another has taken its place."""
    extension = load()
    # By a tensor of it, which the operator then holds.
    member = pyvmm.empty((0,), "uint8", axis=0, capacity=1, device=pool.device, pool=pool)
    extension.use_pool_of(pool.device, member.ptr)
    _pooled.add(pool.device)


def library() -> str:
    """The file of the operator, built if need be."""
    path: str = load().__file__
    return path


def load() -> Any:
    """Build the operator, if that has not been done on this machine, and load it. Returns the
    extension module. Raises RuntimeError where it cannot be built."""
    global _extension
    if _extension is None:
        with _lock:
            if _extension is None:
                extension = _load(_built())
                paddle.set_flags({"FLAGS_pir_apply_inplace_pass": False})  # see above
                _extension = extension
    return _extension


def loaded() -> Any:
    """The extension module, or None before load()."""
    return _extension


def _load(path: str) -> Any:
    cpp_extension.load_op_meta_info_and_register_op(path)
    name = os.path.splitext(os.path.basename(path))[0]
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _device_of(cache: Any) -> str:
    if paddle.in_dynamic_mode():
        place = cache.place
        return f"cuda:{place.gpu_device_id()}" if place.is_gpu_place() else "host"
    # Where the program will run is not known yet; most likely here.
    device: str = paddle.device.get_device()
    return "host" if device == "cpu" else device.replace("gpu", "cuda")


def _share_pool(device: str) -> None:
    """New tensors come from pyvmm's default pool, unless use_pool() has said otherwise."""
    if device not in _pooled:
        use_pool(pyvmm.default_pool(device))


# ---- building -------------------------------------------------------------------------------


def _built() -> str:
    """The path of the shared library for this source, libvmm and Paddle; compiled if it is not
    there yet. Several processes may ask at once."""
    library = os.path.join(os.path.dirname(_HERE), _LIBVMM)
    header = os.path.join(pyvmm.get_include(), "vmm.h")
    wanted = hashlib.sha256()
    for path in (_SOURCE, header):
        with open(path, "rb") as file:
            wanted.update(file.read())
    for what in (library, paddle.__version__, paddle.version.commit, sys.version):
        wanted.update(str(what).encode())
    name = f"pyvmm_paddle_op_{wanted.hexdigest()[:16]}"
    root = os.path.join(cpp_extension.get_build_directory(), name)
    target = os.path.join(root, name, name + ".so")
    if os.path.exists(target):
        return target
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(target):
            _compile(name, root, library)
    return target


def _compile(name: str, root: str, library: str) -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not shutil.which(compiler):
        raise RuntimeError(
            f"Paddle's operators are compiled where they are used, and there is no {compiler} "
            "here: install g++ (apt install g++), or name another compiler in CXX"
        )
    folder = os.path.dirname(library)
    options = {
        "name": name,
        "sources": [_SOURCE],
        "build_directory": root,
        "extra_cxx_cflags": ["-O2", "-g0", "-fvisibility=hidden"],
        "extra_include_paths": [pyvmm.get_include()],
        "extra_ldflags": [f"-L{folder}", f"-l:{os.path.basename(library)}", f"-Wl,-rpath,{folder}"],
    }
    # In a process of its own: it prints, and changes how this one logs.
    code = f"from paddle.utils import cpp_extension; cpp_extension.load(**{options!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        said = (result.stdout + result.stderr)[-4000:]
        raise RuntimeError(
            f"Paddle's operator could not be built; the end of what was said:\n{said}"
        )
