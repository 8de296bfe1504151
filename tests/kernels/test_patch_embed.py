"""patch_embed against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import TOLERANCE, Guarded, guard, relative, statistics_error
from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.launch import tiles
from vitdeploy_kernels.patch_embed import _operator, launch, patch_embed
from vitdeploy_kernels.support import UnsupportedError

SMALL = Config(block_m=16, block_n=32, block_k=64, group=2, warps=4, stages=2)
HALF = torch.float16
EXACT = 2e-6
"""Worst error of statistics: a few roundings of float32."""

BYTES, SINGLE = torch.uint8, torch.float32


@dataclass
class Case:
    """Inputs of one call, with NaN (113 in bytes) around each."""

    image: Tensor
    weight: Tensor
    tokens: Tensor
    patch: int
    prefix: int
    scale: float = 0.75

    def run(self, config: Config = SMALL) -> tuple[Tensor, Tensor]:
        return patch_embed(
            self.image, self.weight, self.tokens,
            patch=self.patch, prefix=self.prefix, scale=self.scale, config=config,
        )  # fmt: skip

    def expected(self) -> Tensor:
        in_bytes = self.image.dtype == BYTES
        image = self.image.cpu() if in_bytes else self.image.cpu().to(self.weight.dtype)
        return reference.patch_embed(
            image, self.weight.cpu(), self.tokens.cpu(), self.patch, self.prefix, self.scale,
            128.0 if in_bytes else 0.0,
        )  # fmt: skip


def make(
    device: torch.device,
    image_dtype: torch.dtype = BYTES,
    dtype: torch.dtype = HALF,
    patch: int = 8,
    grid: tuple[int, int] = (2, 3),
    channels: int = 3,
    prefix: int = 1,
    count: int = 2,
    columns: int = 40,
) -> Case:
    height, width = grid[0] * patch, grid[1] * patch
    if image_dtype == BYTES:
        image, size = torch.randint(0, 256, (count, height, width, channels), dtype=BYTES), 74.0
    else:
        image, size = torch.randn(count, channels, height, width).to(image_dtype), 1.0
    depth = patch * patch * channels
    weight = (torch.randn(depth, columns) / (depth**0.5 * size)).to(dtype)
    # The columns' means differ, so that parts of a tile differ in more than noise.
    tokens = torch.randn(prefix + grid[0] * grid[1], columns) + torch.arange(columns) / 16
    return Case(*(guard(t, device) for t in (image, weight, tokens)), patch, prefix)


def matches(case: Case, out: Tensor, stats: Tensor, tile: int) -> bool:
    rows = out.flatten(0, 1)
    return (
        relative(out, case.expected()) < TOLERANCE[case.weight.dtype]
        and statistics_error(stats, rows, tile, one_pass=True) < EXACT
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
@pytest.mark.parametrize("image_dtype", [BYTES, SINGLE])
def test_is_patches_times_weight_plus_tokens(
    image_dtype: torch.dtype, patch: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(patch)
    case = make(device, image_dtype, dtype, patch, columns=72)
    out, stats = case.run()
    assert out.dtype == dtype
    assert out.shape == (2, 7, 72)
    assert stats.shape == (14, 3, 2)
    assert stats.dtype == torch.float32
    assert matches(case, out, stats, 32)


@pytest.mark.parametrize("image_dtype", [BYTES, SINGLE, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_rows_before_the_patches(image_dtype: torch.dtype, prefix: int, device: torch.device) -> None:
    torch.manual_seed(prefix)
    case = make(device, image_dtype, torch.bfloat16, prefix=prefix, count=3)
    out, stats = case.run()
    assert matches(case, out, stats, 32)
    first = case.tokens[:prefix].to(out.dtype)
    assert all(torch.equal(image[:prefix], first) for image in out)


@settings(max_examples=15, deadline=None)
@given(
    image_dtype=st.sampled_from([BYTES, SINGLE, torch.float16]),
    patch=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    prefix=st.integers(0, 3),
    count=st.integers(1, 3),
    columns=st.integers(2, 270),
    blocks=st.tuples(st.sampled_from([16, 32]), st.sampled_from([32, 64, 256]), st.sampled_from([16, 64])),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
)
def test_any_shape_stays_inside(
    image_dtype: torch.dtype,
    patch: int,
    grid: tuple[int, int],
    channels: int,
    prefix: int,
    count: int,
    columns: int,
    blocks: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(columns)
    case = make(device, image_dtype, dtype, patch, grid, channels, prefix, count, columns)
    config, rows = Config(*blocks, group=2, warps=4, stages=2), count * len(case.tokens)
    out = Guarded((rows, columns), dtype, device)
    stats = Guarded((rows, tiles(columns, config.block_n), 2), torch.float32, device)
    run_inside(
        launch(
            case.image,
            case.weight,
            case.tokens,
            out.tensor,
            stats.tensor,
            patch=patch,
            prefix=prefix,
            scale=case.scale,
            config=config,
        )
    )
    assert matches(case, out.tensor.view(count, -1, columns), stats.tensor, config.block_n)
    assert out.intact()
    assert stats.intact()


@pytest.mark.parametrize("image_dtype", [BYTES, SINGLE])
@pytest.mark.parametrize("patch", [5, 8])
def test_ragged_tiles_stay_inside(patch: int, image_dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    case = make(device, image_dtype, patch=patch, columns=70)
    inputs = case.image, case.weight, case.tokens
    out, stats = Guarded((14, 70), HALF, device), Guarded((14, 3, 2), SINGLE, device)
    options = {"patch": patch, "prefix": 1, "scale": case.scale, "config": SMALL}
    run_inside(launch(*inputs, out.tensor, stats.tensor, **options))
    assert matches(case, out.tensor.view(2, 7, 70), stats.tensor, 32)
    assert out.intact()
    assert stats.intact()
    again = torch.empty(14, 70, dtype=HALF, device=device)
    launch(*inputs, again, None, **options).run()
    assert torch.equal(again, out.tensor)


@pytest.mark.parametrize("block_n", [128, 256])
def test_wide_tiles(block_n: int, device: torch.device) -> None:
    torch.manual_seed(7)
    case = make(device, columns=200)
    assert matches(case, *case.run(Config(16, block_n, 64)), block_n)


def test_misaligned_and_transposed_inputs(device: torch.device) -> None:
    torch.manual_seed(2)
    for image_dtype in (BYTES, SINGLE):
        case = make(device, image_dtype)
        expected = case.expected()
        case.image = guard(case.image, device, shift=1)
        case.weight, case.tokens = guard(case.weight, device, shift=1), guard(case.tokens, device, shift=1)
        assert relative(case.run()[0], expected) < TOLERANCE[HALF]
        case.image = guard(case.image.permute(0, 2, 3, 1), device).permute(0, 3, 1, 2)
        case.weight, case.tokens = guard(case.weight.mT, device).mT, guard(case.tokens.mT, device).mT
        assert relative(case.run()[0], expected) < TOLERANCE[HALF]


def test_one_column(device: torch.device) -> None:
    torch.manual_seed(8)
    case = make(device, columns=1)
    assert matches(case, *case.run(), 32)


def test_every_byte_is_exact(device: torch.device) -> None:
    values = torch.arange(256, dtype=BYTES, device=device).reshape(1, 16, 16, 1)
    tokens = torch.zeros(256, 16, device=device)
    for dtype in TOLERANCE:
        weight = torch.full((1, 16), 2.0, dtype=dtype, device=device)
        out, _ = patch_embed(values, weight, tokens, patch=1, prefix=0, scale=0.5, config=SMALL)
        assert torch.equal(out[0, :, 3].cpu().float(), torch.arange(256.0) - 128)


def test_sums_in_float32_and_scales_before_rounding(device: torch.device) -> None:
    """Products of 127 by 64 overflow float16 after 9 of them; 3072 of them are scaled back."""
    image = torch.full((1, 32, 32, 3), 255, dtype=BYTES, device=device)
    weight = torch.full((3072, 16), 64.0, dtype=HALF, device=device)
    weight[1::2] = -63.0
    tokens = torch.full((1, 16), 0.125, device=device)
    out, _ = patch_embed(image, weight, tokens, patch=32, prefix=0, scale=2**-11, config=SMALL)
    assert torch.equal(out.cpu(), torch.full((1, 1, 16), 127 * 1536 / 2048 + 0.125).half())


@pytest.mark.parametrize("value", [1000.0, 6e4])
def test_statistics_are_of_rounded_values(value: float, device: torch.device) -> None:
    torch.manual_seed(3)
    case = make(device, SINGLE, columns=60)
    case.tokens += value
    case.tokens[2] = value
    out, stats = case.run()
    assert relative(out, case.expected()) < TOLERANCE[HALF]
    assert statistics_error(stats, out.flatten(0, 1), 32, one_pass=True) < EXACT


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_overflow_and_nan_stay_in_their_patch(device: torch.device) -> None:
    torch.manual_seed(4)
    case = make(device, SINGLE, columns=40)
    case.image[0, 1, 3, 9] = torch.nan
    case.image[1, 2, 15, 23] = 1e6  # infinite in float16
    case.tokens[4, 7] = 1e6
    out = case.run()[0].cpu()
    wanted = case.expected().half()
    assert out[0, 2].isnan().all()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    assert torch.equal(out[wanted.isinf()], wanted[wanted.isinf()])
    assert wanted.isinf()[:, 4, 7].all()
    clean = wanted.isfinite().all(dim=2)
    assert relative(out[clean], wanted[clean]) < TOLERANCE[HALF]


def test_compiles_and_exports(device: torch.device) -> None:
    class Embed(torch.nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return patch_embed(image, case.weight, case.tokens, patch=8, prefix=1, config=SMALL)

    torch.manual_seed(5)
    for image_dtype in (BYTES, SINGLE):
        case = make(device, image_dtype, count=3)
        expected = Embed()(case.image)
        exported = torch.export.export(
            Embed(), (case.image,), dynamic_shapes=({0: torch.export.Dim("images")},)
        )
        for model in (torch.compile(Embed(), fullgraph=True, backend="eager"), exported.module()):
            assert all(torch.equal(a, e) for a, e in zip(model(case.image), expected, strict=True))
        assert exported.module()(case.image[:2])[1].shape == (14, 2, 2)


def test_operator_is_a_good_citizen(device: torch.device) -> None:
    torch.manual_seed(6)
    case = make(device)
    inputs = (case.image, case.weight, case.tokens, 8, 1, 0.5, SMALL.as_list())
    torch.library.opcheck(_operator, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"image": torch.zeros(16, 24, 3)},
            "image must have the shape (any, any, any, any), not (16, 24, 3)",
        ),
        ({"image": torch.zeros(1, 16, 24, 3).int()}, "image must be uint8 or float32 or float16 or bfloat16"),
        ({"image": torch.zeros(2, 15, 24, 3).byte()}, "patches of 8 do not divide an image of 15 by 24"),
        ({"image": torch.zeros(2, 3, 16, 23)}, "patches of 8 do not divide an image of 16 by 23"),
        ({"image": torch.zeros(2, 16, 24, 4).byte()}, "weight must have the shape (256, any), not (192, 40)"),
        ({"weight": torch.zeros(192, 40)}, "weight must be float16 or bfloat16, not float32"),
        ({"tokens": torch.zeros(6, 40)}, "tokens must have the shape (7, 40), not (6, 40)"),
        ({"tokens": torch.zeros(7, 40).half()}, "tokens must be float32, not float16"),
        ({"patch": 0}, "patch must be positive and prefix not negative, not 0 and 1"),
        ({"prefix": -1}, "patch must be positive and prefix not negative, not 8 and -1"),
        ({"weight": torch.zeros(192, 40).half().to("meta")}, "tensors lie on different devices"),
    ],
)
def test_unsupported(change: dict[str, Tensor | int], message: str, device: torch.device) -> None:
    case = make(device)
    for name, value in change.items():
        movable = isinstance(value, Tensor) and not value.is_meta
        setattr(case, name, value.to(device) if movable else value)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match=r"^patch_embed: ") as caught:
        case.run()
    assert message in str(caught.value)
