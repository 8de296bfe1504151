"""BLIP's vision tower against transformers: alone, and out of every model that has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError
from vitdeploy.images.preprocess import published
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}


def tower(**changes: Any) -> Any:
    return transformers.BlipVisionModel(transformers.BlipVisionConfig(**(VISION | changes)))


def whole(kind: str) -> Any:
    config = transformers.BlipConfig(
        vision_config=VISION, text_config=TEXT, projection_dim=20, image_text_hidden_size=24
    )
    return getattr(transformers, kind)(config)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["features", "tokens"])
@pytest.mark.parametrize("size", [None, (24, 40)])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}])
def test_the_tower_equals_transformers(
    save: Save, agree: Agree, output: str, size: tuple[int, int] | None, changes: dict[str, Any]
) -> None:
    model = tower(**changes)
    opened = agree(model, save(model), size, output, interpolate_pos_encoding=size is not None)
    assert (opened.family, opened.config.classes) == ("blip", 0)
    assert opened.config.outputs[0] == "features"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "BlipModel",
        "BlipForConditionalGeneration",
        "BlipForImageTextRetrieval",
        "BlipForQuestionAnswering",
    ],
)
def test_the_tower_out_of_a_model_with_text(save: Save, agree: Agree, kind: str) -> None:
    model = whole(kind)
    folder = save(model)
    opened = agree(model.vision_model, folder, output="features")
    agree(model.vision_model, folder, (40, 24), "tokens", interpolate_pos_encoding=True)
    left_out = "BLIP's text model and what joins it to the images are left out"
    assert [note for note in opened.notes if "left out" in note] == [left_out]
    assert opened.config.projection == (20 if kind == "BlipModel" else 0)


def test_the_embedding_is_projected_where_the_model_projects(save: Save) -> None:
    model = whole("BlipModel")
    opened = open_model(str(save(model)))
    assert isinstance(opened, Checkpoint)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        theirs = model.double().get_image_features(pixels).pooler_output
    ours = forward_float64(build_reference(opened.config, opened.state), pixels, "embedding")
    assert (ours - theirs / theirs.norm(dim=-1, keepdim=True)).abs().max() <= 1e-10


def test_a_norm_applied_once_is_noticed(save: Save, agree: Agree) -> None:
    model = tower()
    opened = agree(model, save(model), output="features")
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    twice, once = (
        forward_float64(build_reference(config, opened.state), pixels, "features")
        for config in (opened.config, replace(opened.config, final_norm="tokens"))
    )
    assert (twice - once).abs().max() > 1e-2


def test_names_alone_tell_the_tower(save: Save) -> None:
    folder = save(whole("BlipForConditionalGeneration"))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_model(checkpoint=folder / "model.safetensors")


def test_what_is_missing_is_named_as_files_name_it(save: Save) -> None:
    folder = save(whole("BlipForQuestionAnswering"))
    state = load_file(folder / "model.safetensors")
    del state["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_model\.encoder\.layers\.1\.self_attn\.qkv\.bias"):
        open_model(str(folder))


@pytest.mark.slow
def test_published_towers_see_384_pixels(save: Save) -> None:
    spec = published("blip")
    assert (spec.size, spec.resample, round(spec.mean[0], 3)) == ((384, 384), "bicubic", 0.481)
    folder = save(tower(image_size=384, patch_size=192))
    config = (folder / "config.json").read_text().replace('"image_size": 384,', "")
    (folder / "config.json").write_text(config)
    opened = open_model(str(folder))
    assert isinstance(opened, Checkpoint)
    assert opened.config.image_size == opened.preprocess.size == (384, 384)


def test_photographs_are_seen_as_by_transformers(save: Save, seen_alike: Callable[..., None]) -> None:
    model = tower()
    processor = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    seen_alike(model, processor, save(model), "features")


@pytest.mark.slow
def test_an_export_computes_the_same(save: Save, exported: Callable[[Path, Tensor], Tensor]) -> None:
    model = tower()
    pixels = torch.randn(2, 3, 32, 32)
    answer = exported(save(model), pixels)
    with torch.inference_mode():
        theirs = model.double()(pixels.double()).pooler_output
    assert answer.shape == theirs.shape
    assert torch.linalg.vector_norm(answer - theirs) <= 1e-4 * torch.linalg.vector_norm(theirs)
