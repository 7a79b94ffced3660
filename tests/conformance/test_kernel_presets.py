"""Every template has ranked presets for every class of device, at every shape that it takes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.generate import registry
from agnitra_lab.suggest.device_class import CLASSES, facts_of
from agnitra_lab.suggest.kernel_presets import NUM_PRESETS, ranked
from agnitra_lab.suggest.kernel_rules import RULES
from agnitra_lab.suggest.kernel_situation import KernelSituation, shared_memory_bytes

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "cached_attention": ((1, 8, 4, 1024, 64), (16, 8, 8, 4096, 128), (1, 1, 1, 3, 64)),
    "channel_norm": ((32, 64, 4096), (1, 512, 7), (4096, 768, 1)),
    "cross_entropy": ((8, 32000), (8192, 128256), (3, 17)),
    "cumsum": ((4096, 32768), (1, 1 << 20), (5, 100)),
    "decode_attention": ((1, 8, 4, 1024, 64), (16, 8, 8, 4096, 128), (1, 1, 1, 3, 64)),
    "depthwise_conv": (
        (32, 384, 1, 56, 56, 1, 7, 7, 1, 1, 1, 1, 1, 1, 1),
        (32, 144, 1, 112, 112, 1, 3, 3, 1, 2, 2, 1, 1, 1, 2),
        (8, 2048, 1, 1, 4096, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1),
    ),
    "group_norm": ((1024, 16, 4096), (8, 1, 1 << 20), (3, 2, 9)),
    "layer_norm": ((4096, 4096), (16, 1 << 20), (1, 5)),
    "linear_cross_entropy": ((8192, 2048, 32000), (16, 4096, 128256), (5, 64, 77)),
    "rms_norm": ((1, 2048), (16384, 4096), (7, 65536)),
    "skinny_gemm": ((1, 2048, 2048), (16, 11008, 4096), (8, 64, 64)),
    "softmax": ((4096, 4096), (512, 131072), (1, 3)),
    "split_gemm": ((1, 4096, 4096, 4096), (16, 64, 64, 512)),
    "swiglu": ((1, 5632), (16384, 14336), (3, 11)),
}
ARCHS = {"sm_80": "sm80", "sm_90": "sm90", "consumer": "sm89", "none": None}


def test_every_template_has_a_rule_and_every_rule_a_template():
    assert set(RULES) == set(registry.TEMPLATES) == set(SHAPES)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("template", sorted(registry.TEMPLATES))
def test_presets_of_a_template_are_valid_and_fit_each_class_of_device(template: str, name: str) -> None:
    device = DeviceInfo(type="cuda" if ARCHS[name] else "cpu", name=name, arch=ARCHS[name])
    for shape in SHAPES[template]:
        dtype = "float32" if template == "split_gemm" else "bfloat16"
        space = registry.load(template).space(shape, dtype)
        presets = ranked(space, device)
        keys = [config.key() for config in presets]
        assert set(keys) <= {config.key() for config in space.configs}
        assert len(set(keys)) == len(keys)
        situation = KernelSituation(shape, 4 if dtype == "float32" else 2, facts_of(device))
        fitting = [c for c in space.configs if _fits(c, situation)] or space.configs
        assert len(keys) == min(NUM_PRESETS, len(fitting))
        assert all(config in fitting for config in presets)


@pytest.mark.parametrize("template", sorted(registry.TEMPLATES))
def test_the_first_preset_on_a_hopper_is_not_far_from_the_templates_own_rule(template: str) -> None:
    """Two rules of thumb for one kernel may differ in a parameter, and not in what the kernel is."""
    from agnitra_lab.generate.defaults import default_config

    device = DeviceInfo(type="cuda", name="H200", arch="sm90", num_multiprocessors=132)
    for shape in SHAPES[template]:
        dtype = "float32" if template == "split_gemm" else "bfloat16"
        presets = ranked(registry.load(template).space(shape, dtype), device)
        own = default_config(template, shape, dtype)
        assert own in presets or any(
            sum(config.params[name] != value for name, value in own.params.items()) <= 2 for config in presets
        )


def _fits(config, situation: KernelSituation) -> bool:
    return shared_memory_bytes(config.template, config.params, situation) <= situation.device.shared_memory_bytes
