"""100 000 appends of one row, then 1 000 of 1 to 300 rows: the address, the contents, the
slack, and the driver's calls."""

import itertools

import numpy as np
import pytest

import cuda_helper
import pyvmm
from model import LAYOUTS, lane_count, lane_row_bytes, pattern, same
from support import calls, calls_since, smallest_block, to_numpy

N_SINGLE, N_RAGGED = 100_000, 1_000
RAGGED = np.random.default_rng(2).integers(1, 301, N_RAGGED)
N_ROWS = N_SINGLE + int(RAGGED.sum())
SHAPE, AXIS, DTYPE = (4, 0, 8), 1, "float32"  # four lanes under "lane" and "c"


class Source:
    """All rows, in the memory of the device; its slices are what is appended."""

    def __init__(self, device):
        self.array = pattern((4, N_ROWS, 8), DTYPE)
        self.on_gpu = device != "host"
        if self.on_gpu:
            self.memory = cuda_helper.DeviceArray(self.array)

    def __getitem__(self, rows):
        part = self.array[:, rows]
        if not self.on_gpu:
            return part
        address = self.memory.pointer + rows.start * part.strides[1]
        return cuda_helper.Interface(address, part.shape, part.strides, part.dtype)

    def close(self):
        if self.on_gpu:
            self.memory.free()


@pytest.fixture(scope="module")
def sources():
    made = {}
    yield lambda device: made.setdefault(device, Source(device))
    for source in made.values():
        source.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_append(layout, device, sources, pool):
    source, block = sources(device), smallest_block(device)
    lane_row = lane_row_bytes(SHAPE, DTYPE, AXIS, layout)
    n_lanes = lane_count(SHAPE, AXIS, layout)
    copy = "launch" if device != "host" else "copy"

    def check_slack():
        in_use = t.length * lane_row
        mapped = t.stats()["mapped_bytes"] // n_lanes
        assert in_use <= mapped
        assert mapped - in_use <= in_use / 8 + block

    spec = {"axis": AXIS, "capacity": N_ROWS, "layout": layout, "pool": pool}
    with pyvmm.empty(SHAPE, DTYPE, **spec) as t:
        address = t.ptr
        for row in range(N_SINGLE):
            t.append(source[row : row + 1])
            if row % 1000 == 0:
                assert t.ptr == address
                check_slack()
        assert same(to_numpy(t), source.array[:, :N_SINGLE])
        stops = list(itertools.accumulate(RAGGED.tolist(), initial=N_SINGLE))
        for start, stop in itertools.pairwise(stops):
            t.append(source[start:stop])
            assert t.ptr == address
            check_slack()
        assert t.length == N_ROWS
        assert same(to_numpy(t), source.array)
        # One copy for each append, and what each new block costs. Nothing else.
        made, n_blocks = calls(t), t.stats()["block_count"]
        assert made.pop(copy) == N_SINGLE + N_RAGGED
        assert made.pop("reserve") == 1
        assert made.pop("create") == made.pop("map") == n_blocks
        assert made.pop("set_access") <= n_blocks
        assert made == {}
        # About as few blocks as the bound allows: eight for each doubling of a lane.
        doublings = np.log2(max(2, t.stats()["mapped_bytes"] / n_lanes / block))
        assert n_blocks <= n_lanes * 12 * (doublings + 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_append_within_mapped_rows(layout, device, sources, pool):
    """Nothing but the copy, however many rows; and nothing at all for grow."""
    source = sources(device)
    copy = "launch" if device != "host" else "copy"
    n_rows = 20_000
    spec = {"axis": AXIS, "capacity": n_rows, "layout": layout, "pool": pool}
    with pyvmm.empty(SHAPE, DTYPE, **spec) as t:
        t.map(n_rows)
        address = t.ptr
        t.append(source[0:1])
        before = calls(t)
        for row in range(1, 10_000):
            t.append(source[row : row + 1])
        assert calls_since(before, t) == {copy: 9_999}
        before = calls(t)
        for _ in range(10_000):
            t.grow(1)
        assert calls_since(before, t) == {}
        assert t.length == t.mapped == n_rows
        assert t.ptr == address
        assert same(to_numpy(t[:10_000]), source.array[:, :10_000])
