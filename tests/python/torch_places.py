"""The devices of torch that tests take in turn, "cpu" and "cuda", and the graphs of each."""

import os

import pytest
import torch

from pyvmm import _graphs

torch.set_num_threads(1)  # for such small tensors, threads cost more than they bring


def skip_place(place):
    """Skip the test where this device of torch's is not to be tested."""
    if place == "cpu":
        if os.environ.get("PYVMM_TEST_DEVICE", "host") != "host":
            pytest.skip("the host is tested without PYVMM_TEST_DEVICE")
        return
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's: torch cannot use it")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


def graphs_of(place):
    return _graphs.EagerGraph if place == "cpu" else _graphs.CudaGraph
