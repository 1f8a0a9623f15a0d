"""Random sequences of operations against the NumPy model: see machine.py.

2 000 steps, the same each time; `make soak` takes many more, and never the same.
"""

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

from conftest import DEVICES  # noqa: E402
from machine import Machine  # noqa: E402

STEPS = 2000
SETTINGS = settings(
    max_examples=STEPS // 50,
    phases=[Phase.generate],
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", DEVICES)
def test_random_operations(name):
    machine = type("Machine", (Machine,), {"device": name})
    run_state_machine_as_test(machine, settings=SETTINGS)
