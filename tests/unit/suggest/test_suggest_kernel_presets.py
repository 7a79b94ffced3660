"""Presets: valid, ranked, for every class of device, and within a percent of the best of what was recorded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import LANDSCAPES, landscape, space_of

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.refine import replay
from agnitra_lab.suggest.device_class import CLASSES, facts_of
from agnitra_lab.suggest.kernel_presets import NUM_PRESETS, ranked
from agnitra_lab.suggest.kernel_situation import KernelSituation, shared_memory_bytes

DEVICES = {
    "sm_80": DeviceInfo(type="cuda", name="A100", arch="sm80", num_multiprocessors=108),
    "sm_90": DeviceInfo(type="cuda", name="H200", arch="sm90", num_multiprocessors=132),
    "consumer": DeviceInfo(type="cuda", name="RTX 4090", arch="sm89", num_multiprocessors=128),
    "none": DeviceInfo(type="cpu", name="A CPU"),
}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm80", "sm_80"), ("sm86", "consumer"), ("sm89", "consumer"), ("sm90", "sm_90"), ("sm_90a", "sm_90"),
        ("sm100", "sm_90"), ("sm120", "consumer"), ("gfx942", "none"), (None, "none"),
    ],
)  # fmt: skip
def test_a_compute_capability_has_its_class(arch, name):
    assert facts_of(DeviceInfo(type="cuda", name="x", arch=arch)).name == name


def test_a_cpu_and_no_device_at_all_are_of_the_class_none():
    assert facts_of(None).name == facts_of(DEVICES["none"]).name == "none"


def test_the_multiprocessors_are_the_devices_own_where_they_are_known():
    assert facts_of(DeviceInfo(type="cuda", name="x", arch="sm90", num_multiprocessors=114)).num_multiprocessors == 114
    assert facts_of(DeviceInfo(type="cuda", name="x", arch="sm90")).num_multiprocessors == 132


@pytest.mark.parametrize("path", LANDSCAPES, ids=lambda path: path.stem)
def test_presets_alone_lose_at_most_one_percent_of_the_final_speed(path):
    recorded = replay.load(path)
    presets = ranked(recorded.space, recorded.recorded.device)
    best_ms = min(recorded.measure(config) for config in presets)
    assert best_ms <= 1.01 * recorded.best_latency_ms


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("path", LANDSCAPES, ids=lambda path: path.stem)
def test_presets_are_valid_configs_each_once_and_as_many_as_there_may_be(path, name):
    space = replay.load(path).space
    presets = ranked(space, DEVICES[name])
    keys = [config.key() for config in presets]
    assert set(keys) <= {config.key() for config in space.configs}
    assert len(set(keys)) == len(keys) == min(NUM_PRESETS, len(space.configs))


def test_a_lower_limit_gives_the_first_of_the_same_order():
    space = landscape().space
    assert ranked(space, DEVICES["sm_90"], limit=3) == ranked(space, DEVICES["sm_90"])[:3]


def test_an_empty_space_has_no_presets():
    assert ranked(space_of("rms_norm", []), DEVICES["sm_90"]) == ()


def test_a_template_without_a_rule_has_presets_all_the_same():
    points = [{"TILE": tile, "num_warps": warps} for tile in (1, 2, 4, 8, 16) for warps in (1, 2, 4)]
    presets = ranked(space_of("someones_own", points), DEVICES["sm_90"])
    assert presets[0].params == {"TILE": 4, "num_warps": 2}
    assert len(presets) == NUM_PRESETS


def test_a_preset_fits_the_shared_memory_of_its_device():
    points = [
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "K_CHUNK": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": n}
        for n in (1, 2, 3)
    ]
    shape = (1, 4096, 4096, 4096)
    space = space_of("split_gemm", points, shape).model_copy(update={"dtype": "float32"})
    for name, most in (("sm_90", 3), ("sm_80", 2), ("consumer", 1)):
        presets = ranked(space, DEVICES[name])
        assert max(config.params["num_stages"] for config in presets) <= most
        situation = KernelSituation(shape, 4, CLASSES[name])
        needed = [shared_memory_bytes("split_gemm", config.params, situation) for config in presets]
        assert max(needed, default=0) <= CLASSES[name].shared_memory_bytes or most == 1


def test_the_interpreter_gets_the_fewest_programs_first():
    first = ranked(landscape().space, DEVICES["none"])[0].params
    tile = first["BLOCK_N"] * first["ROWS_PER_PROGRAM"]
    assert tile == max(c.params["BLOCK_N"] * c.params["ROWS_PER_PROGRAM"] for c in landscape().space.configs)


@given(
    st.lists(
        st.fixed_dictionaries({"BLOCK_N": st.sampled_from([16, 64, 1024, 4096]), "ROWS_PER_PROGRAM": st.integers(1, 9),
                               "num_warps": st.sampled_from([1, 2, 4, 8, 16, 32]), "num_stages": st.integers(1, 4)}),
        min_size=1, max_size=30,
    ),
    st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 20)),
    st.sampled_from(sorted(DEVICES)),
    st.sampled_from(["rms_norm", "softmax", "swiglu", "layer_norm", "cross_entropy", "cumsum", "unknown"]),
    st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_whatever_the_space_presets_are_members_of_it(points, shape, name, template, limit):
    space = space_of(template, points, shape)
    presets = ranked(space, DEVICES[name], limit=limit)
    valid = {config.key() for config in space.configs}
    assert {config.key() for config in presets} <= valid
    assert 1 <= len(presets) <= min(limit, len(valid))
