from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vitdeploy.checkpoint.opening import Checkpoint, open_model

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]
Make = Callable[..., Any]

SETTINGS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 6,
    "layerscale_value": 0.5,
}


def plain(head: bool = True, **changes: Any) -> Any:
    kind = transformers.Dinov2ForImageClassification if head else transformers.Dinov2Model
    return kind(transformers.Dinov2Config(**(SETTINGS | changes)))


def with_registers(head: bool = True, **changes: Any) -> Any:
    kind = (
        transformers.Dinov2WithRegistersForImageClassification
        if head
        else transformers.Dinov2WithRegistersModel
    )
    return kind(transformers.Dinov2WithRegistersConfig(**(SETTINGS | {"num_register_tokens": 3} | changes)))


both = pytest.mark.parametrize("make", [plain, with_registers])


@both
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_swiglu_ffn": True}, {"qkv_bias": False, "hidden_act": "gelu_new"}, {"patch_size": 16}],
)
def test_logits_equal_transformers(save: Save, agree: Agree, make: Make, changes: dict[str, Any]) -> None:
    model = make(**changes)
    opened = agree(model, save(model))
    assert opened.family == model.config.model_type
    assert opened.config.pool == "cls_mean"
    assert opened.config.gated_mlp == bool(changes.get("use_swiglu_ffn"))


@pytest.mark.slow
@both
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56), (16, 64)])
def test_interpolated_positions_equal_transformers(
    save: Save, agree: Agree, make: Make, size: tuple[int, int]
) -> None:
    """(16, 64) has as many patches as the table, in another grid."""
    model = make()
    opened = agree(model, save(model), size)
    assert opened.state["pos_embed"].dtype == torch.float32


@both
def test_own_size_that_is_not_square_is_interpolated_too(save: Save, agree: Agree, make: Make) -> None:
    """Of 32x128 pixels transformers takes the 64 positions for 8x8, and interpolates them to 4x16."""
    model = make(image_size=[32, 128])
    opened = agree(model, save(model))
    assert any("interpolated" in note for note in opened.notes)


@both
def test_model_without_head(save: Save, agree: Agree, make: Make) -> None:
    model = make(head=False)
    opened = agree(model, save(model), output="tokens")
    assert opened.config.pool == "cls"
    assert opened.config.classes == 0


@both
def test_resolution_is_what_the_processor_feeds(save: Save, agree: Agree, make: Make) -> None:
    """The released models have a table for 518 pixels and a processor that crops 224."""
    model = make()
    folder = save(model)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}
    ).save_pretrained(folder)
    opened = agree(model, folder)
    assert opened.config.image_size == opened.preprocess.size == (48, 48)
    assert opened.preprocess.resize_edge == 56
    larger = open_model(str(folder), image_size=(96, 96))
    assert isinstance(larger, Checkpoint)
    assert (larger.preprocess.size, larger.preprocess.resize_edge) == ((96, 96), 112)


@both
@pytest.mark.parametrize("swiglu", [False, True])
def test_state_dict_in_memory_has_other_names(save: Save, make: Make, swiglu: bool) -> None:
    model = make(use_swiglu_ffn=swiglu)
    folder = save(model)
    from_file = open_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    from_memory = open_model(str(folder))
    assert isinstance(from_file, Checkpoint)
    assert isinstance(from_memory, Checkpoint)
    assert from_memory.config == from_file.config
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


@both
def test_class_defaults_fill_an_elder_configuration(save: Save, make: Make) -> None:
    folder = save(make(patch_size=14 if make is plain else 16, image_size=224, mlp_ratio=4))
    config = json.loads((folder / "config.json").read_text())
    for key in ("patch_size", "image_size", "mlp_ratio", "num_channels", "layer_norm_eps", "hidden_act"):
        del config[key]
    before = open_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    after = open_model(str(folder))
    assert isinstance(before, Checkpoint)
    assert isinstance(after, Checkpoint)
    assert after.config == before.config
