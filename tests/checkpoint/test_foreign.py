"""Checkpoints of other libraries: read whole, or refused with one line that names every problem."""

from __future__ import annotations

import contextlib
import json
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import TINY, edit_config, edit_weights, opened, refusal, save_tiny
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import open_model
from vitdeploy.errors import VitdeployError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "vit")


def test_folder_says_where_everything_is_from(folder: Path) -> None:
    checkpoint = opened(str(folder))
    assert checkpoint.family == "vit"
    assert checkpoint.source == str(folder)
    assert checkpoint.notes == ()
    assert set(checkpoint.provenance) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert all(len(digest) == 64 for digest in checkpoint.provenance.values())
    assert checkpoint.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_file_is_read_with_the_config_beside_it(folder: Path) -> None:
    from_file = opened(checkpoint=folder / "model.safetensors")
    assert from_file.config == opened(str(folder)).config


def test_config_of_something_else_beside_a_file_is_not_taken(folder: Path) -> None:
    state = load_file(ORACLES / "torchvision" / "vit.safetensors")
    (folder / "config.json").write_text('{"learning_rate": 0.1}')
    torch.save(state, folder / "best.pt")
    assert opened(checkpoint=folder / "best.pt").family == "torchvision"


def test_shards_are_one_checkpoint(folder: Path) -> None:
    whole = opened(str(folder))
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sharded = opened(str(folder))
    assert all(torch.equal(sharded.state[name], tensor) for name, tensor in whole.state.items())
    assert "model.safetensors.index.json" in sharded.provenance
    assert opened(checkpoint=folder / "model.safetensors.index.json").config == whole.config


def test_processor_of_another_size_gives_way_to_the_model(folder: Path) -> None:
    transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    checkpoint = opened(str(folder))
    assert checkpoint.config.image_size == (32, 32)
    assert checkpoint.notes == ("preprocessor_config.json feeds 64x64 pixels, config.json says 32x32",)


