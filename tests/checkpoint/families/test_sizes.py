"""One opening for several image sizes: each as the original computes it at that size, and as opened alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoint.families.conftest import EXACT
from vitdeploy.checkpoint.opening import Checkpoint, UserModule, open_model, user_module
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.checkpoint.texts.prompts import ZeroShot
from vitdeploy.config import Size, ViTConfig
from vitdeploy.errors import ConfigError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference, expected_shapes

Save = Callable[..., Path]
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
SIZES: tuple[Size, ...] = ((32, 32), (16, 16), (24, 56))
"""The checkpoint's own, a smaller one, one that is not square."""


def vit() -> tuple[Any, dict[str, Any]]:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)), {
        "interpolate_pos_encoding": True
    }


def dinov2() -> tuple[Any, dict[str, Any]]:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)), {}


def beit() -> tuple[Any, dict[str, Any]]:
    config = transformers.BeitConfig(**SMALL, use_relative_position_bias=True)
    return transformers.BeitForImageClassification(config), {"interpolate_pos_encoding": True}


@pytest.mark.slow
@pytest.mark.parametrize("order", [SIZES, (SIZES[2], SIZES[0], SIZES[1])])
@pytest.mark.parametrize("make", [vit, dinov2, beit])
def test_every_size_computes_what_transformers_computes(
    save: Save, make: Callable[[], tuple[Any, dict[str, Any]]], order: tuple[Size, ...]
) -> None:
    model, keywords = make()
    folder = save(model)
    opened = open_model(str(folder), image_size=order[0], further_sizes=order[1:])
    assert isinstance(opened, Checkpoint)
    assert [resized.config.image_size for resized in opened.further] == list(order[1:])
    model = model.double().eval()
    model.set_attn_implementation("sdpa")
    for one in (opened, *map(opened.at, opened.further)):
        pixels = torch.randn(2, 3, *one.config.image_size, dtype=torch.float64)
        with torch.inference_mode():
            theirs = model(pixels, **keywords).logits
        ours = forward_float64(build_reference(one.config, one.state), pixels)
        assert (ours - theirs).abs().max() <= EXACT
        alone = open_model(str(folder), image_size=one.config.image_size)
        assert isinstance(alone, Checkpoint)
        assert (one.config, one.preprocess) == (alone.config, alone.preprocess)
        assert all(torch.equal(one.state[name], tensor) for name, tensor in alone.state.items())


def test_tensors_that_do_not_change_are_shared(save: Save) -> None:
    opened = open_model(str(save(vit()[0])), image_size=SIZES[1], further_sizes=(SIZES[0], SIZES[2]))
    assert isinstance(opened, Checkpoint)
    for resized in opened.further:
        assert resized.state.keys() == {"pos_embed"}
        one = opened.at(resized)
        assert all(one.state[name] is opened.state[name] for name in one.state if name != "pos_embed")
    notes = [note for note in opened.notes if "interpolated" in note]
    assert [note.split(" as ")[0] for note in notes] == [
        "positions interpolated from 32x32 to 16x16 pixels",
        "positions interpolated from 32x32 to 24x56 pixels",
    ]


def test_the_planted_fault_of_another_sizes_positions_is_seen(save: Save) -> None:
    model, keywords = vit()
    opened = open_model(str(save(model)), image_size=(16, 64), further_sizes=((32, 32),))
    assert isinstance(opened, Checkpoint)
    (resized,) = opened.further
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        theirs = model.double().eval()(pixels, **keywords).logits
    ours = forward_float64(build_reference(resized.config, opened.state), pixels)  # as many, of another grid
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.slow
def test_random_weights_are_the_first_sizes() -> None:
    name = "vit_tiny_patch16_224"
    opened = open_model(name, image_size=(32, 32), further_sizes=((48, 16),))
    alone = open_model(name, image_size=(32, 32))
    assert isinstance(opened, Checkpoint)
    assert isinstance(alone, Checkpoint)
    assert all(torch.equal(opened.state[key], tensor) for key, tensor in alone.state.items())
    one = opened.at(opened.further[0])
    assert one.preprocess.size == (48, 16)
    assert {key: tuple(tensor.shape) for key, tensor in one.state.items()} == expected_shapes(one.config)


@pytest.mark.slow
def test_a_zero_shot_head_is_of_every_size(tmp_path: Path) -> None:
    from tests.helpers.text_checkpoints import LABELS, save_clip

    save_clip(tmp_path / "clip")
    opened = open_model(
        str(tmp_path / "clip"),
        image_size=(32, 32),
        further_sizes=((64, 32),),
        zero_shot=ZeroShot(LABELS),
    )
    assert isinstance(opened, Checkpoint)
    one = opened.at(opened.further[0])
    assert isinstance(one.config, ViTConfig)
    assert (one.config.classes, one.config.head_on) == (len(LABELS), "embedding")
    assert one.state["head.weight"] is opened.state["head.weight"]
    assert {key: tuple(tensor.shape) for key, tensor in one.state.items()} == expected_shapes(one.config)


@pytest.mark.parametrize(
    "stated, resize_edge",
    [
        (Stated(preprocess="imagenet"), [37, 73]),
        (Stated(resize=40), [40, 80]),
        (Stated(preprocess="imagenet", crop=0.5), None),
    ],
)
def test_pixels_that_are_said_are_those_of_the_first_size(
    stated: Stated, resize_edge: list[int] | None, save: Save
) -> None:
    """Another one keeps their share; what is no number of pixels is as if it were said of that size alone."""
    folder = str(save(vit()[0]))
    opened = open_model(folder, image_size=(32, 32), further_sizes=((64, 64),), stated=stated)
    assert isinstance(opened, Checkpoint)
    specs = [opened.preprocess, opened.further[0].preprocess]
    if resize_edge is not None:
        assert [spec.resize_edge for spec in specs] == resize_edge
    if stated.resize is None:
        alone = open_model(folder, image_size=(64, 64), stated=stated)
        assert isinstance(alone, Checkpoint)
        assert specs[1] == alone.preprocess


def test_a_module_of_ones_own_has_a_preprocessing_of_every_size() -> None:
    module = torch.nn.Conv2d(3, 8, 4)
    opened = user_module(module, "mine", (32, 32), Stated(preprocess="imagenet"), ((64, 48),))
    alone = user_module(module, "mine", (64, 48), Stated(preprocess="imagenet"))
    assert isinstance(opened, UserModule)
    assert opened.further == (alone.preprocess,)


def test_a_size_that_is_not_divisible_is_one_line(save: Save) -> None:
    with pytest.raises(ConfigError, match="image size 30x32 is not divisible by the patch size 8"):
        open_model(str(save(vit()[0])), image_size=(32, 32), further_sizes=((30, 32),))
