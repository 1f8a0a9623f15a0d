"""HIP without a device: the interface that is declared, and the kernels that are built."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "build/append.hipfb"
SIMULATOR = ROOT / "build/sim/libamdhip64.so"
NAMES = (
    "vmm_append_kernel",
    "vmm_append_kernel_wide",
    "vmm_append_kernel_pieces",
    "vmm_append_kernel_cursor",
    "vmm_cursor_kernel",
)
ARCHITECTURES = {"gfx90a", "gfx942"}


def run(*command, **options):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_interface_is_that_of_the_headers():
    """hip_abi.h has the values, layouts and signatures of AMD's header."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    headers = subprocess.run(
        [compiler, "-E", "-x", "c++", "-"],
        input="#if !__has_include(<hip/hip_runtime_api.h>)\n#error none\n#endif\n",
        capture_output=True,
        text=True,
    )
    if headers.returncode:
        pytest.skip("no HIP headers: apt install libamdhip64-dev")
    run(compiler, "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", "tests/hip/abi.cc")


def code_objects():
    """What clang has bundled: {architecture: code object}."""
    if not KERNELS.exists():
        pytest.skip("not built by make in this folder")
    bundle = KERNELS.read_bytes()
    if not bundle:
        pytest.skip("no HIP compiler when libvmm was built")
    magic = b"__CLANG_OFFLOAD_BUNDLE__"
    assert bundle.startswith(magic)
    (count,) = struct.unpack_from("<Q", bundle, len(magic))
    at, found = len(magic) + 8, {}
    for _ in range(count):
        offset, n_bytes, length = struct.unpack_from("<QQQ", bundle, at)
        target = bundle[at + 24 : at + 24 + length].decode()
        at += 24 + length
        if target.startswith("hip"):
            found[target.rpartition("-")[2]] = bundle[offset : offset + n_bytes]
    return found


def test_kernels_are_there_for_each_architecture():
    objects = code_objects()
    asked = set(os.environ.get("HIP_ARCHS", "").split()) or ARCHITECTURES
    assert set(objects) == asked
    for code in objects.values():
        assert code.startswith(b"\x7fELF")
        assert struct.unpack_from("<H", code, 18) == (224,)  # EM_AMDGPU
        for name in NAMES:
            assert name.encode() + b"\0" in code


def test_kernels_by_the_disassembler(tmp_path):
    """Sixteen bytes at a time, nothing spilled, arguments in the segment for kernels."""
    objects = code_objects()
    tools = {}
    for tool in ("llvm-objdump", "llvm-readobj"):
        names = (*(f"{tool}-{version}" for version in range(22, 16, -1)), tool)
        tools[tool] = next(filter(None, map(shutil.which, names)), None)
        if not tools[tool]:
            pytest.skip(f"no {tool}")
    for architecture, code in objects.items():
        path = tmp_path / f"{architecture}.o"
        path.write_bytes(code)
        symbols = run(tools["llvm-readobj"], "--dyn-symbols", path)
        for name in NAMES:
            assert f"Name: {name}\n" in symbols or f"Name: {name} " in symbols
            assert f"Name: {name}.kd" in symbols  # the descriptor, which a launch looks for
        notes = run(tools["llvm-readobj"], "--notes", path)
        assert architecture in notes
        assert notes.count(".private_segment_fixed_size: 0") == len(NAMES)
        assert notes.count(".vgpr_spill_count: 0") == len(NAMES)
        listing = run(tools["llvm-objdump"], "-d", path)
        assert "load_dwordx4" in listing and "store_dwordx4" in listing


def test_library_without_kernels_says_how_to_have_them(tmp_path):
    """Linked anew with an empty image, as where there was no HIP compiler."""
    objects = sorted((ROOT / "build/obj").glob("*.o"))
    if not objects or not SIMULATOR.exists() or not shutil.which("gcc"):
        pytest.skip("not built by make in this folder")
    empty, image, library = tmp_path / "empty", tmp_path / "image.o", tmp_path / "libvmm.so"
    empty.touch()
    run(
        *("gcc", "-c", "-o", image, "libvmm/src/append_image.S"),
        *(f'-DVMM_APPEND_{name}="{path}"' for name, path in (("FATBIN", empty), ("HIPFB", empty))),
        '-DVMM_APPEND_PTX="libvmm/src/append.ptx"',
    )
    others = [path for path in objects if path.name != "append_image.o"]
    run("gcc", "-shared", "-pthread", "-o", library, *others, image, "-ldl")
    program = f"""
import ctypes
vmm = ctypes.CDLL({str(library)!r})
device = ctypes.c_void_p()
status = vmm.vmm_device_open(b"hip:0", ctypes.byref(device))
vmm.vmm_status_name.restype = ctypes.c_char_p
class Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("code", ctypes.c_int),
                ("operation", ctypes.c_char_p), ("message", ctypes.c_char * 512)]
vmm.vmm_last_error.restype = ctypes.POINTER(Error)
print(vmm.vmm_status_name(status).decode(), vmm.vmm_last_error().contents.message.decode())
"""
    clean = {k: v for k, v in os.environ.items() if k != "VMM_HIP_KERNELS"}
    said = run(sys.executable, "-c", program, env={**clean, "VMM_HIP_LIBRARY": str(SIMULATOR)})
    assert said.startswith("VMM_ERR_UNSUPPORTED libvmm was built without a HIP compiler")
    assert "VMM_HIP_KERNELS" in said
