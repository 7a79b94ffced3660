"""The depthwise kernels compiled for Hopper without a GPU: whole vectors, no exchange between threads, no spills."""

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agnitra_lab.generate.templates import depthwise_kernels

SEVEN = {"KD": 1, "KH": 7, "KW": 7, "SD": 1, "SH": 1, "SW": 1, "PD": 0, "PH": 3, "PW": 3, "RD": 1, "RH": 1, "RW": 1}
EXTENTS = {"D_IN": 1, "H_IN": 56, "W_IN": 56, "D_OUT": 1, "H_OUT": 56, "W_OUT": 56}
BOTH = {"NUM_CHANNELS": 96, "MULTIPLIER": 1, "HAS_BIAS": True, "ACTIVATION": 4, "LANES": 128}
THREE = {"KH": 3, "KW": 3, "PH": 1, "PW": 1}
PLANES = {"IS_UNROLLED": False, "BLOCK_W": 8, "BLOCK_H": 2}
STRIDES = {"STRIDE_XN": 56 * 56 * 96, "STRIDE_XD": 0, "STRIDE_XH": 56 * 96, "STRIDE_XW": 96}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "7 x 7 of planes, in a loop": ("_planes_kernel", PLANES, 7 * 16),
    "3 x 3 of planes, unrolled": ("_planes_kernel", PLANES | THREE | {"IS_UNROLLED": True}, 9 * 16),
    "7 x 7, channels innermost": (
        "_channels_kernel", STRIDES | {"IS_WHOLE": True, "BLOCK_W": 4, "BLOCK_C": 8, "LANES_C": 4}, 7 * 32,
    ),
}  # fmt: skip


def compiled(name: str, constants: dict[str, Any]) -> Any:
    function = getattr(depthwise_kernels, name)
    if not isinstance(function, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    constants = SEVEN | EXTENTS | BOTH | constants
    names = [argument for argument in function.arg_names if argument not in constants]
    types = {key: "*bf16" if key.endswith("_ptr") else "i32" for key in names}
    positions = {key: (function.arg_names.index(key),) for key in function.arg_names}
    source = ASTSource(
        function,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={positions[key]: value for key, value in constants.items()},
        attrs={positions[key]: [["tt.divisibility", 16]] for key in names if key.endswith("_ptr")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1})


@pytest.mark.parametrize("case", CASES)
def test_a_depthwise_kernel_reuses_its_registers_and_moves_16_bytes_an_access(case: str) -> None:
    name, constants, num_products = CASES[case]
    kernel = compiled(name, constants)
    text = kernel.asm["ptx"]
    # One multiply-add for each product, and all taps of what a loop over rows of taps leaves.
    assert len(re.findall(r"\bfma\.rn\.f32\b", text)) >= num_products
    assert not re.findall(r"(?:ld|st)\.shared|bar\.sync|shfl", text)
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", text)
    narrow = [access for access in accesses if not access.endswith("v4.b32")]
    # Only the taps and the bias of a plane are single values.
    taps = SEVEN["KW"] if not constants.get("IS_UNROLLED") else 9
    assert len(narrow) == (taps + 1 if name == "_planes_kernel" else 0)
    assert kernel.metadata.shared == 0
