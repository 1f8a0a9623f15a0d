"""What a growing tensor ought to be, in NumPy, and what its layouts ought to look like."""

import math

import numpy as np

LAYOUTS = ("seq", "lane", "c")


class Model:
    """A growing tensor as plain NumPy: every growth is a concatenation."""

    def __init__(self, shape, dtype, axis, capacity):
        self.axis, self.capacity = axis, capacity
        shape = list(shape)
        shape[axis] = 0
        self.array = np.empty(shape, dtype)

    @property
    def length(self):
        return self.array.shape[self.axis]

    def fits(self, n_rows):
        return self.length + n_rows <= self.capacity

    def append(self, rows):
        assert self.fits(rows.shape[self.axis])
        self.array = np.concatenate([self.array, rows], axis=self.axis)

    def rows(self, start, stop):
        return self.array[(slice(None),) * self.axis + (slice(start, stop),)]

    def truncate(self, n_rows):
        self.array = self.rows(0, n_rows).copy()

    def fork(self, n_rows):
        other = Model(self.array.shape, self.array.dtype, self.axis, self.capacity)
        other.array = self.rows(0, n_rows).copy()
        return other


def pattern(shape, dtype, seed=0):
    """An array whose bytes are random, and the same for the same seed."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.random.default_rng(seed).integers(0, 2, shape).astype(np.bool_)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


def same(left, right):
    """Equal in shape, dtype and every bit; so NaNs are equal to themselves."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.tobytes() == right.tobytes()


def dims_in_memory(ndim, axis, layout):
    """The dimensions from the outermost in memory to the innermost, and how many of the
    first ones are lanes."""
    if layout == "seq":
        return [axis] + [dim for dim in range(ndim) if dim != axis], 0
    if layout == "lane" and axis > 0:
        return [0, axis] + [dim for dim in range(1, ndim) if dim != axis], 1
    if layout == "c":
        return list(range(ndim)), axis
    return list(range(ndim)), 0


def lane_count(shape, axis, layout):
    dims, n_lane_dims = dims_in_memory(len(shape), axis, layout)
    return math.prod(shape[dim] for dim in dims[:n_lane_dims])


def lane_row_bytes(shape, dtype, axis, layout):
    """Bytes of one row within one lane."""
    row = math.prod(size for dim, size in enumerate(shape) if dim != axis)
    return row * np.dtype(dtype).itemsize // lane_count(shape, axis, layout)


def expected_strides(shape, dtype, axis, layout, lane_bytes):
    """Strides in bytes of a tensor whose lanes are `lane_bytes` apart."""
    dims, n_lane_dims = dims_in_memory(len(shape), axis, layout)
    strides = [0] * len(shape)
    step = np.dtype(dtype).itemsize
    for dim in reversed(dims[n_lane_dims:]):
        strides[dim] = step
        step *= shape[dim]
    step = lane_bytes
    for dim in reversed(dims[:n_lane_dims]):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)
