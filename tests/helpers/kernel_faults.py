"""Faults to plant in the kernels: one substitution each, and the tests that are to catch it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Fault(NamedTuple):
    """One substitution in one file of the package; ``old`` must be there exactly once."""

    file: str
    old: str
    new: str
    tests: str
    """Of the kernel's test file, as pytest's -k selects them."""


class Group(NamedTuple):
    """Faults that the tests in one file catch."""

    test_file: str
    faults: tuple[Fault, ...]


def group(test_file: str, *faults: Iterable[Fault]) -> Group:
    return Group(test_file, tuple(fault for some in faults for fault in some))


def faults(file: str, tests: str, *pairs: tuple[str, ...]) -> tuple[Fault, ...]:
    """Faults in one file, caught by the same tests where a pair names no others as its third."""
    return tuple(Fault(file, old, new, *(more or (tests,))) for old, new, *more in pairs)


def unmasked(file: str, tests: str, *masked: str) -> tuple[Fault, ...]:
    """Vectors of columns, loaded without their mask."""
    return tuple(
        Fault(
            file, f"tl.load({name} + column, mask=column_mask, other=0.0)", f"tl.load({name} + column)", tests
        )
        for name in masked
    )


# The fewest tests that suffice: every run of them costs a second.
RAGGED = "ragged_tiles_stay_inside or ragged_rows_stay_inside"
HALF_SUMS = "acc = dot(a, w, acc)", "acc = dot(a, w, acc).to(tl.float16).to(tl.float32)", "sums_in_float32"
PREFIX = "rows_before_the_patches and 2-image_dtype0"
BOTH = "row_mask[:, None] & column_mask[None, :]"

TWO_PASSES = faults(
    "gemm.py", RAGGED,
    ("tl.where(column_mask[None, :], values - mean[:, None], 0.0)", "values - mean[:, None]"),
    ("tl.sum(away * away, axis=1)", "tl.sum(values * values, axis=1) - mean * mean * count", "extreme"),
)  # fmt: skip

PRODUCT = faults(
    "gemm.py", RAGGED,
    HALF_SUMS,
    ("mask=row_mask[:, None] & inside[None, :]", "mask=row_mask[:, None]"),
    ("mask=row_mask[:, None] & inside[None, :]", "mask=inside[None, :]"),
    ("mask=column_mask[None, :] & inside[:, None]", "mask=column_mask[None, :]"),
    ("mask=column_mask[None, :] & inside[:, None]", "mask=inside[:, None]"),
    ("tl.load(a_at, mask=row_mask[:, None], other=0.0)", "tl.load(a_at)"),
    ("tl.load(w_at, mask=column_mask[None, :], other=0.0)", "tl.load(w_at)"),
    ("size = tl.minimum(row_tiles - first, GROUP)", "size = GROUP", "plus_linear and False-dtype0"),
)  # fmt: skip

INSIDE = "inside = row_mask[:, None] & (column < COLUMNS)[None, :]"

WRITE_TILE = faults(
    "gemm.py", RAGGED,
    ("tl.minimum(COLUMNS - j * BLOCK_N, BLOCK_N)", "BLOCK_N"),
    ("squares -= total * mean", "squares -= mean * mean"),
    ("tl.where(squares < 0, 0.0, squares)", "squares", "extreme and 256"),
    ("values = rounded.to(tl.float32)", "values = acc", "of_rounded_values"),
    (INSIDE, "inside = row_mask[:, None] & (column >= 0)[None, :]"),
    (INSIDE, "inside = (row >= 0)[:, None] & (column < COLUMNS)[None, :]"),
    ("tl.store(at, mean, mask=row_mask)", "tl.store(at, mean)"),
    ("tl.where(squares < 0, 0.0, squares), mask=row_mask)", "tl.where(squares < 0, 0.0, squares))"),
)  # fmt: skip

LINEAR_RESIDUAL = (
    *unmasked("linear_residual.py", RAGGED, "bias_ptr"),
    *faults(
        "linear_residual.py", RAGGED,
        ("row * RESIDUAL_STRIDE", "row * COLUMNS"),
        ("if bias_ptr is not None:", "if False:"),
        (BOTH, "row_mask[:, None]"),
        (BOTH, "column_mask[None, :]"),
    ),
)  # fmt: skip

CONSUMER = faults(
    "gemm.py", RAGGED,
    ("squares + counts * away * away", "squares"),
    ("tl.minimum(WIDTH - tile * TILE, TILE)", "tl.minimum(WIDTH - tile * 0, TILE)"),
    ("rsqrt(variance + eps)", "rsqrt(variance)", "eps_counts"),
    ("row_mask[:, None] & (tile < TILES)[None, :]", "row_mask[:, None] & (tile >= 0)[None, :]"),
    ("row_mask[:, None] & (tile < TILES)[None, :]", "(row >= 0)[:, None] & (tile < TILES)[None, :]"),
    ("normal_tail(tl.abs(x))) + 0.5 * x", "normal_tail(tl.abs(x)))", "activation and gelu-dtype0"),
    ("power * x - 0.4596204", "power * x - 0.5596204", "activation and gelu-dtype0"),
)  # fmt: skip

LAYERNORM_LINEAR = (
    *unmasked("layernorm_linear.py", RAGGED, "colsum_ptr", "bias_ptr"),
    *faults(
        "layernorm_linear.py", RAGGED,
        ("(acc - mean[:, None] * colsum[None, :])", "acc"),
        (f"mask={BOTH}", "mask=row_mask[:, None]"),
        (f"mask={BOTH}", "mask=column_mask[None, :]"),
    ),
)  # fmt: skip

PATCH_EMBED = faults(
    "patch_embed.py", RAGGED,
    HALF_SUMS,
    ("(row_mask & (patch >= 0))", "row_mask", PREFIX),
    ("(row_mask & (patch >= 0))", "(patch >= 0)"),
    ("other=128", "other=0", PREFIX),
    (".to(tl.float16) - 128)", ".to(tl.float16))", "every_byte"),
    ("has_patch & (k < DEPTH)[None, :]", "has_patch"),
    ("column_mask[None, :] & (k < DEPTH)[:, None]", "column_mask[None, :]"),
    ("column_mask[None, :] & (k < DEPTH)[:, None]", "(k < DEPTH)[:, None]"),
    ("= has_patch, column_mask[None, :]\n", "= has_patch, (k < DEPTH)[:, None]\n"),
    ("write_tile(acc * scale", "write_tile(acc"),
    ("k // PATCH % PATCH * WIDTH", "k // PATCH % PATCH * HEIGHT"),
    (", TOKENS, COLUMNS, BLOCK_M", ", TOKENS - PREFIX, COLUMNS, BLOCK_M", PREFIX),
)  # fmt: skip

PARTS = faults(
    "gemm.py", RAGGED,
    ("row % PERIOD * COLUMNS", "row * COLUMNS"),
    ("start += BLOCK_N // 2", "start += 0", "wide_tiles and 256"),
    ("start += left.shape[1]", "start += 0", "wide_tiles and 256"),
)  # fmt: skip

ADD_LAYERNORM = (
    *unmasked("add_layernorm.py", RAGGED, "bias_ptr"),
    *faults(
        "add_layernorm.py", RAGGED,
        (BOTH, "row_mask[:, None] & (column >= 0)[None, :]"),
        (BOTH, "(row >= 0)[:, None] & column_mask[None, :]"),
        ("tl.store(stats_ptr + 2 * row, mean, mask=row_mask)", "tl.store(stats_ptr + 2 * row, mean)"),
        ("2 * row + 1, squares, mask=row_mask)", "2 * row + 1, squares)"),
        ("    y = rounded.to(tl.float32)\n", "", "rounded_total"),
        ("squares / WIDTH + eps", "squares / WIDTH", "eps_counts"),
        ("squares / WIDTH", "squares / BLOCK_N"),
    ),
)  # fmt: skip

TAIL, REST = "lengths and 65", "head_widths and 72"
STORED = "(row < ROWS)[:, None] & (column < COLUMNS)[None, :]\n    tl.store"

ATTENTION = faults(
    "attention.py", TAIL,
    ("if KEYS < BLOCK_N:", "if False:"),
    ("total * rescale +", "total +"),
    ("tl.load(at, mask=(row < ROWS)[:, None], other=0.0)", "tl.load(at)"),
    (STORED, "(row < ROWS)[:, None]\n    tl.store", REST),
    (STORED, "(column < COLUMNS)[None, :]\n    tl.store"),
    (", v, acc * rescale[:, None])", ", v, acc)"),
    ("v_rest, acc_rest * rescale[:, None])", "v_rest, acc_rest)", REST),
    ("if REST > 0:\n        k_rest", "if False:\n        k_rest", REST),
    ("bias.to(tl.float32) * LOG2_E", "bias.to(tl.float32)", REST),
    ('tl.where(new == -float("inf"), 0.0, new)', "new", "excluded_keys"),
    ("if TAIL_N > 0:\n        state", "if False:\n        state"),
)  # fmt: skip

DEEP = "(depth < WIDTH - start)[:, None] & (column < HEAD)[None, :]"

LAYERNORM_ATTENTION = faults(
    "layernorm_attention.py", "test_widths and 33",
    ("rsqrt(total / WIDTH + eps)", "rsqrt(total / WIDTH)", "extreme_rows"),
    ("tl.where(inside, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    ("(x - mean[:, None]) * rstd", "x * rstd", "extreme_rows"),
    ("sums[i] + bias[None, :]", "sums[i]"),
    (DEEP, "(column < HEAD)[None, :]"),
    (DEEP, "(depth < WIDTH - start)[:, None]", REST),
    ("values[j], acc * rescale[:, None])", "values[j], acc)", TAIL),
)  # fmt: skip

ABSORBED = faults(
    "absorbed.py", "test_absorbed_attention and 2-17-33",
    ('tl.where(token_mask[None, :], scores, float("-inf"))', "scores"),
    ("total = total * decay", "total = total"),
    ("decay = tl.exp2(most - new)", "decay = tl.exp2(new - new)"),
    ("token_mask = token < TOKENS", "token_mask = token <= TOKENS"),
    ("(x - mean[", "(x - 0 * mean["),
    ("weight_ptr + head * (DEPTH * COLUMNS)", "weight_ptr", "test_head_linear and 17-2"),
)  # fmt: skip

GROUPS = {
    "product": group("test_linear_residual.py", PRODUCT),
    "linear_residual": group("test_linear_residual.py", WRITE_TILE, LINEAR_RESIDUAL),
    "layernorm_linear": group("test_layernorm_linear.py", CONSUMER, LAYERNORM_LINEAR),
    "patch_embed": group("test_patch_embed.py", PATCH_EMBED, PARTS),
    "add_layernorm": group("test_add_layernorm.py", TWO_PASSES, ADD_LAYERNORM),
    "attention": group("test_attention.py", ATTENTION),
    "layernorm_attention": group("test_layernorm_attention.py", LAYERNORM_ATTENTION),
    "absorbed": group("test_absorbed.py", ABSORBED),
}
