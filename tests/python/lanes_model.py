"""What a tensor whose lanes have lengths of their own ought to be: a list of arrays."""

import numpy as np

from model import same
from support import to_numpy


class Lanes:
    """The lanes of a tensor, each an array of its own; a lane is an index of dimension 0."""

    def __init__(self, shape, dtype, axis, capacity):
        self.axis, self.capacity = axis, capacity
        self.lanes = [np.empty((*shape[1:axis], 0, *shape[axis + 1 :]), dtype)] * shape[0]

    @property
    def lengths(self):
        return tuple(lane.shape[self.axis - 1] for lane in self.lanes)

    def part(self, array, start, stop):
        return array[(slice(None),) * (self.axis - 1) + (slice(start, stop),)]

    def fits(self, lanes, counts):
        return all(
            self.lengths[lane] + n <= self.capacity for lane, n in zip(lanes, counts, strict=True)
        )

    def append(self, x, lanes, counts):
        for rows, lane, n in zip(x, lanes, counts, strict=True):
            both = [self.lanes[lane], self.part(rows, 0, n)]
            self.lanes[lane] = np.concatenate(both, axis=self.axis - 1)

    def truncate(self, lanes, counts):
        for lane, n in zip(lanes, counts, strict=True):
            self.lanes[lane] = self.part(self.lanes[lane], 0, n).copy()

    def check(self, tensor):
        """Each lane is what it should be, and where it is short the rest can be read."""
        assert tensor.lengths == self.lengths
        assert tensor.length == max(self.lengths)
        assert tensor.ragged == (len(set(self.lengths)) > 1)
        assert tensor.length <= tensor.mapped
        whole = to_numpy(tensor)
        for lane, rows in zip(whole, self.lanes, strict=True):
            assert same(np.ascontiguousarray(self.part(lane, 0, rows.shape[self.axis - 1])), rows)
        row_bytes = tensor.nbytes // tensor.length if tensor.length else 0
        used = sum(self.lengths) * row_bytes // len(self.lengths)
        assert tensor.stats()["used_bytes"] == used
