"""The templates compiled for Hopper without a GPU: what the compiler made of their memory accesses."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agnitra_lab.generate import registry

CASES = {
    "rms_norm": {
        "HAS_RESIDUAL": True,
        "CAST_BEFORE_WEIGHT": True,
        "IS_ONE_BLOCK": True,
        "BLOCK_N": 2048,
        "ROWS_PER_PROGRAM": 1,
        "NUM_STAGES": 1,
    },
    "swiglu": {"ROUND_SILU": True, "BLOCK_N": 1024, "ROWS_PER_PROGRAM": 1},
}


def ptx(template: str) -> str:
    kernel = registry.load(template).kernel
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    constants = CASES[template]
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: "*bf16" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32" for name in names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "eps"}
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize("template", sorted(CASES))
def test_a_template_moves_16_bytes_a_thread_and_access_on_hopper(template: str) -> None:
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", ptx(template))
    assert accesses
    assert {access.partition("global.")[2] for access in accesses} == {"v4.b32"}
