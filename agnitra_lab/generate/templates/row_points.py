"""The search space and the rule of thumb of `row_moments`: blocks, rows a program, splits of long rows."""

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import enumerate_space, itemsize, next_power_of_two, row_rule

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_warps", "num_stages")
MAX_TILE = 16384
"""Elements that one program may hold: 512 threads with 32 fp32 values each; above it registers spill."""
ENOUGH_ROWS = 264
"""Two programs for each multiprocessor of an H200: from here on a row to a program fills the machine."""
MAX_WAITING = 128
"""Programs of one row that may wait for each other; `row_moments` lets no more wait than the device has
multiprocessors."""
_LONG_BLOCK = 8192
_L2_BYTES = 50 * 1024 * 1024
"""Of an H200."""
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""


def row_space(
    template: str, shape: tuple[int, ...], dtype: str, num_rows: int, num_cols: int, *, rank: int | None = None
) -> SearchSpace:
    """Enumerate the valid configs for rows.

    Args:
        template: the name of the template that has these rows.
        shape: the site's shape as that template counts it, of `rank` numbers.
        dtype: "float32", "bfloat16" or "float16".
        num_rows: how many rows.
        num_cols: their length.

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    whole_row = max(16, next_power_of_two(num_cols))
    blocks = sorted({block for block in (1024, 2048, 4096, 8192) if block < whole_row} | {min(whole_row, MAX_TILE)})
    most_rows = next_power_of_two(num_rows)
    joined = {-(-num_cols // block) for block in blocks if MAX_TILE < num_cols <= block * MAX_WAITING}

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run or only repeats another config."""
        tile = point["BLOCK_N"] * point["ROWS_PER_PROGRAM"]
        values_per_thread = tile / (32 * point["num_warps"])
        loaded_bytes = (2 * tile + 2 * point["BLOCK_N"]) * itemsize(dtype)
        is_one_block = num_cols <= point["BLOCK_N"]
        return (
            point["ROWS_PER_PROGRAM"] <= most_rows
            and tile <= MAX_TILE
            and (values_per_thread >= 4 or point["num_warps"] == 1)
            # Two moments a lane live through the loop; they take the registers of the one block's row.
            and values_per_thread <= (64 if is_one_block else 32)
            and (point["num_stages"] - 1) * loaded_bytes <= _SHARED_MEMORY_BYTES
            # Stages are of the loop over blocks: without the loop they would be copies of one config.
            and (not is_one_block or point["num_stages"] == 1)
            and (point["SPLIT"] == 1 or _is_worth_splitting(point, num_rows, num_cols))
        )

    return enumerate_space(
        template,
        shape,
        dtype,
        {
            "BLOCK_N": tuple(blocks),
            "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16),
            "SPLIT": tuple(sorted({1, 4, 8, 16, 32, 64, 128, 256, 512} | joined)),
            "num_warps": (1, 2, 4, 8, 16),
            "num_stages": (1, 2, 3),
        },
        is_valid,
        rank=rank,
    )


def _is_worth_splitting(point: dict[str, int], num_rows: int, num_cols: int) -> bool:
    """Split rows into the blocks that hold them; else only where they are too few for the machine, not into crumbs."""
    num_programs, held = point["SPLIT"] * num_rows, point["SPLIT"] * point["BLOCK_N"]
    if num_cols <= MAX_TILE:
        return False
    if held >= num_cols:
        values_per_thread = point["BLOCK_N"] / (32 * point["num_warps"])
        is_fewest = held - point["BLOCK_N"] < num_cols
        is_plain = point["ROWS_PER_PROGRAM"] == point["num_stages"] == 1
        return is_fewest and is_plain and point["SPLIT"] <= MAX_WAITING and 8 <= values_per_thread <= 32
    return (
        num_rows < 2 * ENOUGH_ROWS
        and not point["SPLIT"] & (point["SPLIT"] - 1)
        and min(16, num_cols // 1024) <= num_programs <= 8192
        and 4 * num_programs >= min(ENOUGH_ROWS, num_rows * num_cols // 4096)
        and point["ROWS_PER_PROGRAM"] == 1
        and point["num_warps"] in (4, 8)
        and point["num_stages"] != 2
    )


def row_default(num_rows: int, num_cols: int, dtype: str, run: int = 0) -> dict[str, int]:
    """A whole row in one block where it fits; else in a loop where the L2 holds all rows that are under way.

    Longer ones go block after block through all programs, and those of more blocks than may wait for each other are
    split into loops. On an H200 in fp32 1024 x 262144 took 803 us in loops over whole rows and 668 block after block,
    64 x 1048576 191 in split loops and 181; in bf16 128 x 262144 65 in split loops and 50.

    Args:
        num_rows, num_cols, dtype: of the rows.
        run: values of a row that share a weight, 0 for a weight a column. Blocks that lie within a run look up one
            number; 256 x 294912 fp32 in runs of 36864 took 208 us in split loops, and more in blocks of 8192.
    """
    if num_cols <= MAX_TILE:
        rule = row_rule((num_rows, num_cols), block_n=next_power_of_two(num_cols), values_per_thread=16)
        return rule | {"SPLIT": 1}
    split = -(-num_cols // _LONG_BLOCK)
    are_in_runs = run % _LONG_BLOCK == 0
    are_many = num_rows >= ENOUGH_ROWS
    if are_many and (ENOUGH_ROWS * num_cols * itemsize(dtype) <= _L2_BYTES or not are_in_runs or split > MAX_WAITING):
        # 512 x 32768 bf16 on an H200: 27 us, where blocks that wait for each other took 29.
        return {"BLOCK_N": _LONG_BLOCK, "ROWS_PER_PROGRAM": 1, "SPLIT": 1, "num_warps": 16, "num_stages": 1}
    for block, most_idle in ((_LONG_BLOCK, 0.15), (4096, 0.15), (_LONG_BLOCK, 1.0)):
        split = -(-num_cols // block)
        is_resident = num_rows * split <= ENOUGH_ROWS
        is_worth_it = (are_in_runs or is_resident) and split * block <= (1 + most_idle) * num_cols
        if is_worth_it and split <= MAX_WAITING:
            return {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": 1}
    split = min(next_power_of_two(4096 // num_rows), next_power_of_two(num_cols // 16384))
    return {"BLOCK_N": 4096, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": 3}
