from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]


def tiny(**changes: Any) -> transformers.ViTConfig:
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 7,
    }
    return transformers.ViTConfig(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_fast"},
        {"hidden_act": "quick_gelu"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu", "qkv_bias": False},
        {"image_size": [24, 48], "num_channels": 1},
        {"hidden_size": 64, "num_attention_heads": 2, "patch_size": 16, "num_hidden_layers": 1},
    ],
)
def test_logits_equal_transformers(save: Save, agree: Agree, changes: dict[str, Any]) -> None:
    model = transformers.ViTForImageClassification(tiny(**changes))
    assert agree(model, save(model)).family == "vit"


@pytest.mark.slow
def test_logits_of_full_size_equal_transformers(save: Save, agree: Agree) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    opened = agree(model, save(model, spread=0.02))
    assert sum(tensor.numel() for tensor in opened.state.values()) == 86_567_656


@pytest.mark.slow
@pytest.mark.parametrize("configured", [32, [32, 128]])
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56), (40, 32), (16, 64)])
def test_interpolated_positions_equal_transformers(
    save: Save, agree: Agree, configured: int | list[int], size: tuple[int, int]
) -> None:
    model = transformers.ViTForImageClassification(tiny(image_size=configured))
    opened = agree(model, save(model), size, interpolate_pos_encoding=True)
    assert opened.preprocess.size == size
    # 4x16 patches are taken for 8x8, which is what 64x64 pixels need.
    same = configured != 32 and size == (64, 64)
    assert opened.state["pos_embed"].dtype == (torch.float32 if same else torch.float64)


def test_grid_that_is_no_square_interpolates_from_itself(save: Save) -> None:
    """transformers refuses these; what is smooth before stays smooth."""
    model = transformers.ViTForImageClassification(tiny(image_size=[24, 48]))
    rows = torch.arange(3.0).repeat_interleave(6)
    folder = save(model)
    ramp = model.vit.embeddings.position_embeddings.data
    ramp[0, 1:] = rows[:, None]
    model.float().save_pretrained(folder)
    opened = open_model(str(folder), image_size=(48, 48))
    assert isinstance(opened, Checkpoint)
    table = opened.state["pos_embed"][1:].reshape(6, 6, -1)
    assert (table.diff(dim=0) > -0.2).all()
    assert table.diff(dim=1).abs().max() < 1e-12


def test_weights_of_half_precision_stay_as_they_are(save: Save, agree: Agree) -> None:
    model = transformers.ViTForImageClassification(tiny()).to(torch.bfloat16)
    opened = agree(model, save(model))
    assert {tensor.dtype for tensor in opened.state.values()} == {torch.bfloat16}


def test_model_without_head_leaves_its_pooler_out(save: Save, agree: Agree) -> None:
    model = transformers.ViTModel(tiny())
    opened = agree(model, save(model), output="tokens")
    assert opened.config.classes == 0
    assert opened.labels is None
    assert any("pooler" in note for note in opened.notes)


def test_masked_image_model_is_read_as_its_backbone(save: Save) -> None:
    opened = open_model(str(save(transformers.ViTForMaskedImageModeling(tiny()))))
    assert isinstance(opened, Checkpoint)
    assert opened.config.classes == 0
    assert any("decoder" in note for note in opened.notes)


def test_state_dict_in_memory_has_other_names(save: Save, tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification(
        tiny(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    )
    folder = save(model)
    torch.save(model.state_dict(), folder / "memory.pt")
    from_file, from_memory = open_model(str(folder)), open_model(checkpoint=folder / "memory.pt")
    assert isinstance(from_file, Checkpoint)
    assert isinstance(from_memory, Checkpoint)
    assert from_memory.config == from_file.config
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


@pytest.mark.slow
def test_weights_alone_need_a_variant(save: Save, agree: Agree) -> None:
    config = tiny(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=12)
    model = transformers.ViTForImageClassification(config)
    folder = save(model)
    whole = open_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json") as error:
        open_model(checkpoint=folder / "model.safetensors")
    assert "-m vit_base_patch16_224" in (error.value.hint or "")
    alone = open_model("vit_tiny_patch8_32", checkpoint=folder / "model.safetensors")
    assert isinstance(whole, Checkpoint)
    assert isinstance(alone, Checkpoint)
    assert alone.config == whole.config


def test_labels_stand_in_the_order_of_the_head(save: Save) -> None:
    names = {2: "third", 0: "first", 1: "second"}
    opened = open_model(str(save(transformers.ViTForImageClassification(tiny(num_labels=3, id2label=names)))))
    assert isinstance(opened, Checkpoint)
    assert opened.labels == ("first", "second", "third")
