"""The search space and the rule of thumb of attention that is split over its keys."""

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.points import enumerate_space, itemsize, next_power_of_two

MAX_QUERIES = 4
MAX_ROWS = 128
MAX_HEAD_SIZE = 256
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""


def split_space(template: str, shape: tuple[int, ...], dtype: str, **more: tuple[int, ...]) -> SearchSpace:
    """Enumerate the configs of a kernel that splits attention over its keys.

    Args:
        template: its name.
        shape: (B, G, R, S, D): batch, key/value heads, query rows of each, keys, head size.
        dtype: "float32", "bfloat16" or "float16".
        more: parameters that it has besides, with their values.

    Raises:
        TemplateError: for a shape or dtype that there is no config for.
    """
    is_wrong = len(shape) != 5 or shape[2] > MAX_ROWS or shape[4] > MAX_HEAD_SIZE
    if shape and min(shape) >= 1 and is_wrong:
        raise TemplateError(
            f"{template} needs a shape (B, G, R, S, D) with R at most {MAX_ROWS} and D at most {MAX_HEAD_SIZE}, "
            f"not {tuple(shape)}."
        )
    batch, num_kv_heads, num_r, num_keys, head_size = shape if len(shape) == 5 else (1, 1, 1, 1, 1)
    block_d, block_r = max(16, next_power_of_two(head_size)), max(16, next_power_of_two(num_r))

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what has no part for a program, does not fit, spills registers or only repeats another config."""
        stage_bytes = 2 * point["BLOCK_N"] * block_d * itemsize(dtype)
        num_blocks = -(-num_keys // point["BLOCK_N"])
        num_programs = batch * num_kv_heads * point["SPLIT"]
        values_per_thread = block_r * max(point["BLOCK_N"], block_d) / (32 * point["num_warps"])
        return (
            point["SPLIT"] <= num_blocks
            and (point["SPLIT"] == 1 or num_programs <= 1056)
            and point["num_stages"] * stage_bytes + block_r * block_d * itemsize(dtype) <= _SHARED_MEMORY_BYTES
            and 2 <= values_per_thread <= 128
            # Stages past the part's own blocks would be copies of one config.
            and (point["num_stages"] == 2 or point["num_stages"] <= -(-num_blocks // point["SPLIT"]))
        )

    params = {
        "BLOCK_N": (16, 32, 64, 128),
        "SPLIT": (1, 2, 4, 8, 16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3),
    }
    return enumerate_space(template, shape, dtype, params | more, is_valid)


def split_rule(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Parts for two programs on each of 132 multiprocessors, of at least 64 keys."""
    batch, num_kv_heads, num_r, num_keys, _ = shape
    block_n = 64 if dtype.endswith("16") else 32
    wanted = max(1, 264 // (batch * num_kv_heads))
    split = min(1 << (wanted.bit_length() - 1), 128, max(1, num_keys // block_n))
    return {"BLOCK_N": block_n, "SPLIT": split, "num_warps": 4 if num_r <= 32 else 8, "num_stages": 2}
