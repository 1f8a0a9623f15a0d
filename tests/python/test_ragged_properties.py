"""Random calls on lanes of different lengths, against a list of arrays."""

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import pyvmm  # noqa: E402
from conftest import DEVICES  # noqa: E402
from lanes_model import Lanes  # noqa: E402
from model import pattern  # noqa: E402

some_lanes = st.permutations(range(3)).flatmap(
    lambda lanes: st.integers(0, 3).map(lambda n: lanes[:n])
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), some_lanes, st.lists(st.integers(0, 5), min_size=3)),
        st.tuples(st.just("append to all"), st.integers(0, 4)),
        st.tuples(st.just("truncate"), some_lanes, st.lists(st.floats(0, 1), min_size=3)),
        st.tuples(st.just("truncate all"), st.floats(0, 1)),
        st.tuples(st.just("trim")),
        st.tuples(st.just("grow"), st.integers(0, 4)),
        st.tuples(st.just("fork"), st.floats(0, 1)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["lane", "c"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 0, 5), 1), ((3, 2, 0, 4), 2)], ids=str)
@settings(max_examples=40, deadline=None)
@given(steps=operations, seed=st.integers(0, 99))
def test_against_a_list_of_arrays(device, layout, shape, axis, steps, seed):
    tensor = pyvmm.empty(shape, "int16", axis=axis, capacity=25, device=device, layout=layout)
    model = Lanes(shape, "int16", axis, 25)
    for number, (name, *arguments) in enumerate(steps):
        if name in ("append", "append to all"):
            lanes = arguments[0] if name == "append" else list(range(3))
            counts = arguments[1][: len(lanes)] if name == "append" else arguments * 3
            size = max(counts, default=0)
            x = pattern((len(lanes), *shape[1:axis], size, *shape[axis + 1 :]), "int16",
                        seed + number)  # fmt: skip
            named = {"lanes": lanes, "counts": counts} if name == "append" else {}
            if model.fits(lanes, counts):
                tensor.append(x, **named)
                model.append(x, lanes, counts)
            else:
                with pytest.raises(pyvmm.CapacityError):
                    tensor.append(x, **named)
        elif name == "truncate":
            lanes = arguments[0]
            kept = [
                int(share * model.lengths[lane])
                for lane, share in zip(lanes, arguments[1], strict=False)
            ]
            tensor.truncate(kept, lanes=lanes)
            model.truncate(lanes, kept)
        elif name == "truncate all":
            n = int(arguments[0] * tensor.length)
            tensor.truncate(n)
            model.truncate(range(3), [min(n, length) for length in model.lengths])
        elif name == "trim":
            tensor.trim()
        elif name == "grow":
            n = min(arguments[0], 25 - tensor.length)
            if tensor.ragged:
                with pytest.raises(ValueError, match="different lengths"):
                    tensor.grow(n)
            elif n:
                x = pattern((3, *shape[1:axis], n, *shape[axis + 1 :]), "int16", seed)
                tensor.grow(n)
                tensor.truncate(tensor.length - n)
                tensor.append(x)
                model.append(x, range(3), [n] * 3)
        else:
            n = int(arguments[0] * tensor.length)
            fork = tensor.fork(n)
            tensor.close()
            tensor = fork
            model.truncate(range(3), [min(n, length) for length in model.lengths])
        model.check(tensor)
    tensor.close()
