"""The templates compiled for Hopper without a GPU: what the compiler made of their memory accesses."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agnitra_lab.generate import registry

AFFINE = {"HAS_WEIGHT": True, "HAS_BIAS": True}
ROWS = {"BLOCK_N": 2048, "NUM_STAGES": 1}
CASES = {
    "rms_norm": {
        "HAS_RESIDUAL": True,
        "CAST_BEFORE_WEIGHT": True,
        "IS_ONE_BLOCK": True,
        "ROWS_PER_PROGRAM": 1,
        **ROWS,
    },
    "swiglu": {"ROUND_SILU": True, "BLOCK_N": 1024, "ROWS_PER_PROGRAM": 1, "ACTIVATION": 1},
    "layer_norm": {
        "HAS_RESIDUAL": True,
        "IS_SILU": False,
        "SPATIAL": 0,
        "BLOCK_N": 2048,
        "ROWS_PER_PROGRAM": 1,
        **AFFINE,
    },
    "layer_norm_chunk": {"HAS_RESIDUAL": True, "SPLIT": 16, **ROWS},
    "layer_norm_apply": {"IS_SILU": True, "SPATIAL": 0, "SPLIT": 16, "SPLIT_LANES": 16, **AFFINE, **ROWS},
    "channel_norm": {
        "IS_CENTRED": True,
        "IS_L2": False,
        "BLOCK_C": 64,
        "BLOCK_S": 64,
        "stride_xs": 1,
        "stride_os": 1,
        "HAS_WEIGHT": False,
        "HAS_BIAS": False,
    },
}
PLACES = {"layer_norm": -4, "layer_norm_chunk": -2, "layer_norm_apply": -1, "channel_norm": -2}
"""Which of a template's functions is the kernel of the case."""


def ptx(case: str) -> str:
    kernel = registry.load(case.removesuffix("_chunk").removesuffix("_apply")).kernel
    kernel = kernel[PLACES[case]] if isinstance(kernel, tuple) else kernel
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    constants = CASES[case]
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: "*bf16" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32" for name in names}
    types |= {name: "*fp32" for name in names if name == "moments_ptr"}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "eps"}
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_template_moves_16_bytes_a_thread_and_access_on_hopper(case: str) -> None:
    text = ptx(case)
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", text)
    # The moments of a chunk are two numbers; everything else is a tensor of the model.
    widths = {access.partition("global.")[2] for access in accesses}
    assert accesses and widths - ({"b32"} if case in ("layer_norm_chunk", "layer_norm_apply") else set()) == {"v4.b32"}


def compile_for_hopper(kernel, types: dict[str, str], constants: dict[str, int], num_warps: int, num_stages: int):
    """Compile one of a template's kernels; pointers and numbers are multiples of 16."""
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    aligned = [name for name in names if not signature[name].startswith("tensordesc")]
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    "constants",
    [
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "K_CHUNK": 64},
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "K_CHUNK": 64},
    ],
    ids=str,
)
def test_the_sums_of_split_gemm_leave_the_tensor_cores(constants: dict[str, int]) -> None:
    kernel = registry.load("split_gemm").kernel[-1]
    shapes = {"a": (constants["BLOCK_M"], constants["BLOCK_K"]), "b": (constants["BLOCK_N"], constants["BLOCK_K"])}
    types = {f"{side}_{part}_desc": f"tensordesc<fp16{list(shapes[side])}>" for side in "ab" for part in ("hi", "lo")}
    types |= {"a_exponent_ptr": "*i32", "b_exponent_ptr": "*i32"}
    constants = constants | {"GROUP_M": 8, "HAS_BIAS": True, "ACTIVATION": 4}
    num_warps = constants["BLOCK_M"] * constants["BLOCK_N"] // 2048
    made = compile_for_hopper(kernel, types, constants, num_warps, 3)
    loop = made.asm["ttgir"].partition("scf.for")[2].partition("scf.yield %")[0]
    # Three products, each straight from shared memory, and one sum in registers that no product accumulates.
    assert loop.count("ttng.warp_group_dot ") == 3
    assert "arith.addf" in made.asm["ttgir"].partition("scf.for")[2].partition("gpu.barrier")[0]
    assert made.asm["ptx"].count("cp.async.bulk.tensor") >= 4


@pytest.mark.parametrize("name", ["_split_rows", "_largest_of_columns", "_split_columns"])
def test_splitting_moves_16_bytes_a_thread_and_access_on_hopper(name: str) -> None:
    constants = {
        "_split_rows": {"IS_ONE_BLOCK": True, "BLOCK": 4096},
        "_largest_of_columns": {"SPLIT": 16, "BLOCK": 128},
        "_split_columns": {"SPLIT": 16, "BLOCK": 64},
    }[name]
    (kernel,) = [kernel for kernel in registry.load("split_gemm").kernel if kernel.fn.__name__ == name]
    types = {"parts_ptr": "*fp16", "exponent_ptr": "*i32"}
    made = compile_for_hopper(kernel, types, constants, 8 if name == "_split_rows" else 4, 3)
    accesses = set(re.findall(r"(?:ld|st)\.global[\w.:]*", made.asm["ptx"]))
    # Exponents and largest values are one number a row.
    assert {access.partition("global.")[2] for access in accesses if access != "st.global.b32"} == {"v4.b32"}


@pytest.mark.parametrize("flatten", [1, 2])
@pytest.mark.parametrize("block_n", [128, 256])
def test_a_heads_loss_multiplies_on_the_tensor_cores_and_stores_no_logits(block_n: int, flatten: int) -> None:
    _, parts, join = registry.load("linear_cross_entropy").kernel
    types = {"x_desc": "tensordesc<bf16[128, 64]>", "weight_desc": f"tensordesc<bf16[{block_n}, 64]>"}
    types |= {"bias_ptr": "*bf16", "target_ptr": "*i64", "plane": "i64"}
    constants = {"HAS_BIAS": True, "HAS_SMOOTHING": False, "BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64}
    constants |= {"SPLIT": 8, "FLATTEN": flatten, "NUM_STAGES": 3}
    made = compile_for_hopper(parts, types, constants, 8, 3)
    text = made.asm["ptx"]
    assert text.count("wgmma.mma_async") >= 4 and text.count("cp.async.bulk.tensor") >= 4
    # Three numbers a token and part, each of 128 tokens, by 8 warps.
    assert text.count("st.global") <= 3
    join_types = {"target_ptr": "*i64", "plane": "i64", "smoothing": "fp32"}
    shape = {"HAS_SMOOTHING": True, "SPLIT": 8, "BLOCK_SPLIT": 8, "BLOCK_T": 128}
    assert "ld.global.v4.b32" in compile_for_hopper(join, join_types, shape, 4, 1).asm["ptx"]
