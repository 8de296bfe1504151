from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.checkpoints import edit_config, edit_weights, opened, refusal
from vitdeploy.checkpoint.opening import Checkpoint
from vitdeploy.model.reference import outputs_float64
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
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "max_position_embeddings": 8,
}
SIZES = [None, (64, 64), (24, 56), (16, 64)]
"""The model's own; another; and two that are not square, the second of as many patches."""


def whole(**changes: Any) -> Any:
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=VISION | changes, text_config=TEXT)
    )


def tower(**changes: Any) -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**(VISION | changes)))


def classifier(**changes: Any) -> Any:
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    config = transformers.SiglipConfig(vision_config=VISION | changes, text_config=TEXT, **labels)
    return transformers.SiglipForImageClassification(config)


def outputs(model: Any, **keywords: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    model = model.double().eval()
    inner = getattr(model, "vision_model", model)

    def run(pixels: Tensor) -> dict[str, Tensor]:
        answer = inner(pixels, **keywords)
        pooled = answer.pooler_output
        embedding = pooled / pooled.norm(dim=-1, keepdim=True)
        return {"features": pooled, "tokens": answer.last_hidden_state, "embedding": embedding}

    return run


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_model_gives_its_image_tower(save: Save, agree_in_all: Agree, size: Any) -> None:
    model = whole()
    found = agree_in_all(outputs(model, interpolate_pos_encoding=True), save(model), size)
    assert found.family == "siglip"
    assert (found.config.pool, found.config.activation, found.config.norm_eps) == ("probe", "gelu_tanh", 1e-6)
    assert found.notes.count("the text model of the checkpoint is left out") == 1


def test_the_embedding_is_what_the_model_compares_with_texts(save: Save, agree_in_all: Agree) -> None:
    model = whole()
    folder = save(model)
    model = model.double()
    texts = torch.randint(0, 39, (2, 8))

    def run(pixels: Tensor) -> dict[str, Tensor]:
        return {"embedding": model(input_ids=texts, pixel_values=pixels).image_embeds}

    agree_in_all(run, folder)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 1, "patch_size": 16}]
)
def test_an_image_tower_alone(save: Save, agree_in_all: Agree, changes: dict[str, Any]) -> None:
    model = tower(**changes)
    assert agree_in_all(outputs(model), save(model)).config.classes == 0


def test_an_image_tower_of_elder_files(save: Save, agree_in_all: Agree) -> None:
    """Until transformers 5.23 SiglipVisionModel had a prefix."""
    model = tower()
    folder = save(model)

    def elder(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[f"vision_model.{name}"] = state.pop(name)

    edit_weights(folder, elder)
    found = agree_in_all(outputs(model), folder)
    assert not any("dropped" in note for note in found.notes)


def test_a_model_that_does_not_pool(save: Save, agree_in_all: Agree) -> None:
    """As language models take it: its tokens are what is wanted."""
    model = tower(vision_use_head=False)
    folder = save(model)
    model = model.double()

    def run(pixels: Tensor) -> dict[str, Tensor]:
        tokens = model(pixels).last_hidden_state
        return {"tokens": tokens, "features": tokens.mean(dim=1)}

    found = agree_in_all(run, folder)
    assert any("vision_use_head is false" in note for note in found.notes)


@pytest.mark.parametrize("size", SIZES)
def test_a_classifier_reads_the_mean_of_the_tokens(save: Save, agree_in_all: Agree, size: Any) -> None:
    model = classifier()
    folder = save(model)
    model = model.double()
    found = agree_in_all(
        lambda pixels: {"logits": model(pixels, interpolate_pos_encoding=True).logits}, folder, size
    )
    assert found.labels == ("cat", "dog", "owl")
    assert any("the classifier reads" in note for note in found.notes)


@pytest.mark.parametrize("make", [whole, tower, classifier])
def test_a_file_alone_tells_all_but_heads_and_activation(save: Save, make: Any) -> None:
    folder = save(make())
    described = opened(str(folder))
    (folder / "config.json").unlink()
    alone = opened(checkpoint=folder / "model.safetensors")
    assert alone.family == "siglip"
    assert vars(alone.config) == {**vars(described.config), "heads": 1}
    assert any("gelu_tanh, as published siglip models have" in note for note in alone.notes)


def test_preprocessing_without_a_processor(save: Save) -> None:
    spec = opened(str(save(tower()))).preprocess
    assert (spec.size, spec.resize, spec.resample, spec.mean) == ((32, 32), "exact", "bicubic", (0.5,) * 3)


def test_a_size_that_the_patch_does_not_divide(save: Save, agree_in_all: Agree) -> None:
    """google/siglip-so400m-patch14-384 sees 378 of its 384 pixels."""
    model = tower(image_size=36)
    folder = save(model)
    assert "of which patches of 8 use 32x32" in refusal(str(folder)).message
    run = outputs(model)
    agree_in_all(lambda pixels: run(nn.functional.pad(pixels, (0, 4, 0, 4), value=7.0)), folder, (32, 32))


@pytest.mark.parametrize("alone", [True, False])
def test_naflex_is_refused_by_its_name(save: Save, alone: bool) -> None:
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
    if alone:
        model: Any = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
    else:
        model = transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=TEXT))
    folder = save(model)
    assert "SigLIP 2 NaFlex" in refusal(str(folder)).message
    (folder / "config.json").unlink()
    assert "SigLIP 2 NaFlex" in refusal(checkpoint=folder / "model.safetensors").message


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["vision_model.head.probe", "vision_model.embeddings.patch_embedding.bias"])
def test_what_is_missing_is_never_taken_for_another_model(save: Save, lost: str) -> None:
    folder = save(whole())
    edit_weights(folder, lambda state: state.pop(lost))
    assert f"1 missing ({lost})" in refusal(str(folder)).message


def test_a_pooling_without_its_residual_is_seen(
    save: Save, agree_in_all: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitdeploy.model.vit import ProbePool

    forward = ProbePool.forward

    def spoiled(self: ProbePool, x: Tensor) -> Tensor:
        attended: list[Tensor] = []
        with self.norm.register_forward_pre_hook(lambda module, inputs: attended.extend(inputs)):
            whole = forward(self, x)
        return whole - attended[0]

    model = tower()
    folder = save(model)
    monkeypatch.setattr(ProbePool, "forward", spoiled)
    with pytest.raises(AssertionError, match="features"):
        agree_in_all(outputs(model), folder)


def test_another_activation_is_seen(save: Save) -> None:
    model = tower()
    folder = save(model)
    edit_config(folder, hidden_act="gelu")
    wrong = opened(str(folder))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        right = outputs(model)(pixels)
    found = outputs_float64(build_reference(wrong.config, wrong.state), pixels, tuple(right))
    assert all((found[name] - answer).abs().max() > 1e-6 for name, answer in right.items())
