"""Random sequences of operations against the NumPy model.

About 2 000 steps, the same each time. PYVMM_TEST_EXAMPLES multiplies them for a longer
search, and has a failing sequence made short, which takes minutes.
"""

import gc
import os

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import numpy as np  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import pyvmm  # noqa: E402
from conftest import DEVICES  # noqa: E402
from model import (  # noqa: E402
    LAYOUTS,
    Model,
    expected_strides,
    lane_count,
    lane_row_bytes,
    pattern,
    same,
)
from support import fill, held, smallest_block, to_numpy  # noqa: E402

EXAMPLES = os.environ.get("PYVMM_TEST_EXAMPLES")
SETTINGS = settings(
    max_examples=40 * int(EXAMPLES or 1),
    phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# A few rows, or a share of the capacity.
sizes = st.one_of(st.integers(0, 5), st.floats(0, 0.6), st.just(1.1))


class GrowingTensor(RuleBasedStateMachine):
    """One tensor and its model, exports and forks of it, in a pool with a budget."""

    device = None

    @initialize(
        shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        axis=st.integers(0, 3),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(["uint8", "float16", "float32", "complex128"]),
        capacity_blocks=st.floats(0, 6),
        n_blocks=st.sampled_from([None, 1, 3]),
        n_budget=st.sampled_from([None, 20]),
        zero=st.booleans(),
    )
    def make(self, shape, axis, layout, dtype, capacity_blocks, n_blocks, n_budget, zero):
        self.axis = axis % len(shape)
        self.shape = (*shape[: self.axis], 0, *shape[self.axis + 1 :])
        self.dtype, self.layout, self.zero = dtype, layout, zero
        self.lanes = lane_count(self.shape, self.axis, layout)
        self.lane_row = lane_row_bytes(self.shape, dtype, self.axis, layout)
        self.block = smallest_block(self.device)
        capacity = 1 + int(capacity_blocks * self.block / self.lane_row)
        self.auto = n_blocks is None
        max_bytes = n_budget and n_budget * self.block
        self.pool = pyvmm.Pool(self.device, max_bytes=max_bytes)
        self.budget = max_bytes or float("inf")
        self.t = pyvmm.empty(
            self.shape,
            dtype,
            axis=self.axis,
            capacity=capacity,
            layout=layout,
            pool=self.pool,
            device=self.device,
            block_size=n_blocks and n_blocks * self.block,
            zero=zero,
        )
        self.model = Model(self.shape, dtype, self.axis, capacity)
        self.address, self.strides = self.t.ptr, self.t.strides
        self.exports, self.forks, self.seed = [], [], 0
        self.fresh = True  # nothing was mapped but what growth needed

    def n_rows(self, size):
        return size if isinstance(size, int) else int(size * self.model.capacity)

    def rows(self, n):
        self.seed += 1
        shape = list(self.shape)
        shape[self.axis] = n
        return pattern(shape, self.dtype, self.seed)

    def pinned(self):
        return max((stop for _, stop in self.exports), default=0)

    def grow_both(self, n, grow, values):
        """Grow tensor and model, unless the capacity or the budget forbids."""
        try:
            grow()
        except pyvmm.CapacityError:
            assert not self.model.fits(n)
        except pyvmm.OutOfMemoryError:
            assert self.budget < float("inf")
        else:
            self.model.append(values)

    # ---- what changes the tensor ----------------------------------------------------

    @rule(size=sizes)
    def append(self, size):
        n = self.n_rows(size)
        x = self.rows(n)
        self.grow_both(n, lambda: self.t.append(x), x)

    @rule(size=sizes)
    def append_in_another_order(self, size):
        n = self.n_rows(size)
        x = np.asfortranarray(self.rows(n))
        if x.ndim > 1 and x.strides[-1] != x.itemsize and x.shape[-1] > 1:
            x = x.swapaxes(0, -1).copy().swapaxes(0, -1)
        try:
            self.grow_both(n, lambda: self.t.append(x), x)
        except ValueError as error:
            assert "dense" in str(error) and x.strides[-1] != x.itemsize

    @rule(size=sizes)
    def grow(self, size):
        n = self.n_rows(size)
        x = self.rows(n)

        def grow_and_write():
            view = self.t.grow(n)
            assert view.shape == x.shape
            if self.zero:
                assert not to_numpy(view).any()
            fill(view, x)

        self.grow_both(n, grow_and_write, x)

    @rule(size=sizes)
    def map(self, size):
        n = self.n_rows(size)
        try:
            self.t.map(n)
        except pyvmm.CapacityError:
            assert n > self.model.capacity
        except pyvmm.OutOfMemoryError:
            assert self.budget < float("inf")
        else:
            assert self.t.mapped >= n
            self.fresh = False

    @rule(share=st.floats(0, 1))
    def truncate(self, share):
        n = int(self.model.length * share)
        try:
            self.t.truncate(n)
        except BufferError:
            assert self.pinned() > n
        else:
            assert self.pinned() <= n or n == self.model.length
            self.fresh &= n == self.model.length
            self.model.truncate(n)

    @rule()
    def trim(self):
        self.t.trim()
        self.fresh = True

    @rule(data=st.data())
    def fork(self, data):
        n = data.draw(st.integers(0, self.model.length))
        try:
            fork = self.t.fork(n)
        except pyvmm.OutOfMemoryError:
            assert self.budget < float("inf")
            return
        model = self.model.fork(n)
        x = self.rows(min(3, model.capacity - n))
        try:
            fork.append(x)
        except pyvmm.OutOfMemoryError:
            assert self.budget < float("inf")
        else:
            model.append(x)
        self.forks.append((fork, model))

    @precondition(lambda self: self.forks)
    @rule()
    def drop_fork(self):
        fork, model = self.forks.pop(0)
        assert same(to_numpy(fork), model.array)
        fork.close()

    # ---- what looks at it -------------------------------------------------------------

    @rule()
    def all_rows(self):
        assert same(to_numpy(self.t), self.model.array)

    @rule(data=st.data())
    def export(self, data):
        stop = data.draw(st.integers(0, self.model.length))
        start = data.draw(st.integers(0, stop))
        view = self.t[start:stop]
        assert same(to_numpy(view), self.model.rows(start, stop))
        # A view without rows pins none.
        self.exports.append((view.__dlpack__(), stop if start < stop else 0))

    @precondition(lambda self: self.exports)
    @rule()
    def drop_export(self):
        self.exports.pop(0)

    @precondition(lambda self: self.exports)
    @rule()
    def close_is_refused(self):
        with pytest.raises(BufferError):
            self.t.close()

    @rule(wait=st.booleans())
    def trim_pool(self, wait):
        self.pool.trim(wait=wait)

    # ---- what always holds -------------------------------------------------------------

    @invariant()
    def last_rows(self):
        if hasattr(self, "t"):
            start, stop = max(0, self.model.length - 50), self.model.length
            assert same(to_numpy(self.t[start:stop]), self.model.rows(start, stop))

    @invariant()
    def shape_and_books(self):
        if not hasattr(self, "t"):
            return
        t, length = self.t, self.model.length
        assert (t.ptr, t.strides) == (self.address, self.strides)
        assert t.shape == self.model.array.shape
        assert t.length == length <= t.mapped <= t.capacity == self.model.capacity
        stats = t.stats()
        assert stats["used_bytes"] == t.nbytes == length * self.lane_row * self.lanes
        assert stats["slack_bytes"] == stats["mapped_bytes"] - stats["used_bytes"]
        lane_bytes = stats["reserved_bytes"] // self.lanes
        assert t.strides == expected_strides(
            self.shape, self.dtype, self.axis, self.layout, lane_bytes
        )
        if self.auto and self.fresh:
            in_use = length * self.lane_row
            assert stats["mapped_bytes"] / self.lanes - in_use <= in_use / 8 + self.block
        books = held(self.pool)
        mapped = stats["mapped_bytes"] + sum(f.stats()["mapped_bytes"] for f, _ in self.forks)
        assert books.get("in_use", 0) == mapped
        assert sum(books.values()) <= self.pool.stats()["peak_bytes"] <= self.budget

    def teardown(self):
        if not hasattr(self, "t"):
            return
        self.exports.clear()
        assert same(to_numpy(self.t), self.model.array)
        for fork, model in self.forks:
            assert same(to_numpy(fork), model.array)
            fork.close()
        self.t.close()
        gc.collect()
        self.pool.close()


@pytest.mark.parametrize("name", DEVICES)
def test_random_operations(name):
    machine = type("GrowingTensor", (GrowingTensor,), {"device": name})
    run_state_machine_as_test(machine, settings=SETTINGS)
