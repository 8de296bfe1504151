"""ViT under other names: Masked Siamese Networks and the encoder of Masked Autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]
Size = tuple[int, int] | None
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}


def msn(head: bool = True, **changes: Any) -> Any:
    kind = transformers.ViTMSNForImageClassification if head else transformers.ViTMSNModel
    return kind(transformers.ViTMSNConfig(**(TINY | {"num_labels": 7} | changes)))


def mae(pre_training: bool = False, **changes: Any) -> Any:
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 20,
    }
    kind = transformers.ViTMAEForPreTraining if pre_training else transformers.ViTMAEModel
    return kind(transformers.ViTMAEConfig(**(TINY | decoder | {"mask_ratio": 0.0} | changes)))


def in_order(patches: int) -> torch.Tensor:
    """What keeps an autoencoder from shuffling patches."""
    return torch.arange(float(patches)).expand(2, -1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (48, 48), (24, 56)])
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "hidden_act": "gelu_new"}, {"image_size": [16, 64]}]
)
def test_logits_of_msn_equal_transformers(
    save: Save, agree: Agree, changes: dict[str, Any], size: Size
) -> None:
    model = msn(**changes)
    opened = agree(model, save(model), size, interpolate_pos_encoding=size is not None)
    assert (opened.family, opened.config.norm_eps) == ("vit_msn", 1e-6)


@pytest.mark.parametrize("size", [None, (24, 56)])
def test_tokens_of_msn_equal_transformers(save: Save, agree: Agree, size: Size) -> None:
    model = msn(head=False)
    opened = agree(model, save(model), size, "tokens", interpolate_pos_encoding=size is not None)
    assert opened.config.classes == 0


def test_elder_files_of_msn_have_one_prefix(save: Save) -> None:
    """transformers 5 writes the classifier's blocks without ``vit.``, version 4 with it."""
    folder = save(msn())
    state = load_file(folder / "model.safetensors")
    newer = open_model(str(folder))
    assert "encoder.layer.0.layernorm_before.weight" in state
    assert "vit.layernorm.weight" in state
    elder = {f"vit.{name}" if name.startswith("encoder.") else name: t for name, t in state.items()}
    save_file(elder, folder / "model.safetensors")
    opened = open_model(str(folder))
    assert isinstance(opened, Checkpoint)
    assert isinstance(newer, Checkpoint)
    assert opened.config == newer.config
    assert all(torch.equal(newer.state[name], tensor) for name, tensor in opened.state.items())


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_what_msn_is_missing_is_named_as_files_name_it(save: Save, prefix: str) -> None:
    folder = save(msn())
    state = load_file(folder / "model.safetensors")
    state = {f"{prefix}{n}" if n.startswith("encoder.") else n: t for n, t in state.items()}
    lost = f"{prefix}encoder.layer.1.layernorm_after.bias"
    del state[lost]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 missing \({lost}\)"):
        open_model(str(folder))


@pytest.mark.parametrize("size", [None, (48, 48), (24, 56)])
@pytest.mark.parametrize("changes", [{}, {"layer_norm_eps": 1e-3}, {"image_size": [16, 64]}])
def test_tokens_of_mae_equal_transformers(
    save: Save, agree: Agree, changes: dict[str, Any], size: Size
) -> None:
    model = mae(**changes)
    height, width = size or (32, 32)
    noise = in_order(height * width // 64)
    opened = agree(model, save(model), size, "tokens", noise=noise, interpolate_pos_encoding=size is not None)
    assert (opened.family, opened.config.position) == ("vit_mae", "learned")


def test_the_encoder_out_of_an_autoencoder(save: Save, agree: Agree) -> None:
    model = mae(pre_training=True)
    opened = agree(model.vit, save(model), None, "tokens", noise=in_order(16))
    assert opened.config.outputs == ("features", "embedding", "tokens")
    assert any("the image decoder of the checkpoint" in note for note in opened.notes)


@pytest.mark.parametrize("make", [msn, mae])
def test_state_dict_in_memory_has_other_names(save: Save, make: Callable[..., Any]) -> None:
    model = make()
    folder = save(model)
    from_file = open_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    from_memory = open_model(str(folder))
    assert isinstance(from_file, Checkpoint)
    assert isinstance(from_memory, Checkpoint)
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


def test_photographs_are_seen_as_by_transformers(save: Save, seen_alike: Callable[..., None]) -> None:
    processor = transformers.ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    model = msn()
    seen_alike(model, processor, save(model), "logits")
    model = mae()
    seen_alike(model, processor, save(model), "features", noise=in_order(16))
