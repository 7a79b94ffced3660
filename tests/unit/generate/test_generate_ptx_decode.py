"""The kernels of the decode path compiled for Hopper without a GPU: width and order of their memory accesses."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agnitra_lab.generate.templates import (
    attention_blocks,
    cached_attention_kernels,
    decode_attention,
    skinny_gemm_kernels,
)

FLAGS = {
    "HAS_BIAS": False,
    "HAS_NORM": True,
    "HAS_RESIDUAL": True,
    "ACTIVATION": 0,
    "GATED": 0,
    "IS_EVEN": True,
    "SPLIT": 1,
}
TYPES = {
    "eps": "fp32", "q_eps": "fp32", "k_eps": "fp32", "scale": "fp32", "num_rows": "i32", "mask_ptr": "*i1",
    "position_ptr": "*i64",
}  # fmt: skip
WHOLE_ROWS = FLAGS | {
    "NUM_ROWS": 1,
    "ROWS_AT_ONCE": 1,
    "NUM_TILES": 2,
    "NUM_ALL_TILES": 2,
    "BLOCK_N": 4,
    "BLOCK_K": 1024,
}


def compiled(kernel, constants: dict, *, num_warps: int = 4, num_stages: int = 3, dtype: str = "bf16"):
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    names = [name for name in kernel.arg_names if name not in constants]
    fp32 = ("partial_ptr", "stats_ptr") if constants["SPLIT"] > 1 else ()
    types = {
        name: TYPES.get(name) or ("*fp32" if name in fp32 else f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name not in TYPES},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def global_loads(ptx: str) -> list[str]:
    return re.findall(r"ld\.global[\w.:]*|griddepcontrol\.\w+", ptx)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_skinny_product_requests_all_its_weights_in_16_byte_loads_before_it_waits(dtype: str) -> None:
    columns = {"BLOCK_K": 512, "NUM_TILES": 4, "NUM_ALL_TILES": 4} if dtype == "fp32" else {}
    found = global_loads(
        compiled(skinny_gemm_kernels.reduce, WHOLE_ROWS | columns | {"PDL": 2}, dtype=dtype).asm["ptx"]
    )
    before = found[1 : found.index("griddepcontrol.wait")]
    assert found[0] == "griddepcontrol.launch_dependents"
    weights = [load for load in before if "evict_first" in load]
    num_bytes = 2048 * 4 * (4 if dtype == "fp32" else 2)
    assert len(weights) == num_bytes // (128 * 16)
    assert all(load.endswith("v4.b32") for load in before)
    after = found[found.index("griddepcontrol.wait") + 1 :]
    assert not any("evict_first" in load for load in after)


def test_without_the_option_nothing_depends_on_another_launch() -> None:
    assert "griddepcontrol" not in compiled(skinny_gemm_kernels.reduce, WHOLE_ROWS | {"PDL": 1}).asm["ptx"]


@pytest.mark.parametrize("gated", [0, 2])
@pytest.mark.parametrize(("block_n", "num_warps"), [(64, 4), (32, 2)])
def test_more_rows_go_through_a_pipeline_into_tensor_cores(gated: int, block_n: int, num_warps: int) -> None:
    constants = FLAGS | {
        "CAST_BEFORE_WEIGHT": True,
        "GATED": gated, "ACTIVATION": 4 if gated else 0, "NUM_TILES": 16, "BLOCK_N": block_n, "BLOCK_K": 128,
        "NUM_STAGES": 4, "PDL": 1,
    }  # fmt: skip
    ptx = compiled(skinny_gemm_kernels.dot, constants, num_warps=num_warps, num_stages=4).asm["ptx"]
    assert "cp.async" in ptx
    assert re.search(r"wgmma\.mma_async|mma\.sync", ptx)


def test_split_attention_compiles_with_a_boolean_mask() -> None:
    constants = {
        "NUM_QUERIES": 1, "NUM_R": 8, "HEAD_SIZE": 64, "MASK": 1, "BLOCK_R": 16, "BLOCK_D": 64, "BLOCK_N": 64,
        "SPLIT": 16, "NUM_STAGES": 2,
    }  # fmt: skip
    ptx = compiled(decode_attention._attend, constants, num_stages=2).asm["ptx"]
    assert "cp.async" in ptx and "mma.sync" in ptx


STEP = {
    "NUM_QUERIES": 1, "NUM_R": 8, "HEAD_SIZE": 64, "HAS_POSITION": True, "HAS_Q_NORM": True, "HAS_K_NORM": True,
    "FORM": 1, "ROTARY": 64, "ANGLES": 0, "MASK": 1, "BLOCK_R": 16, "BLOCK_D": 64, "BLOCK_N": 64, "SPLIT": 16,
    "PDL": 2, "NUM_STAGES": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed", [{}, {"FORM": 2, "ANGLES": 2, "NUM_QUERIES": 4}, {"HAS_POSITION": False, "FORM": 0, "PDL": 1}], ids=str
)
def test_a_decoding_step_compiles_and_reads_and_writes_nothing_before_it_waits(changed: dict) -> None:
    ptx = compiled(cached_attention_kernels.attend, STEP | changed, num_stages=2).asm["ptx"]
    assert "cp.async" in ptx and "mma.sync" in ptx
    accesses = r"(?:ld|st|atom|red)\.global[\w.:]*|cp\.async\.(?:c[ag]|bulk)[\w.]*|prefetch[\w.]*"
    found = re.findall(accesses + r"|griddepcontrol\.\w+", ptx)
    if (STEP | changed)["PDL"] == 1:
        assert not any("griddep" in name or "prefetch" in name for name in found)
        return
    before = found[: found.index("griddepcontrol.wait")]
    assert before[0] == "griddepcontrol.launch_dependents"
    assert set(before[1:]) == {"prefetch.global.L2"}


def test_the_sum_of_parts_waits_before_it_reads() -> None:
    names = ("NUM_QUERIES", "NUM_R", "HEAD_SIZE", "BLOCK_D", "SPLIT", "PDL")
    constants = {name: STEP[name] for name in names} | {"BLOCK_P": 16}
    found = global_loads(compiled(attention_blocks.add_parts, constants).asm["ptx"])
    assert found[:2] == ["griddepcontrol.launch_dependents", "griddepcontrol.wait"]
