from __future__ import annotations

import contextlib
import json
import random
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitdeploy.checkpoint import Checkpoint, UserModule, open_model, save_folder
from vitdeploy.config import Preprocess, variant_names
from vitdeploy.errors import CheckpointError, ConfigError, MissingDependency, UsageError, VitdeployError
from vitdeploy.model import build, expected_shapes, forward_float64

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What ``save_pretrained`` of a model and of its processor write."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def opened(name: str | None = None, **keywords: Any) -> Checkpoint:
    checkpoint = open_model(name, **keywords)
    assert isinstance(checkpoint, Checkpoint)
    assert {name: tuple(t.shape) for name, t in checkpoint.state.items()} == expected_shapes(
        checkpoint.config
    )
    assert checkpoint.preprocess.size == checkpoint.config.image_size
    return checkpoint


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(name: str | None = None, **keywords: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        open_model(name, **keywords)
    assert "\n" not in error.value.message
    return error.value


# --- named variants -------------------------------------------------------------------------------------


def test_default_is_the_reference_vit_b_16_with_random_weights() -> None:
    checkpoint = opened()
    assert (checkpoint.source, checkpoint.config.width, checkpoint.config.patch_size) == (
        "vit_base_patch16_224",
        768,
        16,
    )
    assert checkpoint.seed == 0
    assert checkpoint.provenance == {}
    assert checkpoint.notes == ("no checkpoint: the weights of vit_base_patch16_224 are random (seed 0)",)


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (opened("vit_tiny_patch16_32", seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(first.state[name], tensor) for name, tensor in again.state.items())
    assert not any(torch.equal(first.state[name], tensor) for name, tensor in other.state.items())


def test_random_weights_leave_no_part_of_the_model_out() -> None:
    checkpoint = opened("deit_tiny_distilled_patch16_64", image_size=(32, 48), classes=7)
    assert checkpoint.config.image_size == (32, 48)
    pixels = torch.randn(2, 3, 32, 48)
    logits = forward_float64(build(checkpoint.config, checkpoint.state), pixels)
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    for name in (name for name in checkpoint.state if not re.match(r"blocks\.(?!0\.)", name)):
        without = {**checkpoint.state, name: torch.zeros_like(checkpoint.state[name])}
        changed = forward_float64(build(checkpoint.config, without), pixels)
        # The key's bias adds the same to a row of scores, which softmax does not see.
        assert name.endswith("attn.k.bias") or (changed - logits).abs().max() > 1e-6, name


def test_unknown_names_get_a_suggestion() -> None:
    for name, guess in {
        "vit_base_patch16_225x": "vit_base_patch16_224",
        "digit": "digits",
        "b/16": "B/16",
    }.items():
        with pytest.raises((UsageError, CheckpointError)) as error:
            open_model(name)
        if isinstance(error.value, UsageError):
            assert f"did you mean '{guess}'" in error.value.message
    assert "B/16" in variant_names()


def test_negative_classes_and_indivisible_sizes() -> None:
    with pytest.raises(UsageError, match="classes must be at least 0"):
        open_model("B/16", classes=-1)
    with pytest.raises(ConfigError, match="225x224 is not divisible by the patch size 16") as error:
        open_model("B/16", image_size=(225, 224))
    assert error.value.hint == "nearest that is: 224x224"


# --- the shipped model ----------------------------------------------------------------------------------


def test_digits_opens_with_labels_and_preprocessing() -> None:
    checkpoint = opened("digits")
    assert checkpoint.labels == tuple("0123456789")
    assert checkpoint.config.classes == 10
    assert set(checkpoint.provenance) == {"config.json", "model.safetensors"}
    assert checkpoint.source == "digits"


# --- folders of transformers ----------------------------------------------------------------------------


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
    state = load_file(Path(__file__).parent / "oracles" / "torchvision" / "vit.safetensors")
    (folder / "config.json").write_text('{"learning_rate": 0.1}')
    torch.save(state, folder / "best.pt")
    assert opened(checkpoint=folder / "best.pt").family == "torchvision"


def test_shards_are_one_checkpoint(folder: Path) -> None:
    whole = opened(str(folder))
    model = ViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sharded = opened(str(folder))
    assert all(torch.equal(sharded.state[name], tensor) for name, tensor in whole.state.items())
    assert "model.safetensors.index.json" in sharded.provenance
    assert opened(checkpoint=folder / "model.safetensors.index.json").config == whole.config


def test_processor_of_another_size_gives_way_to_the_model(folder: Path) -> None:
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    checkpoint = opened(str(folder))
    assert checkpoint.config.image_size == (32, 32)
    assert checkpoint.notes == ("preprocessor_config.json feeds 64x64 pixels, config.json says 32x32",)


def test_without_processor_the_family_s_default_is_noted(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert opened(str(folder)).notes == ("no preprocessor_config.json: preprocessing is the default of vit",)


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
    assert "3 missing (vit.encoder.layer.{0,1}.layernorm_before.weight, classifier.bias)" in message
    assert "3 unexpected (ema.step, vit.encoder.layer.{0,1}.layernorm_befor.weight)" in message
    assert (
        "2 of the wrong shape (vit.encoder.layer.{0,1}.output.dense.weight is 32x40, must be 32x48)"
        in message
    )
    wrong, right = (f"'vit.encoder.layer.{{0,1}}.layernorm_{word}.weight'" for word in ("befor", "before"))
    assert f"did you mean {wrong} for {right}?" in message


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
        ({"model_type": "swin"}, "model_type 'swin' in config.json is not supported"),
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
    edit_config(folder, model_type="swin")
    hint = refusal(str(folder)).hint or ""
    assert "dinov2_with_registers" in hint
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


ORACLES = Path(__file__).parent / "oracles"


def foreign_states(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Any] | None]]:
    """One checkpoint of each naming."""
    google = runpy.run_path(str(ORACLES / "google_npz.py"))["synthesise"](seed=1)
    states: list[tuple[dict[str, Tensor], dict[str, Any] | None]] = [
        (load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())),
        ({name: torch.from_numpy(array) for name, array in google.items()}, None),
        (load_file(ORACLES / "torchvision" / "representation.safetensors"), None),
        (dict(opened("deit_tiny_distilled_patch16_32").state), None),
    ]
    for case in ("distilled", "swiglu", "registers_mean"):
        config = json.loads((ORACLES / "timm" / case / "config.json").read_text())
        states.append((load_file(ORACLES / "timm" / case / "model.safetensors"), config))
    return states


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


