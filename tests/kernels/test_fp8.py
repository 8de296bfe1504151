"""8-bit floats: how they are rounded, their products, and plans with some of them, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_tools.sass import resources
from tests.helpers.interpreter import run_inside
from vitdeploy_kernels import reference
from vitdeploy_kernels.compile_pool import compile_all
from vitdeploy_kernels.config import Config, table_for
from vitdeploy_kernels.fp8 import (
    E4M3,
    Fp8Linear,
    launch_norm_quantise,
    launch_quantise,
    library_mm,
    scaled_mm,
)
from vitdeploy_kernels.fp8_planner import OPERATION
from vitdeploy_kernels.layernorm_linear import Folded
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.vit import Block, Linear, VitShape, VitWeights, random_weights

CONFIG = Config(block_m=2, warps=4, stages=1)
EPS = 1e-6


def q(x: Tensor) -> Tensor:
    """Rounded to E4M3 by torch, as float64; one rounding, of float32."""
    return x.float().clamp(-448, 448).to(E4M3).double()


def borders() -> Tensor:
    """Every number of the format, every midpoint of two, what float16 has next to them, infinities, NaN."""
    every = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middle = (every[1:] + every[:-1]) / 2
    some = torch.cat([every, middle, torch.tensor([449.0, 464.0, 480.0, 6e4, float("inf")])]).half()
    near = torch.cat([(some.view(torch.int16) + step).view(torch.float16) for step in (-1, 0, 1)])
    return torch.cat([near, -near])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs_to_the_last_bit(device: torch.device, dtype: torch.dtype) -> None:
    x = borders().to(dtype)
    out = torch.empty(x.shape, dtype=E4M3, device=device)
    run_inside(launch_quantise(x.to(device), out, 1.0))
    expected = x.float().clamp(-448, 448).to(E4M3)
    assert torch.equal(out.cpu().float().nan_to_num(999), expected.float().nan_to_num(999))


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_an_activation_is_applied_before(device: torch.device, activation: str) -> None:
    x = torch.randn(37, 145).half()  # more than one program has
    out = torch.empty(x.shape, dtype=E4M3, device=device)
    run_inside(launch_quantise(x.to(device), out, 8.0, activation))
    plain: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "gelu": F.gelu, "silu": F.silu}
    exact = 8 * plain[activation](x.double())
    assert off(out, exact) == 0


def off(actual: Tensor, exact: Tensor) -> float:
    """Share of the 8-bit numbers that are no rounding of what float32 may have made of the exact ones."""
    low, high = (q(exact * (1 + side * 2e-6) + side * 1e-5) for side in (-1, 1))
    got = actual.cpu().double()
    return float(((got != low) & (got != high)).double().mean())


def fp8_linear(depth: int, columns: int, device: torch.device, norm: bool, size: float = 1.0) -> Fp8Linear:
    """Random; its input is about as large as 448 input scales at most."""
    scale, step = 0.5 * depth**-0.5 / 100, 4 * size / 448
    weight = (torch.randn(columns, depth) * 100).clamp(-448, 448).to(E4M3).t()
    gain, shift = (1 + 0.1 * torch.randn(depth)) / step, 0.1 * torch.randn(depth) / step
    parts = (weight, 0.1 * torch.randn(columns).half(), torch.tensor(scale), torch.tensor(step))
    on = [part.to(device) for part in (*parts, gain, shift)]
    return Fp8Linear(on[0], on[1], on[2], on[3], 1 / step, *(on[4:] if norm else (None, None)))


@pytest.mark.parametrize("rows, width", [(5, 48), (3, 200)])
@pytest.mark.parametrize("branched", [True, False])
def test_the_norm_kernel_adds_centres_and_quantises(
    device: torch.device, rows: int, width: int, branched: bool
) -> None:
    x, branch = torch.randn(rows, width).half(), (torch.randn(rows, width) + 0.5).half()
    linear = fp8_linear(width, 32, device, norm=True)
    stream, out = x.clone().to(device), torch.empty(rows, width, dtype=E4M3, device=device)
    added, total = (branch.to(device), stream) if branched else (None, None)
    run_inside(launch_norm_quantise(stream, added, total, linear, out, eps=EPS, config=CONFIG))
    if branched:
        exact = x.double() + branch.double()
        exact -= exact.mean(dim=1, keepdim=True)
        assert torch.allclose(stream.cpu().double(), exact, rtol=1e-3, atol=1e-4)
    assert linear.gain is not None
    assert linear.shift is not None
    normed = reference.normalise(stream.cpu(), EPS) * linear.gain.cpu() + linear.shift.cpu()
    assert off(out, normed) == 0


def test_a_row_without_a_number_stays_without(device: torch.device) -> None:
    x = torch.randn(3, 48).half()
    x[1, 7], x[2, 0] = float("nan"), float("inf")
    linear, out = fp8_linear(48, 32, device, norm=True), torch.empty(3, 48, dtype=E4M3, device=device)
    launch_norm_quantise(x.to(device), None, None, linear, out, eps=EPS, config=CONFIG).run()
    assert out.cpu().float().isnan().any(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_is_exact_but_for_its_rounding(device: torch.device, out_dtype: torch.dtype) -> None:
    x, linear = (torch.randn(21, 64) * 100).to(E4M3), fp8_linear(64, 48, device, norm=False)
    linear = replace(linear, bias=linear.bias.to(out_dtype))
    out = torch.empty(21, 48, dtype=out_dtype, device=device)
    scaled_mm(x.to(device), linear, out)
    scale = linear.scale.double().cpu() * linear.input_scale.double().cpu()
    exact = x.double() @ linear.weight.cpu().double() * scale + linear.bias.cpu().double()
    assert torch.allclose(out.cpu().double(), exact, rtol=torch.finfo(out_dtype).eps, atol=1e-5)
    theirs = torch.empty_like(out)
    library_mm(x.to(device), linear, theirs)
    assert torch.allclose(
        theirs.cpu().double(), out.cpu().double(), rtol=2 * torch.finfo(out_dtype).eps, atol=1e-5
    )


SHAPE = VitShape(image_size=(16, 24), patch=8, width=32, depth=3, heads=2, mlp_width=48, classes=10)
FIELDS = ("qkv", "proj", "fc1", "fc2")


def with_fp8(weights: VitWeights, fields: tuple[str, ...], device: torch.device) -> VitWeights:
    """Random 8-bit layers in place of those of the first block, and of ``qkv`` alone in the second."""

    def changed(block: Block, names: tuple[str, ...]) -> Block:
        made = {}
        for name in names:
            depth, columns = getattr(block, name).weight.shape
            made[name] = fp8_linear(depth, columns, device, name in ("qkv", "fc1"))
        return replace(block, **made)

    first, second, *rest = weights.blocks
    return replace(weights, blocks=(changed(first, fields), changed(second, ("qkv",)), *rest))


def plain(shape: VitShape, weights: VitWeights, images: Tensor) -> Tensor:
    """The rows behind the blocks, in float64, each 8-bit product from what is rounded."""
    embedding = weights.embedding
    x = reference.patch_embed(
        images, embedding.weight.cpu(), embedding.tokens.cpu(), shape.patch, shape.prefix, embedding.scale
    )

    def behind_norm(x: Tensor, layer: Folded | Fp8Linear) -> Tensor:
        normed = reference.normalise(x, shape.eps)
        if isinstance(layer, Fp8Linear):
            assert layer.gain is not None
            assert layer.shift is not None
            return multiplied(normed * layer.gain.cpu() + layer.shift.cpu(), layer)
        return normed @ layer.weight.cpu().double() + layer.bias.cpu().double()

    def branch(x: Tensor, layer: Linear | Fp8Linear) -> Tensor:
        if isinstance(layer, Fp8Linear):
            return multiplied(x * layer.inverse, layer)
        return x @ layer.weight.cpu().double() + layer.bias.cpu().double()

    def multiplied(steps: Tensor, layer: Fp8Linear) -> Tensor:
        scale = layer.scale.double().cpu() * layer.input_scale.double().cpu()
        return q(steps) @ layer.weight.cpu().double() * scale + layer.bias.cpu().double()

    for block in weights.blocks:
        qkv = behind_norm(x, block.qkv)
        x = x + branch(reference.attention(qkv, shape.heads, shape.scale, None), block.proj)
        x = x + branch(F.gelu(behind_norm(x, block.fc1)), block.fc2)
    return x - x.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "fields", [some for some in product(*((name, "") for name in FIELDS)) if any(some)], ids="".join
)
def test_every_mixture_of_routes_computes_the_model(device: torch.device, fields: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    names = tuple(name for name in fields if name)
    shape = replace(SHAPE, queries=None, classes=0, depth=2)
    weights = with_fp8(random_weights(shape, torch.float16, device), names, device)
    runner = VitRunner(shape, weights, batches=[2], table=table_for(device), readout=Tensor.float)
    images = torch.randn(shape.image_shape(2))
    rows = runner(images.to(device)).cpu().double().reshape(-1, shape.width)
    expected = plain(shape, weights, images.half()).reshape(-1, shape.width)
    # A rounding that falls the other way, as fp16's own does now and then, moves a row by a part of a step.
    error = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) < 8e-3
    assert float(error.max()) < 5e-2
    operations = [step.operation for step in runner.plans[2].steps]
    assert operations.count(OPERATION) == len(names) + 1


def test_the_absorbed_block_reads_what_was_added(device: torch.device) -> None:
    torch.manual_seed(0)
    half = random_weights(SHAPE, torch.float16, device)
    weights = with_fp8(half, FIELDS, device)
    runner = VitRunner(SHAPE, weights, batches=[2], table=table_for(device))
    images = torch.randn(SHAPE.image_shape(2))
    logits = runner(images.to(device)).cpu()
    whole = replace(SHAPE, queries=None, classes=0, depth=2)
    rows = plain(whole, weights, images.half()).float().half()
    # The same last block behind rows that are handed to it, as the tokens of an image without patches.
    single, expected = replace(SHAPE, depth=1), []
    for image in rows:
        nothing = torch.zeros_like(weights.embedding.weight)
        embedding = replace(weights.embedding, weight=nothing, tokens=image.float().to(device))
        given = replace(weights, embedding=embedding, blocks=())
        runner_of_one = VitRunner(single, given, batches=[1], table=table_for(device))
        expected.append(runner_of_one(images[:1].to(device)).cpu())
    assert (logits - torch.cat(expected)).norm() / torch.cat(expected).norm() < 5e-2
    lines = "\n".join(runner.report)
    assert f"attn.qkv of 2 blocks: {OPERATION} in torch: cuBLASLt multiplies 8-bit floats" in lines


def test_the_kernels_compile_to_the_conversion_of_the_gpu() -> None:
    x, out = (torch.empty(64, 768, dtype=dtype, device="meta") for dtype in (torch.float16, E4M3))
    linear = fp8_linear(768, 16, torch.device("meta"), norm=True)
    made = (
        launch_norm_quantise(x, x, x, linear, out, eps=EPS, config=Config(1, warps=4, stages=1)),
        launch_quantise(x, out, 1.0, "gelu"),
    )
    compiled = compile_all((arch, launch) for arch in ("sm_89", "sm_90") for launch in made)
    assert len(compiled) == 4
    for result in compiled.values():
        assert "cvt.rn.satfinite.e4m3x2.f32" in result.ptx
        used = resources(result)
        assert (used.stack, used.spill_stores, used.spill_loads) == (0, 0, 0)
        assert used.programs >= 4
