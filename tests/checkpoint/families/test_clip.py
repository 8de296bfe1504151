from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers.checkpoints import edit_config, edit_weights, opened, refusal
from vitdeploy.checkpoint.opening import Checkpoint
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 20,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "max_position_embeddings": 8,
    "eos_token_id": 39,
}
SIZES = [None, (64, 64), (24, 56), (16, 64)]
"""The model's own; another; and two that are not square, the second of as many patches."""


def whole(**changes: Any) -> Any:
    config = transformers.CLIPConfig(vision_config=VISION | changes, text_config=TEXT, projection_dim=24)
    return transformers.CLIPModel(config)


def tower(kind: str, **changes: Any) -> Any:
    return getattr(transformers, kind)(transformers.CLIPVisionConfig(**(VISION | changes)))


def classifier(**changes: Any) -> Any:
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    config = transformers.CLIPConfig(vision_config=VISION | changes, text_config=TEXT, **labels)
    return transformers.CLIPForImageClassification(config)


def outputs(model: Any, **keywords: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """What CLIP's image tower returns, with its embedding as ``CLIPModel`` compares it with texts."""
    model = model.double().eval()
    inner = getattr(model, "vision_model", model)

    def run(pixels: Tensor) -> dict[str, Tensor]:
        answer = inner(pixels, **keywords)
        pooled = answer.pooler_output
        projected = model.visual_projection(pooled) if hasattr(model, "visual_projection") else pooled
        return {
            "features": pooled,
            "tokens": answer.last_hidden_state,
            "embedding": projected / projected.norm(dim=-1, keepdim=True),
        }

    return run


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_model_gives_its_image_tower(save: Save, agree_in_all: Agree, size: Any) -> None:
    model = whole()
    found = agree_in_all(outputs(model, interpolate_pos_encoding=True), save(model), size)
    assert (found.family, found.config.outputs[0]) == ("clip", "embedding")
    assert found.notes.count("the text model of the checkpoint is left out") == 1


def test_the_embedding_is_what_the_model_compares_with_texts(save: Save, agree_in_all: Agree) -> None:
    model = whole()
    folder = save(model)
    model = model.double()
    texts = torch.randint(0, 39, (2, 8))

    def run(pixels: Tensor) -> dict[str, Tensor]:
        return {"embedding": model(input_ids=texts, pixel_values=pixels).image_embeds}

    agree_in_all(run, folder)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 1, "patch_size": 16}]
)
def test_image_towers_alone(save: Save, agree_in_all: Agree, kind: str, changes: dict[str, Any]) -> None:
    model = tower(kind, **changes)
    found = agree_in_all(outputs(model), save(model))
    assert found.config.activation == changes.get("hidden_act", "quick_gelu")
    assert found.config.projection == (20 if kind.endswith("Projection") else 0)
    assert not any("dropped" in note for note in found.notes)


def test_an_image_tower_of_elder_files(save: Save, agree_in_all: Agree) -> None:
    """Until transformers 5.23 CLIPVisionModel had a prefix, and files held the numbers of positions."""
    model = tower("CLIPVisionModel")
    folder = save(model)

    def elder(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[f"vision_model.{name}"] = state.pop(name)
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    edit_weights(folder, elder)
    found = agree_in_all(outputs(model), folder)
    assert not any("dropped" in note for note in found.notes)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_a_classifier_reads_the_mean_of_the_patches(
    save: Save, agree_in_all: Agree, changes: dict[str, Any]
) -> None:
    model = classifier(**changes)
    folder = save(model)
    model = model.double()
    found = agree_in_all(lambda pixels: {"logits": model(pixels).logits}, folder)
    assert found.labels == ("cat", "dog", "owl")
    assert (found.config.pool, found.config.final_norm, found.config.projection) == ("mean", "none", 0)


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_classifier_at_other_sizes(save: Save, agree_in_all: Agree, size: tuple[int, int]) -> None:
    """CLIPForImageClassification hands the switch on to its tower, whose tokens its head then reads."""
    model = classifier()
    folder = save(model)
    inner, head = model.double().vision_model, model.classifier

    def run(pixels: Tensor) -> dict[str, Tensor]:
        tokens = inner(pixels, interpolate_pos_encoding=True).last_hidden_state
        return {"logits": head(tokens[:, 1:].mean(dim=1)), "tokens": tokens}

    agree_in_all(run, folder, size)


@pytest.mark.parametrize("make", [whole, lambda: tower("CLIPVisionModel"), classifier])
def test_a_file_alone_tells_all_but_heads_and_activation(save: Save, tmp_path: Path, make: Any) -> None:
    """Of 48 columns and 3 heads it is guessed that there is one; of published widths the guess is right."""
    folder = save(make())
    described = opened(str(folder))
    (folder / "config.json").unlink()
    alone = opened(checkpoint=folder / "model.safetensors")
    assert alone.family == "clip"
    assert vars(alone.config) == {**vars(described.config), "heads": 1}
    assert any("quick_gelu, as published clip models have" in note for note in alone.notes)
    assert any("--heads settles it" in note for note in alone.notes)


def test_preprocessing_is_that_of_published_models_or_of_the_processor(save: Save) -> None:
    folder = save(tower("CLIPVisionModel"))
    spec = opened(str(folder)).preprocess
    assert (spec.size, spec.resize_edge, spec.resample) == ((32, 32), 32, "bicubic")
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(folder)
    own = opened(str(folder)).preprocess
    assert (own.resize_edge, own.mean) == (40, (0.1, 0.2, 0.3))
    # A processor of images and texts together writes it into an object of another file.
    settings = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(f'{{"image_processor": {settings}}}')
    both = opened(str(folder))
    assert both.preprocess == own
    assert "processor_config.json" in both.provenance


def test_a_size_that_the_patch_does_not_divide(save: Save, agree_in_all: Agree) -> None:
    """transformers drops what is beyond the last whole patch."""
    model = tower("CLIPVisionModel", image_size=36)
    folder = save(model)
    error = refusal(str(folder))
    assert "feeds 36x36 pixels, of which patches of 8 use 32x32" in error.message
    assert "--image-size 32x32" in (error.hint or "")
    run = outputs(model)
    # The edge has no part in it.
    agree_in_all(
        lambda pixels: run(torch.nn.functional.pad(pixels, (0, 4, 0, 4), value=7.0)), folder, (32, 32)
    )


@pytest.mark.parametrize(
    "lost",
    [
        "visual_projection.weight",
        "vision_model.pre_layrnorm.weight",
        "vision_model.embeddings.class_embedding",
    ],
)
def test_what_is_missing_is_never_taken_for_another_model(save: Save, lost: str) -> None:
    folder = save(whole())
    edit_weights(folder, lambda state: state.pop(lost))
    assert f"1 missing ({lost})" in refusal(str(folder)).message


def test_another_activation_is_seen(save: Save) -> None:
    model = tower("CLIPVisionModelWithProjection")
    folder = save(model)
    edit_config(folder, hidden_act="gelu")
    wrong = opened(str(folder))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        right = outputs(model)(pixels)["embedding"]
    assert (forward_float64(build_reference(wrong.config, wrong.state), pixels) - right).abs().max() > 1e-3
