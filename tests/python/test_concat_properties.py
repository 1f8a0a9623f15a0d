"""concat() over random programs of concatenations, of NumPy's arrays (invariant 10)."""

import functools

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import concat_programs  # noqa: E402
import pyvmm  # noqa: E402
from concat_arrays import Uncollected, in_use  # noqa: E402
from conftest import DEVICES  # noqa: E402


@pytest.mark.skipif("host" not in DEVICES, reason="the host is tested without PYVMM_TEST_DEVICE")
@settings(deadline=None, max_examples=100)
@given(
    program=concat_programs.PROGRAMS,
    capacity=st.sampled_from([1, 7, None]),
    layout=st.sampled_from(["seq", "lane", "c"]),
)
def test_invariant_10_of_any_program(program, capacity, layout):
    before = in_use("host")
    with Uncollected():
        concat_programs.run(
            program,
            functools.partial(pyvmm.concat, capacity=capacity, layout=layout),
            make=lambda contents: contents,
            clone=np.copy,
            value=np.asarray,
        )
        assert in_use("host") == before