# --- a named variant beside a file ------------------------------------------------------------------------


def test_variant_gives_the_heads_and_size_and_the_file_the_rest(tmp_path: Path) -> None:
    source = opened("vit_tiny_patch16_64", classes=3, seed=4)
    save_folder(source, tmp_path)
    (tmp_path / "config.json").unlink()
    checkpoint = opened("vit_tiny_patch16_96", checkpoint=tmp_path / "model.safetensors")
    assert (checkpoint.config.heads, checkpoint.config.image_size, checkpoint.config.classes) == (
        3,
        (96, 96),
        3,
    )
    assert "positions interpolated from 64x64 to 96x96" in checkpoint.notes[-1]
    assert torch.equal(checkpoint.state["head.weight"], source.state["head.weight"])
    smaller = opened("vit_tiny_patch16_96", checkpoint=tmp_path / "model.safetensors", image_size=(32, 32))
    assert smaller.config.image_size == (32, 32)


def test_variant_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_folder(opened("vit_tiny_patch16_64"), tmp_path)
    message = refusal("B/32", checkpoint=tmp_path).message
    for difference in (
        "patch_size 16, not 32",
        "width 192, not 768",
        "heads 3, not 12",
        "mlp_width 768, not 3072",
    ):
        assert difference in message


def test_checkpoint_goes_with_variants_only(folder: Path) -> None:
    with pytest.raises(UsageError, match="--checkpoint goes with a named variant, not 'digits'"):
        open_model("digits", checkpoint=folder)


# --- our own folders --------------------------------------------------------------------------------------


def test_folder_of_ours_comes_back_as_it_was(tmp_path: Path) -> None:
    preprocess = Preprocess(
        (32, 48), resize="shortest_edge", resize_edge=40, resample="bicubic", mean=(0.1, 0.2, 0.3)
    )
    written = replace(
        opened("deit_tiny_distilled_patch16_64", image_size=(32, 48), classes=3),
        labels=("ä", "b", "c"),
        preprocess=preprocess,
    )
    save_folder(written, tmp_path / "new" / "folder")
    read = opened(str(tmp_path / "new" / "folder"))
    assert (read.config, read.preprocess, read.labels) == (written.config, preprocess, written.labels)
    assert read.notes == ()
    assert all(torch.equal(read.state[name], tensor) for name, tensor in written.state.items())