def test_without_processor_what_is_published_is_noted(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert opened(str(folder)).notes == (
        "no preprocessor_config.json: preprocessing is that of published vit models",
    )


def test_every_misfit_is_listed_in_one_error(folder: Path) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        for block in (0, 1):
            base = f"vit.encoder.layer.{block}"
            state[f"{base}.layernorm_befor.weight"] = state.pop(f"{base}.layernorm_before.weight")
            state[f"{base}.output.dense.weight"] = state[f"{base}.output.dense.weight"][:, :40].contiguous()
        del state["classifier.bias"]
        state["ema.step"] = torch.ones(1)

    edit_weights(folder, edit)
    message = refusal(str(folder)).message
    # Of many names, as many as an error has room for.
    assert "3 missing (vit.encoder.layer.{0,1}.layernorm_before.weight, 1 more)" in message
    assert "3 unexpected (ema.step, 1 more)" in message
    assert (
        "2 of the wrong shape (vit.encoder.layer.{0,1}.output.dense.weight is 32x40, must be 32x48)"
        in message
    )
    assert "did you mean 'vit.encoder.layer.{0,1}.layernorm_befor.weight'?" in message


@pytest.mark.slow
def test_of_many_names_some_are_told_and_the_rest_counted(folder: Path) -> None:
    """Every tensor of a 12-layer model under another name once took 5,940 characters."""

    def edit(state: dict[str, Tensor]) -> None:
        for name in list(state):
            for block in range(12):
                state[f"{name}.{block}.other"] = torch.ones(1)
                state[f"vit.encoder.layer.{block}.mixer.{name}"] = torch.ones(1)

    edit_weights(folder, edit)
    error = refusal(str(folder))
    assert len(error.message.replace(str(folder), "vit") + (error.hint or "")) <= 400
    assert "960 unexpected (" in error.message
    assert "more)" in error.message


def test_head_that_should_be_there_is_missed(folder: Path) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        del state["classifier.weight"], state["classifier.bias"]

    edit_weights(folder, edit)
    assert "2 missing (classifier.weight, classifier.bias)" in refusal(str(folder)).message
    edit_config(folder, id2label=None)
    assert "2 missing" in refusal(str(folder)).message
    edit_config(folder, architectures=["ViTModel"])
    assert opened(str(folder)).config.classes == 0


def test_architecture_that_the_config_does_not_describe(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    assert "16 unexpected (vit.encoder.layer.1." in refusal(str(folder)).message


@pytest.mark.parametrize(
    "value,count", [(float("nan"), "2 NaN"), (float("inf"), "2 infinite"), (float("-inf"), "2 infinite")]
)
def test_weights_that_are_not_finite_are_named(folder: Path, value: float, count: str) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        state["classifier.weight"][1, :2] = value
        state["vit.encoder.layer.1.attention.attention.query.bias"][3] = float("nan")

    edit_weights(folder, edit)
    message = refusal(str(folder)).message
    assert f"classifier.weight ({count} of 128)" in message
    assert "vit.encoder.layer.1.attention.attention.query.bias (1 NaN of 32)" in message


def test_weights_that_are_no_floats_are_named(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"classifier.bias": torch.ones(4, dtype=torch.int8)}))
    error = refusal(str(folder))
    assert "classifier.bias (int8)" in error.message
    assert "quantised" in (error.hint or "")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hidden_size": "32"}, "hidden_size must be a whole number, not '32'"),
        ({"hidden_size": True}, "hidden_size must be a whole number, not True"),
        ({"num_attention_heads": 0}, "0 heads do not make up hidden_size 32"),
        ({"num_attention_heads": 3}, "3 heads do not make up hidden_size 32"),
        ({"head_dim": 8}, "2 heads do not make up hidden_size 32"),
        ({"num_hidden_layers": 10**9}, "the configuration has 1000000000 blocks, the file only 40 tensors"),
        ({"intermediate_size": 10**18}, "impossibly large"),
        ({"patch_size": [8, 16]}, "patch_size [8, 16] is not square"),
        ({"image_size": "large"}, "image_size must be one or two whole numbers, not 'large'"),
        ({"image_size": 36}, "image size 36x36 is not divisible by the patch size 8"),
        ({"layer_norm_eps": None, "hidden_act": "gelu_pytorch"}, "did you mean 'gelu_pytorch_tanh'"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a number"),
        ({"model_type": "vitt"}, "model_type 'vitt' in config.json is not supported; did you mean 'vit'?"),
        ({"model_type": "yolos"}, "model_type 'yolos' in config.json is not supported"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "id2label has 2 labels, numbered 0 to 1, but the head has 4 classes",
        ),
        ({"id2label": {str(i): "x" for i in range(1, 5)}}, "4 labels, numbered 1 to 4"),
        ({"id2label": {"a": 0}}, "id2label must map class numbers to labels"),
        ({"id2label": ["a"]}, "id2label must map class numbers to labels"),
    ],
)
def test_config_that_is_wrong_is_one_clear_error(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    assert message in refusal(str(folder)).message


def test_unknown_model_type_points_to_the_generic_path(folder: Path) -> None:
    edit_config(folder, model_type="yolos")
    hint = refusal(str(folder)).hint or ""
    assert "vitdeploy list" in hint
    assert "--model module:function" in hint


def test_names_that_no_family_knows(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "resnet.safetensors")
    error = refusal(checkpoint=tmp_path / "resnet.safetensors")
    assert "no known family names its tensors like this: conv1.weight, fc.bias" in error.message
    assert "--model module:function" in (error.hint or "")


def test_expected_classes_are_compared(folder: Path) -> None:
    assert opened(str(folder), classes=4).config.classes == 4
    assert "has 4 classes, not 1000" in refusal(str(folder), classes=1000).message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_that_lacks_a_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert missing in refusal(str(folder)).message


def test_folder_with_other_weights_points_to_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    assert (refusal(str(folder)).hint or "").endswith("best.safetensors")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(checkpoint=tmp_path / "none").message
    for name in ("./none", "/none/at/all", "weights.safetensors", "a/b/c.npz"):
        assert f"{name}: no such file or folder" in refusal(name).message


def foreign_states(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Any] | None]]:
    """One checkpoint of each naming."""
    google = runpy.run_path(str(ORACLES / "google_npz.py"))["synthesise"](seed=1)
    states: list[tuple[dict[str, Tensor], dict[str, Any] | None]] = [
        (load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())),
        ({name: torch.from_numpy(array) for name, array in google.items()}, None),
        (load_file(ORACLES / "torchvision" / "representation.safetensors"), None),
        (dict(opened("deit_tiny_distilled_patch16_32").state), None),
    ]
    for case in ("timm/distilled", "timm/swiglu", "timm/registers_mean", "timm_beit/shared"):
        config = json.loads((ORACLES / case / "config.json").read_text())
        states.append((load_file(ORACLES / case / "model.safetensors"), config))
    states.append((load_file(ORACLES / "timm_beit" / "each" / "model.safetensors"), None))
    beit = transformers.BeitConfig(**TINY, vocab_size=9, use_shared_relative_position_bias=True)
    blip = transformers.BlipVisionConfig(**{k: v for k, v in TINY.items() if k != "num_labels"})
    for model in (transformers.BeitForMaskedImageModeling(beit), transformers.BlipVisionModel(blip)):
        model.save_pretrained(folder / "other")
        config = json.loads((folder / "other" / "config.json").read_text())
        states.append((load_file(folder / "other" / "model.safetensors"), config))
    return states


@pytest.mark.slow
def test_no_wrong_shape_or_setting_escapes_as_another_error(folder: Path, tmp_path: Path) -> None:
    dice = random.Random(1)
    shapes = [(), (0,), (1,), (3, 0), (1, 1, 1), (2, 3, 4, 5), (48,), (16, 16), (1, 17, 16)]
    values = [None, -1, 0, 3, 1e9, "x", True, [], {}, [1], {"a": 1}]
    path = tmp_path / "model.safetensors"
    for state, config in foreign_states(folder):
        for _ in range(25):
            changed, settings = dict(state), dict(config or {})
            for name in dice.sample(sorted(changed), dice.randint(1, 3)):
                changed[name] = torch.ones(dice.choice(shapes))
                if dice.random() < 0.3:
                    del changed[name]
            if settings:
                settings[dice.choice(sorted(settings))] = dice.choice(values)
                (tmp_path / "config.json").write_text(json.dumps(settings))
            save_file(changed, path)
            with contextlib.suppress(VitdeployError):
                open_model(checkpoint=path)
        (tmp_path / "config.json").unlink(missing_ok=True)
