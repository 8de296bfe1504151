"""Swin of both versions against transformers, at sizes that the windows divide or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers.checkpoints import edit_config
from tests.helpers.exact import Exact
from tests.helpers.swin_faults import FAULTS, of_the_wrong_block
from vitdeploy.backends.base import Options
from vitdeploy.backends.torch import Torch
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import BatchRange, SwinConfig
from vitdeploy.errors import CheckpointError, ConfigError, UsageError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]
VERSIONS = ("swin", "swinv2")
CLASSES: dict[str, Any] = {
    "swin": transformers.SwinForImageClassification,
    "swinv2": transformers.Swinv2ForImageClassification,
}


def tiny(version: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 3],
        "num_heads": [2, 4],
        "window_size": 4,
        "num_labels": 7,
    }
    make = transformers.SwinConfig if version == "swin" else transformers.Swinv2Config
    return make(**(settings | changes))


def classifier(version: str, **changes: Any) -> Any:
    return CLASSES[version](tiny(version, **changes))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(None, id="square"),
        pytest.param((64, 96), id="not square"),
        pytest.param((72, 104), id="padded"),
        pytest.param((68, 44), id="padded for merging"),
        pytest.param((32, 32), id="one window"),
        pytest.param((32, 64), id="one window along a side"),
    ],
)
def test_logits_equal_transformers(
    save: Save, agree: Agree, version: str, size: tuple[int, int] | None
) -> None:
    model = classifier(version)
    opened = agree(model, save(model), size)
    assert opened.family == version
    assert opened.config.image_size == (size or (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 5, "image_size": [56, 40]},
        {"qkv_bias": False, "hidden_act": "relu", "mlp_ratio": 2.5, "layer_norm_eps": 1e-3},
        {"num_channels": 1, "patch_size": 2, "image_size": 16},
        {"depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 3},
    ],
)
def test_switches_equal_transformers(save: Save, agree: Agree, version: str, changes: dict[str, Any]) -> None:
    model = classifier(version, **changes)
    agree(model, save(model))


@pytest.mark.slow
@pytest.mark.parametrize("measures", [(3, 0), (2, 6)])
def test_windows_of_the_pre_training_measure_offsets(
    save: Save, agree: Agree, measures: tuple[int, int]
) -> None:
    model = classifier("swinv2", pretrained_window_sizes=measures)
    agree(model, save(model), (72, 64))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (20, 64)])
def test_maps_smaller_than_a_window(save: Save, agree: Agree, size: tuple[int, int]) -> None:
    """Version 2 of transformers pads them, whatever they are; version 1 fails, and is refused."""
    model = classifier("swinv2")
    agree(model, save(model), size)
    small = classifier("swinv2", image_size=16)
    opened = agree(small, save(small), size)
    assert opened.config.windows == ((4, 4), (2, 2))
    first = classifier("swin")
    with pytest.raises(RuntimeError):
        first(torch.zeros(1, 3, *size))
    with pytest.raises(ConfigError) as caught:
        open_model(str(save(classifier("swin"))), image_size=size)
    assert "no side of an image may be less than 28 pixels" in (caught.value.hint or "")
    assert isinstance(open_model(str(save(classifier("swin"))), image_size=(28, 28)), Checkpoint)


@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_features_and_layers_equal_transformers(
    save: Save, agree_in_all: Callable[..., Checkpoint], version: str
) -> None:
    make = transformers.SwinModel if version == "swin" else transformers.Swinv2Model
    model = make(tiny(version))
    folder = save(model)
    model.double()
    seen: dict[str, Tensor] = {}
    blocks = [block for stage in model.encoder.layers for block in stage.blocks]
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, out, name=f"layer_{number}": seen.update({name: out[0]}))

    def theirs(pixels: Tensor) -> dict[str, Tensor]:
        answer = model(pixels)
        features = answer.pooler_output
        embedding = features / features.norm(dim=-1, keepdim=True)
        return {"features": features, "embedding": embedding, "tokens": answer.last_hidden_state, **seen}

    opened = agree_in_all(theirs, folder, (72, 60))
    assert isinstance(opened.config, SwinConfig)
    assert opened.config.outputs == ("features", "embedding", "tokens")
    assert {"layer_0", "layer_4"} <= seen.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_encoder_of_masked_image_modelling(save: Save, version: str) -> None:
    make = (
        transformers.SwinForMaskedImageModeling
        if version == "swin"
        else transformers.Swinv2ForMaskedImageModeling
    )
    model = make(tiny(version, encoder_stride=8))
    opened = open_model(str(save(model)))
    assert isinstance(opened, Checkpoint)
    assert any("image decoder" in note for note in opened.notes)
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode(), Exact():
        theirs = getattr(model.double(), version)(pixels).last_hidden_state
    ours = forward_float64(build_reference(opened.config, opened.state), pixels, "tokens")
    assert (ours - theirs).abs().max() <= 1e-10


def test_absolute_positions_are_interpolated(save: Save, agree: Agree) -> None:
    model = classifier("swin", use_absolute_embeddings=True)
    agree(model, save(model))
    model = classifier("swin", use_absolute_embeddings=True)
    opened = agree(model, save(model), (72, 60), interpolate_pos_encoding=True)
    assert "positions interpolated from 64x64 to 72x60 pixels as swin does" in opened.notes


def test_absolute_positions_of_version_2_are_refused(save: Save) -> None:
    model = classifier("swinv2", use_absolute_embeddings=True)
    with pytest.raises(RuntimeError, match="size"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(CheckpointError, match="use_absolute_embeddings is not supported in version 2"):
        open_model(str(save(model)))


@pytest.mark.parametrize("version", VERSIONS)
def test_state_dict_in_memory_has_other_names(save: Save, version: str) -> None:
    model = classifier(version)
    folder = save(model)
    from_file = open_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    from_memory = open_model(str(folder))
    assert isinstance(from_file, Checkpoint)
    assert isinstance(from_memory, Checkpoint)
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_photographs_are_seen_as_by_transformers(
    save: Save, seen_alike: Callable[..., None], version: str
) -> None:
    model = classifier(version)
    processor = transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}, resample=3)
    seen_alike(model, processor, save(model, 0.1), "logits")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depths": 4}, "depths must be whole numbers, not 4"),
        ({"depths": [2, "3"]}, "depths must be whole numbers"),
        ({"num_heads": [2, 4, 8]}, "heads has 3 entries for 2 stages"),
        ({"num_heads": [3, 4]}, "width 16 is not divisible by 3 heads"),
        ({"window_size": 0}, "windows must be at least 1"),
        ({"window_size": 20}, "stage 0 has windows of 20x20, but a map of 16x16"),
        ({"image_size": 66}, "image size 66x66 is not divisible by the patch size 4"),
        ({"patch_size": [4, 2]}, "patch_size [4, 2] is not square"),
    ],
)
def test_config_that_is_wrong_is_one_clear_error(save: Save, changes: dict[str, Any], message: str) -> None:
    folder = save(classifier("swin"))
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_model(str(folder))
    assert message in caught.value.message


def test_weights_alone_do_not_tell_the_windows(save: Save) -> None:
    folder = save(classifier("swin"))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json beside a Swin's weights"):
        open_model(checkpoint=folder / "model.safetensors")


def test_heads_of_stages_cannot_be_stated(save: Save) -> None:
    folder = save(classifier("swin"))
    with pytest.raises(UsageError, match="kind 'swin' has no heads to choose"):
        open_model(str(folder), stated=Stated(heads=4))


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_reference_is_noticed(
    save: Save,
    agree: Agree,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    model = classifier(version)
    folder = save(model)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        agree(model, folder)
    monkeypatch.undo()
    agree(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_biases_of_the_wrong_block_are_noticed(save: Save, agree: Agree, version: str) -> None:
    model = classifier(version)
    opened = agree(model, save(model))
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    right, faulty = (
        forward_float64(build_reference(opened.config, state), pixels)
        for state in (opened.state, of_the_wrong_block(opened.state))
    )
    assert (right - faulty).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_computes_the_same(
    save: Save, exported: Callable[[Path, Tensor], Tensor], version: str
) -> None:
    model = classifier(version)
    pixels = torch.randn(2, 3, 64, 64)
    answer = exported(save(model, 0.1), pixels)
    with torch.inference_mode():
        theirs = model.double()(pixels.double()).logits
    assert answer.shape == theirs.shape
    assert torch.linalg.vector_norm(answer - theirs) <= 1e-4 * torch.linalg.vector_norm(theirs)


@pytest.mark.slow
def test_reduced_precisions_and_eager_pytorch(save: Save, tmp_path: Path) -> None:
    """Version 2 with padded maps: every precision passes the gate, its cosines are declared islands."""
    model = classifier("swinv2", image_size=72)
    request = ExportRequest(
        model=save(model, 0.1), precisions=("fp16", "bf16"), batch=BatchRange(1, 2, 4), opset=17
    )
    bundle = run_export(request, tmp_path / "out.bundle")
    assert all(record.passed for record in bundle.manifest.parity)
    for artifact in bundle.manifest.artifacts:
        assert {f"blocks.{i}.attn.cosine" for i in range(5)} <= set(artifact.islands)
        assert not any(name.endswith((".qkv", ".fc1", ".add1")) for name in artifact.islands)
    pixels = torch.randn(3, 3, 72, 72)
    with torch.inference_mode():
        theirs = model.double()(pixels.double()).logits
    for artifact, tolerance in ((None, 1e-4), (bundle.artifact("bf16"), 0.1)):
        with Torch().load(bundle, artifact, Options()) as session:
            answer = torch.from_numpy(session.run({"pixel_values": pixels.numpy()})["logits"])
        assert torch.linalg.vector_norm(answer - theirs) <= tolerance * torch.linalg.vector_norm(theirs)
