"""The fused kernels' rewrites compute the same function, in float64; rounding is what remains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import interpreter
from tests.helpers.models import CONFIGS, SMALL, pixels, random_vit
from vitdeploy.config import Preprocess, ViTConfig
from vitdeploy.errors import PrecisionError
from vitdeploy.model import folds, fused, rewrites
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.vit import Block

EXACT = 1e-12

assert interpreter  # imported before Triton is


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).item())


KERNELS = {name: c for name, c in CONFIGS.items() if not c.beyond_kernels(c.outputs[0])}


@pytest.mark.slow
@pytest.mark.parametrize("config", KERNELS.values(), ids=KERNELS)
@torch.no_grad()
def test_rewritten_blocks_over_a_centred_stream_give_the_same_output(config: ViTConfig) -> None:
    vit = random_vit(config)
    before = {name: p.clone() for name, p in vit.named_parameters()}
    images = pixels(config).double()
    embedding = rewrites.patches_to_gemm(folds.doubled(vit.embedding))
    x = fused.centre_embedding(embedding)(images)
    if embedding.pre_norm is not None:
        first = fused.centre_norm(embedding.pre_norm)
        x = first(F.layer_norm(x, x.shape[-1:], eps=config.norm_eps))
    assert x.mean(dim=-1).abs().max() < EXACT
    for part in vit.blocks:
        assert isinstance(part, Block)
        x = fused.rewrite(folds.doubled(part))(x)
        assert x.mean(dim=-1).abs().max() < EXACT * 100
    for output in config.outputs:
        if config.beyond_kernels(output):
            continue
        actual = copy.deepcopy(vit.readout).double()(x, output)
        assert worst(actual, forward_float64(vit, images, output)) < EXACT
    assert all(torch.equal(p, before[name]) for name, p in vit.named_parameters()), "the original changed"


@torch.no_grad()
def test_folded_norms_leave_nothing_to_the_norm() -> None:
    block = folds.doubled(random_vit(CONFIGS["deit3"]).blocks[0])
    assert isinstance(block, Block)
    folded = fused.fold_norms(block)
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    assert worst(folded(x), block(x)) < EXACT
    assert torch.equal(folded.norm1.weight, torch.ones(48).double())
    assert not folded.norm2.bias.any()


@torch.no_grad()
def test_pixels_that_count_from_128_give_the_same_tokens() -> None:
    config = CONFIGS["vit"]
    vit, spec = (
        random_vit(config),
        Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
    )
    images = torch.randint(0, 256, (2, *config.image_size, 3), dtype=torch.uint8)
    exact = rewrites.fold_normalisation(rewrites.patches_to_gemm(folds.doubled(vit.embedding)), spec)
    centred = fused.centre_embedding(exact)
    projected = fused.projection(
        centred.patch_embed.weight, centred.tokens.value, True, torch.float64, config.prefix_tokens
    )
    rows = exact(images.double()) - exact(images.double()).mean(dim=-1, keepdim=True)
    patches = images.double().reshape(2, 4, 8, 6, 8, 3).transpose(2, 3).reshape(2, 24, -1) - 128
    actual = patches @ projected.weight * projected.scale + projected.tokens[1:]
    assert worst(actual, rows[:, 1:]) < 1e-6  # tokens are rounded to float32
    assert 0.5 <= projected.weight.abs().max() <= 1
    assert projected.scale == 2.0 ** round(torch.tensor(projected.scale).log2().item())


def test_a_weight_beyond_fp16_is_named() -> None:
    vit = random_vit(CONFIGS["vit"])
    with torch.no_grad():
        block = vit.blocks[1]
        assert isinstance(block, Block)
        block.mlp.fc2.weight[0, 0] = 1e6
    with pytest.raises(PrecisionError, match=r"float16.*blocks\.1\.fc2\.weight"):
        fused.fuse(vit, torch.float16)
    fused.fuse(vit, torch.bfloat16)


def test_uint8_needs_its_preprocessing() -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        fused.fuse(random_vit(ViTConfig(**SMALL)), torch.float16, input_kind="uint8")
