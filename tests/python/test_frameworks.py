"""Whose GPUs a framework's "cuda" devices are, by builds of them that need not be here."""

from types import SimpleNamespace

import pytest

from pyvmm._frameworks import gpu_kind, gpu_name


def torch(hip):
    return SimpleNamespace(__name__="torch", version=SimpleNamespace(hip=hip))


def cupy(is_hip):
    runtime = SimpleNamespace(is_hip=is_hip)
    return SimpleNamespace(__name__="cupy", cuda=SimpleNamespace(runtime=runtime))


def paddle(is_hip):
    return SimpleNamespace(__name__="paddle", is_compiled_with_rocm=lambda: is_hip)


@pytest.mark.parametrize("build", [torch(None), cupy(False), paddle(False)])
def test_cuda(build):
    assert gpu_kind(build) == "cuda" and gpu_name(build, 1) == "cuda:1"


@pytest.mark.parametrize("build", [torch("6.3.42134"), cupy(True), paddle(True)])
def test_rocm(build):
    assert gpu_kind(build) == "hip" and gpu_name(build, 1) == "hip:1"


@pytest.mark.parametrize("name", ["torch", "cupy", "paddle"])
def test_what_is_installed_can_be_asked(name):
    assert gpu_kind(pytest.importorskip(name)) in ("cuda", "hip")