def test_weights_of_ours_alone_tell_their_shape(tmp_path: Path) -> None:
    written = opened("deit_tiny_distilled_patch16_64", classes=3)
    save_folder(written, tmp_path)
    (tmp_path / "config.json").unlink()
    assert opened(checkpoint=tmp_path / "model.safetensors").config == written.config


def test_bundle_is_opened_through_its_manifest(tmp_path: Path) -> None:
    written = opened("vit_tiny_patch16_64", classes=2)
    save_folder(written, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({**config, "labels": ["no", "yes"], "digest": "..."}))
    read = opened(str(tmp_path))
    assert (read.config, read.labels) == (written.config, ("no", "yes"))
    assert set(read.provenance) == {"manifest.json", "weights.safetensors"}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": ["one"]}, "1 labels, but the head has 2 classes"),
        ({"labels": "ab"}, "labels must be a list of strings"),
        ({"labels": [1, 2]}, "labels must be a list of strings"),
        ({"model": {"widht": 3}}, "model has no field 'widht'; did you mean 'width'?"),
        ({"model": {"width": "wide"}}, "model.width: Input should be a valid integer"),
        ({"model": {"width": 3, "heads": 2}}, "width 3 is not divisible by 2 heads"),
        ({"model": []}, "model must be an object, not []"),
        ({"preprocess": {"std": [1, 1]}}, "preprocess.std"),
        ({"preprocess": {"size": [0, 1]}}, "preprocess: "),
    ],
)
def test_config_of_ours_that_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_folder(opened("vit_tiny_patch16_64", classes=2), tmp_path)
    edit_config(tmp_path, **changes)
    assert message in refusal(str(tmp_path)).message


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize("pickled", [False, True])
def test_hub_id_is_taken_from_the_cache(cache: Path, folder: Path, pickled: bool) -> None:
    if pickled:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    repository = cache / "models--someone--tiny-vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "c0ffee")
    checkpoint = opened("someone/tiny-vit")
    assert checkpoint.source == "someone/tiny-vit"
    assert checkpoint.notes == ("hub revision c0ffee",)


def test_hub_out_of_reach_is_one_clear_error(cache: Path) -> None:
    error = refusal("someone/nothing")
    assert error.message.startswith(
        "'someone/nothing' is neither a local path nor to be had from the Hugging Face hub:"
    )
    assert "network" in (error.hint or "")


def test_hub_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match="huggingface-hub"):
        open_model("someone/tiny-vit")


# --- the user's own module ------------------------------------------------------------------------------

USER_CODE = """
import torch
def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).train()
def broken():
    raise RuntimeError("weights are on another disk")
def number():
    return 3
def with_argument(path):
    return path
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "their_model.py").write_text(USER_CODE)
    (tmp_path / "their_typo.py").write_text("import nothing_of_that_name")
    for name in ("their_model", "their_typo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_module_function_is_called(user_code: Path) -> None:
    path = list(sys.path)
    entry = open_model("their_model:make", image_size=(2, 2))
    assert isinstance(entry, UserModule)
    assert isinstance(entry.module, nn.Sequential)
    assert not entry.module.training
    assert (entry.source, entry.image_size) == ("their_model:make", (2, 2))
    assert sys.path == path


@pytest.mark.parametrize(
    "name,message",
    [
        ("their_modell:make", "cannot import their_modell: ModuleNotFoundError"),
        (
            "their_typo:make",
            "cannot import their_typo: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("their_model:mak", "has no function 'mak'; did you mean 'make'?"),
        ("their_model:torch", "has no function 'torch'"),
        ("their_model:broken", "failed: RuntimeError: weights are on another disk"),
        ("their_model:with_argument", "calling it without arguments failed: TypeError"),
        ("their_model:number", "it returned int, not a torch.nn.Module"),
    ],
)
def test_entry_that_does_not_work_is_one_clear_error(user_code: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        open_model(name)
    assert message in error.value.message
