"""Figures of every family: what applies has the model's shapes, what does not is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import qwens
from tests.helpers.models import CONFIGS, pixels, random_state
from tests.helpers.pictures import picture
from tests.helpers.swins import SWINS
from tests.helpers.weights_bundles import SPEC, write_weights
from vitdeploy.config import ModelConfig
from vitdeploy.explanation.looking import looker_of
from vitdeploy.explanation.precision import block_errors
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

VITS = (
    "vit",
    "distilled",
    "dinov2",
    "mean",
    "clip",
    "zero_shot",
    "siglip",
    "dinov3",
    "eva02",
    "beit",
    "hybrid",
)
HEADLESS = ("no_head", "beit_codes", "blip")


def looked(folder: Path, config: ModelConfig, **manifest: object) -> tuple:
    spec = replace(SPEC, size=config.image_size)
    bundle = write_weights(folder, config, preprocess=spec, **manifest)
    looker = looker_of(bundle, spec)
    return looker, looker.look("one", picture(0, (60, 80)))


@pytest.mark.parametrize("kind", [*VITS, *HEADLESS])
def test_vits(tmp_path: Path, kind: str) -> None:
    config = CONFIGS[kind]
    looker, image = looked(tmp_path / "bundle", config)
    assert image.picture.shape == (32, 48, 3)
    assert len(image.attention) == len(image.distances) == len(image.norms) == config.depth
    assert {maps.shape for maps in image.attention} == {(config.heads, *config.grid)}
    assert image.rollout.shape == config.grid
    assert {len(norms.prefix) for norms in image.norms} == {config.prefix_tokens}
    expected = 0 if kind in HEADLESS else 6 if config.head_on == "embedding" else 3
    assert len(image.relevance) == expected
    assert all(found.places.shape == config.grid and found.places.max() > 0 for found in image.relevance)
    said = {left.figure for left in looker.left_out()}
    assert ("relevance" in said) == (kind in HEADLESS)
    weights = looker.weights()
    assert (weights.positions is None) == ("similarity of positions" in said)
    assert weights.filters.shape[1] == 3
    assert len(weights.prefix) == config.prefix_tokens


@pytest.mark.parametrize("kind", ["v1", "padded", "padded_late", "v2_padded", "v2_no_head", "positions"])
def test_swins(tmp_path: Path, kind: str) -> None:
    config = SWINS[kind]
    looker, image = looked(tmp_path / "bundle", config)
    stages = [stage for stage, _ in config.blocks]
    assert [maps.shape for maps in image.attention] == [(config.heads[s], *config.maps[s]) for s in stages]
    assert [lengths.shape for lengths in image.lengths] == [config.maps[s] for s in stages]
    assert image.rollout is None
    assert image.relevance == ()
    assert looker.left_out()[0].figure == "rollout and relevance"
    window = 4 * config.patch_size
    assert all(0 < far < 2**0.5 * window * 2**s for s, heads in zip(stages, image.distances, strict=True)
               for far in heads)  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5", "qwen3"])
def test_qwens(tmp_path: Path, kind: str) -> None:
    config = qwens.CONFIGS[kind]
    looker, image = looked(tmp_path / "bundle", config, outputs=config.outputs, output=config.outputs[0])
    assert {maps.shape for maps in image.attention} == {(config.heads, *config.grid)}
    assert image.rollout.shape == config.grid
    assert image.rollout.sum() == pytest.approx(1)
    assert {left.figure for left in looker.left_out()} >= {"relevance"}


def test_qwens_places_are_where_the_pixels_are(tmp_path: Path) -> None:
    """A bright patch makes the token that lies there the longest, whatever the processor's order."""
    config = qwens.CONFIGS["qwen2"]
    state = {name: torch.zeros_like(tensor) for name, tensor in random_state(config).items()}
    state["patch_embed.weight"][:] = 1
    image = np.zeros((24, 40, 3), np.uint8)
    image[4 * 2 : 4 * 3, 4 * 7 : 4 * 8] = 255
    from PIL import Image

    spec = replace(SPEC, size=config.image_size, mean=(0.0,) * 3, std=(1.0,) * 3)
    bundle = write_weights(
        tmp_path / "bundle", config, state, preprocess=spec, outputs=config.outputs, output=config.outputs[0]
    )
    lengths = looker_of(bundle, spec).look("one", Image.fromarray(image)).lengths[0]
    assert np.unravel_index(lengths.argmax(), lengths.shape) == (2, 7)


@pytest.mark.parametrize("kind", ["vit", "mean", "dinov2"])
def test_predictions_are_the_model_s(tmp_path: Path, kind: str) -> None:
    config = CONFIGS[kind]
    looker, image = looked(tmp_path / "bundle", config, labels=tuple(f"l{i}" for i in range(10)))
    exact = forward_float64(looker.model, looker.pixels(picture(0, (60, 80))), "logits")[0]
    assert [found.index for found in image.predictions] == exact.argsort(descending=True)[:5].tolist()
    assert image.predictions[0].label == f"l{image.predictions[0].index}"
    assert image.predictions[0].score == pytest.approx(float(exact.softmax(dim=0).max()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIGS["vit"], CONFIGS["siglip"], SWINS["padded"]])
def test_errors_grow_with_coarser_numbers(tmp_path: Path, config: ModelConfig) -> None:
    spec = replace(SPEC, size=config.image_size)
    bundle = write_weights(
        tmp_path / "bundle", config, preprocess=spec, outputs=config.outputs[:1], output=config.outputs[0]
    )
    model = build_reference(config, random_state(config))
    fp32, fp16, bf16 = block_errors(model, bundle.manifest, pixels(config, 1))
    assert [errors.precision for errors in (fp32, fp16, bf16)] == ["fp32", "fp16", "bf16"]
    assert len(fp32.blocks) == config.depth
    for exact, half, brain in zip(fp32.blocks, fp16.blocks, bf16.blocks, strict=True):
        assert 0 < exact < 1e-5 < half < brain < 0.5
    assert 0 < fp32.output < fp16.output < bf16.output


def test_weights_that_do_not_fit_are_said(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    state = random_state(config)
    state["blocks.1.mlp.fc1.weight"][0, 0] = 1e6
    bundle = write_weights(tmp_path / "bundle", config, state)
    _, fp16, bf16 = block_errors(build_reference(config, state), bundle.manifest, pixels(config, 1))
    assert fp16.blocks == ()
    assert "do not fit into float16" in fp16.reason
    assert bf16.output is not None
