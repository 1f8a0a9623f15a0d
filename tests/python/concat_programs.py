"""Random programs of concatenations, with aliasing, for any framework: each result must be what
the framework's own concatenate gives, at once and for as long as it is kept."""

import numpy as np
from hypothesis import strategies as st

# What a step does with one of the arrays at hand (`which`, counted modulo how many there are).
STEPS = st.one_of(
    st.tuples(st.just("grow"), st.integers(0, 9), st.integers(0, 4), st.integers(-3, 2)),
    st.tuples(st.just("join"), st.integers(0, 9), st.integers(0, 9), st.integers(-3, 2)),
    st.tuples(st.just("slice"), st.integers(0, 9), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("cut off"), st.integers(0, 9), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("swap"), st.integers(0, 9), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("clone"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.integers(0, 9)),
)
PROGRAMS = st.lists(STEPS, min_size=1, max_size=25)
LARGEST = 4000  # elements; a larger operand is left out


def run(program, concat, make, clone, value, dtype="float32"):
    """concat(a, b, axis) and NumPy's concatenate side by side.

    make(contents) gives an array of the framework, value(array) its contents as NumPy's"""
    serial = iter(range(10**9))

    def numbers(shape):
        return (np.arange(int(np.prod(shape))).reshape(shape) + 1000 * next(serial)).astype(dtype)

    first = numbers((2, 3, 2))
    pairs = [(make(first), first)]
    for kind, which, *rest in program:
        array, expected = pairs[which % len(pairs)]
        if kind == "grow":
            n_rows, axis = rest
            shape = list(expected.shape)
            shape[axis] = n_rows
            more = numbers(shape)
            made = concat(array, make(more), axis), np.concatenate((expected, more), axis)
        elif kind == "join":
            other, axis = rest
            new, more = pairs[other % len(pairs)]
            fits = all(
                a == b
                for d, (a, b) in enumerate(zip(expected.shape, more.shape, strict=True))
                if d != axis % 3
            )
            if not fits:
                continue
            made = concat(array, new, axis), np.concatenate((expected, more), axis)
        elif kind in ("slice", "cut off"):
            at, dimension = rest
            size = expected.shape[dimension]
            part = slice(0, max(size - at, 0)) if kind == "slice" else slice(min(at, size), None)
            key = (slice(None),) * dimension + (part,)
            made = array[key], expected[key]
        elif kind == "swap":
            made = array.swapaxes(*rest), expected.swapaxes(*rest)
        elif kind == "clone":
            made = clone(array), expected.copy()
        else:
            if len(pairs) > 1:
                pairs.pop(which % len(pairs))
            continue
        if made[1].size > LARGEST:
            continue
        pairs.append(made)
        assert tuple(made[0].shape) == made[1].shape
        assert np.array_equal(value(made[0]), made[1])
        if len(pairs) > 12:
            pairs.pop(0)
    for array, expected in pairs:
        assert np.array_equal(value(array), expected)
