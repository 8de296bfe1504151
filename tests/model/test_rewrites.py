"""Every rewrite computes the same function: part by part and as a whole, in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import CONFIGS, SMALL, pixels, random_state, random_vit
from vitdeploy.config import InputKind, Output, Preprocess, ViTConfig
from vitdeploy.errors import PrecisionError
from vitdeploy.model import folds, rewrites
from vitdeploy.model.precision import PrecisionPlan, island_names, sites
from vitdeploy.model.reference import forward_float64, outputs_float64
from vitdeploy.model.registry import build_reference
from vitdeploy.model.rewrites import deploy, redeploy
from vitdeploy.model.vit import Block

EXACT = 1e-12


@functools.cache
def double_block(config: ViTConfig) -> Block:
    """A block that the tests share: no rewrite changes it."""
    block = random_vit(config).blocks[0]
    assert isinstance(block, Block)
    return block.double()


def tokens(config: ViTConfig, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, config.tokens, config.width), generator=generator, dtype=torch.float64)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).item())


BLOCKS = {name: c for name, c in CONFIGS.items() if name not in ("mean", "no_position")}


@pytest.mark.parametrize("rewrite", [*folds.BLOCK_REWRITES, rewrites.merge_qkv], ids=lambda r: r.__name__)
@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_each_block_rewrite_alone_is_exact(rewrite: object, config: ViTConfig) -> None:
    block, x = double_block(config), tokens(config)
    before = {name: p.clone() for name, p in block.named_parameters()}
    expected = block(x)
    if rewrite is rewrites.merge_qkv:  # builds on a block whose layer scale is already folded
        rewritten: nn.Module = rewrites.merge_qkv(folds.fold_layer_scale(block))
    else:
        rewritten = rewrite(block)  # type: ignore[operator]
    assert worst(rewritten(x), expected) < EXACT
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters()), "the original changed"


@pytest.mark.parametrize(
    "name, queries",
    [(name, n) for name, c in BLOCKS.items() for n in (1, 2) if not c.rotary or n <= c.prefix_tokens],
)
@torch.no_grad()
def test_absorbed_block_gives_the_tokens_that_are_read(name: str, queries: int) -> None:
    config = BLOCKS[name]
    block, x = double_block(config), tokens(config)
    absorbed = rewrites.absorb_last_block(folds.fold_layer_scale(block), queries)
    assert worst(absorbed(x), block(x)[:, :queries].flatten(0, 1)) < EXACT


@given(chosen=st.sets(st.sampled_from(folds.BLOCK_REWRITES)), name=st.sampled_from(sorted(BLOCKS)))
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_any_set_of_block_rewrites_is_exact(chosen: set[object], name: str) -> None:
    block, x = double_block(BLOCKS[name]), tokens(BLOCKS[name])
    expected = block(x)
    for rewrite in folds.BLOCK_REWRITES:
        if rewrite in chosen:
            block = rewrite(block)
    assert worst(block(x), expected) < EXACT


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_the_embedding_as_one_gemm_is_exact(config: ViTConfig) -> None:
    embedding, x = random_vit(config).embedding.double(), pixels(config).double()
    assert worst(rewrites.patches_to_gemm(embedding)(x), embedding(x)) < EXACT


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_the_whole_deployed_model_is_exact_for_every_output(config: ViTConfig, kind: str) -> None:
    vit = random_vit(config)
    spec = Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    raw = torch.randint(0, 256, (3, *config.image_size, 3), dtype=torch.uint8)
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
    normalised = ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    for output in (*config.outputs, "layer_0", f"layer_{config.depth - 1}"):
        expected = forward_float64(vit, normalised, output)
        input_kind = "uint8" if kind == "uint8" else "float"
        deployed = deploy(
            vit, PrecisionPlan.exact(), outputs=(output,), input_kind=input_kind, preprocess=spec
        )
        got = deployed(raw if kind == "uint8" else normalised)
        assert got.dtype == torch.float64
        assert worst(got, expected) < EXACT


@pytest.mark.parametrize("channels", [1, 2, 5])
@torch.no_grad()
def test_any_number_of_channels_is_exact(channels: int) -> None:
    config = replace(CONFIGS["vit"], channels=channels)
    vit, shares = random_vit(config), torch.linspace(0.2, 0.7, channels, dtype=torch.float64)
    spec = Preprocess(
        size=config.image_size, mean=tuple(shares.tolist()), std=tuple((1 - shares).tolist()), rescale=1 / 200
    )
    raw = torch.randint(0, 256, (3, *config.image_size, channels), dtype=torch.uint8)
    normalised = ((raw.double() / 200 - shares) / (1 - shares)).permute(0, 3, 1, 2)
    expected = forward_float64(vit, normalised)
    exactly = functools.partial(deploy, vit, PrecisionPlan.exact(), preprocess=spec)
    assert worst(exactly(input_kind="float")(normalised), expected) < EXACT
    assert worst(exactly(input_kind="uint8")(raw), expected) < EXACT


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_deployed_dtypes_are_the_plans(precision: str) -> None:
    config = CONFIGS["vit"]
    plan = PrecisionPlan.of(precision)  # type: ignore[arg-type]
    deployed = deploy(random_vit(config), plan)
    islands = island_names(deployed, plan)
    for name, module in sites(deployed):
        dtype = torch.float32 if name in islands else plan.default
        assert all(p.dtype == dtype for p in module.parameters(recurse=False)), name
    norms = {"norm", *(f"blocks.{i}.norm{k}" for i in range(config.depth) for k in (1, 2))}
    assert set(islands) == (set() if precision == "fp32" else norms)
    assert deployed(pixels(config)).dtype == torch.float32


def test_weights_are_rounded_once_from_float64() -> None:
    config = CONFIGS["vit"]
    vit = random_vit(config)
    merged = deploy(vit, PrecisionPlan.of("fp16")).blocks[0].attn.qkv.weight
    exact = vit.blocks[0].attn.q.weight.double() * config.head_width**-0.5
    assert torch.equal(merged[:, : config.width], exact.t().to(torch.float16))


def test_weights_beyond_fp16_are_named() -> None:
    vit = random_vit(CONFIGS["vit"])
    vit.blocks[1].mlp.fc1.weight[3, 4] = 70_000
    with pytest.raises(PrecisionError, match=r"blocks\.1\.mlp\.fc1\.weight \(largest magnitude 70000\)"):
        deploy(vit, PrecisionPlan.of("fp16"))
    deploy(vit, PrecisionPlan.of("bf16"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_several_outputs_of_one_graph_are_each_alone(config: ViTConfig) -> None:
    vit, x = random_vit(config), pixels(config).double()
    for outputs in ((*reversed(config.outputs), "layer_1"), ("layer_0", "features", "embedding")):
        deployed = deploy(vit, PrecisionPlan.exact(), outputs=outputs)
        expected = outputs_float64(vit, x, outputs)
        for output, got in zip(outputs, deployed(x), strict=True):
            assert worst(got, expected[output]) < EXACT, output
    assert deployed.outputs == outputs


@torch.no_grad()
def test_a_layer_is_all_that_is_read() -> None:
    config = CONFIGS["vit"]
    vit, x = random_vit(config), pixels(config).double()
    deployed = deploy(vit, PrecisionPlan.exact(), outputs=("layer_1",))
    assert len(deployed.blocks) == 2
    assert not list(deployed.readout.parameters())
    assert worst(deployed(x), forward_float64(vit, x, "layer_1")) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "features", "tokens", "layer_1"])
@pytest.mark.parametrize(
    "name",
    [
        *("vit", "distilled", "dinov2", "mean", "clip", "siglip", "dinov3", "beit", "hybrid", "hybrid_root"),
    ],
)
def test_reported_flops_are_those_pytorch_counts(name: str, output: Output) -> None:
    config = CONFIGS[name]
    vit, x = random_vit(config), pixels(config, 1)

    def counted(module: nn.Module, *args: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x, *args)
        return int(counter.get_total_flops())

    if output == "logits":
        assert counted(vit) == rewrites.forward_flops(config)
    absorbed = rewrites.queries_read(config, (output,))
    saved = {r.name: r.flops_saved for r in rewrites.applied_rewrites(config, (output,), "float")}
    assert ("absorb_last_block" in saved) == (absorbed is not None)
    deployed = deploy(vit, PrecisionPlan.of("fp32"), outputs=(output,))
    absorbing = saved.get("absorb_last_block", 0) + saved.get("absorb_probe", 0)
    assert counted(deployed) == counted(vit, output) - absorbing


def test_absorbing_saves_eight_percent_of_vit_b() -> None:
    config = ViTConfig()
    saved = rewrites._absorbed_flops(config, 1) / rewrites.forward_flops(config)
    assert 0.07 < saved < 0.09


def test_small_configs_cover_the_switches() -> None:
    assert SMALL["depth"] > 1, "the last block is special; another one must be there"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.channels == 3])
@torch.no_grad()
def test_another_size_of_the_same_weights_is_exact(name: str, kind: InputKind) -> None:
    """With what does not depend on the size taken from the first, which stays as it was."""
    config = CONFIGS[name]
    first = random_vit(config)
    other = config.at_size((3 * config.step, 2 * config.step))
    weights = random_state(other, seed=7)
    own = {key for key in weights if key == "pos_embed" or key.endswith("score_bias")}
    shared = {key: tensor for key, tensor in random_state(config).items() if key not in own}
    vit = build_reference(other, shared | {key: weights[key] for key in own})
    spec = Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    settings: dict[str, Any] = {"input_kind": kind, "preprocess": spec, "outputs": config.outputs[:1]}
    like = deploy(first, PrecisionPlan.exact(), **settings)
    model = redeploy(vit, like, PrecisionPlan.exact(), **settings)
    if kind == "float":
        images = pixels(other).double()
        normal = images
    else:
        images = torch.randint(0, 256, (3, *other.image_size, 3), dtype=torch.uint8)
        scale, shift = folds.normalisation(spec)
        normal = (images.double() * scale + shift).permute(0, 3, 1, 2)
    assert worst(model(images), forward_float64(vit, normal)) < EXACT
    if kind == "float":
        assert worst(like(pixels(config).double()), forward_float64(first, pixels(config))) < EXACT
