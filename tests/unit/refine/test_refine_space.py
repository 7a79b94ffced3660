import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import SearchError
from agnitra_lab.refine.space import Encoding


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    names = draw(
        st.lists(
            st.sampled_from(["BLOCK_N", "ROWS_PER_PROGRAM", "num_warps", "num_stages"]),
            unique=True,
            min_size=1,
            max_size=4,
        )
    )
    params = {name: tuple(sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=4)))) for name in names}
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*params.values())]
    kept = draw(st.lists(st.sampled_from(points), min_size=1, unique_by=lambda point: tuple(point.items())))
    configs = tuple(KernelConfig(template="any", params=point) for point in kept)
    return SearchSpace(template="any", shape=(8, 8), dtype="float32", params=params, configs=configs)


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_decode_of_encode_is_the_config_itself(space: SearchSpace) -> None:
    encoding = Encoding(space)
    for config in space.configs:
        point = encoding.encode(config)
        assert encoding.decode(point) == config
        assert (point >= 0).all() and (point <= 1).all()


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_decode_of_any_point_is_a_valid_config(space: SearchSpace, data: st.DataObject) -> None:
    point = np.array([data.draw(st.floats(-1, 2)) for _ in space.params])
    assert Encoding(space).decode(point) in space.configs


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_neighbours_differ_in_one_parameter_and_know_each_other(space: SearchSpace) -> None:
    encoding = Encoding(space)
    for config in space.configs:
        for neighbour in encoding.neighbours(config):
            changed = [name for name in space.params if neighbour.params[name] != config.params[name]]
            assert len(changed) == 1
            assert config in encoding.neighbours(neighbour)


def test_a_config_outside_the_space_is_refused() -> None:
    config = KernelConfig(template="any", params={"a": 1})
    space = SearchSpace(template="any", shape=(1,), dtype="float32", params={"a": (1, 2)}, configs=(config,))
    with pytest.raises(SearchError, match="not one of the 1 valid configs"):
        Encoding(space).index(KernelConfig(template="any", params={"a": 2}))
    with pytest.raises(SearchError, match="no place in the space"):
        Encoding(space).encode(KernelConfig(template="any", params={"a": 3}))
