"""The row templates compiled for Hopper without a GPU: every form compiles, and moves 16 bytes a thread and access."""

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agnitra_lab.generate import registry

FLAGS: dict[str, dict[str, Any]] = {
    "_rows": {"IS_LOG": False, "IS_FP32": False, "IS_ONE_BLOCK": True, "ROWS_PER_PROGRAM": 1, "NUM_STAGES": 1},
    "_joined": {
        "IS_LOG": False, "IS_FP32": True, "IS_ONE_BLOCK": True, "SPLIT": 8, "BLOCK_SPLIT": 8, "NUM_STAGES": 1,
    },
    "_parts": {"IS_SECOND": True, "IS_LOG": True, "IS_FP32": False, "SPLIT": 8, "BLOCK_SPLIT": 8, "NUM_STAGES": 2},
    "_waiting_kernel": {
        "HAS_RESIDUAL": False, "HAS_WEIGHT": True, "HAS_BIAS": True, "IS_SILU": True, "SPATIAL": 65536, "SPLIT": 8,
        "SPLIT_LANES": 8, "NUM_STAGES": 1,
    },
    "_relay_kernel": {
        "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "IS_SILU": False, "SPATIAL": 0, "SPLIT": 36,
        "SPLIT_LANES": 64,
    },
    "_tokens": {"HAS_SMOOTHING": False, "IS_ONE_BLOCK": False, "ROWS_PER_PROGRAM": 1, "SPLIT": 1, "NUM_STAGES": 3},
    "_join": {"HAS_SMOOTHING": True, "SPLIT": 8, "BLOCK_SPLIT": 8},
    "_sums": {"HAS_MASK": False, "SPLIT": 8, "NUM_STAGES": 2},
    "_scan": {
        "HAS_MASK": False, "IS_REVERSE": True, "IS_ONE_BLOCK": False, "ROWS_PER_PROGRAM": 1, "SPLIT": 1,
        "BLOCK_SPLIT": 1, "NUM_STAGES": 2,
    },
}  # fmt: skip
TYPES = {
    "part_ptr": "*fp32", "count_ptr": "*i32", "target_ptr": "*i64", "loss_ptr": "*fp32", "mask_ptr": "*u8",
    "moments_ptr": "*fp32", "smoothing": "fp32", "eps": "fp32",
}  # fmt: skip
CASES = [
    ("softmax", "_rows", "bf16"),
    ("softmax", "_joined", "fp32"),
    ("softmax", "_parts", "bf16"),
    ("group_norm", "_waiting_kernel", "bf16"),
    ("layer_norm", "_relay_kernel", "fp32"),
    ("cross_entropy", "_tokens", "bf16"),
    ("cross_entropy", "_join", "bf16"),
    ("cumsum", "_sums", "fp32"),
    ("cumsum", "_scan", "fp32"),
]


def ptx(template: str, name: str, dtype: str) -> str:
    (function,) = [kernel for kernel in registry.load(template).kernel if kernel.fn.__name__ == name]
    if not isinstance(function, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    constants = {key: value for key, value in (FLAGS[name] | {"BLOCK_N": 4096}).items() if key in function.arg_names}
    names = [argument for argument in function.arg_names if argument not in constants]
    types = {key: TYPES.get(key, f"*{dtype}" if key.endswith("_ptr") else "i32") for key in names}
    positions = {key: (function.arg_names.index(key),) for key in function.arg_names}
    source = ASTSource(
        function,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={positions[key]: value for key, value in constants.items()},
        attrs={
            positions[key]: [["tt.divisibility", 16]]
            for key in names
            if key not in ("smoothing", "ignore_index", "eps")
        },
    )
    options = {"num_warps": 8, "num_stages": constants.get("NUM_STAGES", 1)}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.parametrize(("template", "name", "dtype"), CASES)
def test_a_row_kernel_moves_16_bytes_a_thread_and_access_on_hopper(template: str, name: str, dtype: str) -> None:
    text = ptx(template, name, dtype)
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", text)
    # The sums of parts, the counters and a token's own numbers are single values.
    wide = [access for access in accesses if access.endswith("v4.b32")]
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", text)
    assert wide or copies or name == "_join"
    assert not re.findall(r"cp\.async\.ca", text)
    if name == "_joined":
        assert len(wide) == 2 * 4096 // (8 * 32 * 4)
        assert re.search(r"(?:atom|red)\.global\.gpu\.release\.add", text) and ".acquire" in text
