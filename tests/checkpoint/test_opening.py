"""Every name a model can be opened by."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.checkpoints import edit_config, opened, refusal, save_tiny
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, UserModule, open_model, random_state, save_folder
from vitdeploy.config import Preprocess, ViTConfig
from vitdeploy.errors import CheckpointError, ConfigError, MissingDependency, UsageError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference, expected_shapes
from vitdeploy.variants import decode_variant, variant_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "vit")


# --- named variants -------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (opened("vit_tiny_patch16_32", seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(first.state[name], tensor) for name, tensor in again.state.items())
    assert not any(torch.equal(first.state[name], tensor) for name, tensor in other.state.items())


@pytest.mark.slow
def test_random_weights_leave_no_part_of_the_model_out() -> None:
    checkpoint = opened("deit_tiny_distilled_patch16_64", image_size=(32, 48), classes=7)
    assert checkpoint.config.image_size == (32, 48)
    config = replace(checkpoint.config, depth=2)
    state, pixels = random_state(config, seed=0), torch.randn(2, 3, 32, 48)
    logits = forward_float64(build_reference(config, state), pixels)
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    every_part_shows(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["CLIP-B/32", "SigLIP-B/16", "DINOv3-S+/16", "BEiT-B/16", "EVA02-B/14", "BLIP-B/16"]
)
def test_random_weights_leave_no_part_of_a_family_out(name: str) -> None:
    variant = decode_variant(name)
    size = (2 * variant.patch_size, 3 * variant.patch_size)
    every_part_shows(replace(variant, image_size=size, width=48, heads=3, mlp_width=96, depth=2))


def every_part_shows(config: ViTConfig) -> None:
    """Without any one of its parameters the model answers otherwise; gains are near one."""
    state, images = random_state(config, seed=0), torch.randn(2, 3, *config.image_size)
    answers = forward_float64(build_reference(config, state), images, config.outputs[0])
    for name, tensor in state.items():
        gain = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale1", "scale2"))
        assert (tensor.mean() > 0.5) == gain, name
        without = {**state, name: torch.zeros_like(tensor)}
        changed = forward_float64(build_reference(config, without), images, config.outputs[0])
        # The key's bias adds the same to a row of scores, which softmax does not see.
        unseen = name.endswith((".attn.k.bias", "probe_pool.k.bias"))
        assert unseen or not torch.allclose(changed, answers, rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_a_family_s_images_are_made_as_its_published_models_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unfilled(config: ViTConfig, seed: int) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}

    monkeypatch.setattr("vitdeploy.checkpoint.opening.random_state", unfilled)
    clip, siglip, beit = (opened(name, classes=3) for name in ("CLIP-B/32", "SigLIP-B/16", "BEiT-B/16"))
    assert (clip.preprocess.resize, clip.preprocess.resample) == ("shortest_edge", "bicubic")
    assert clip.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (siglip.preprocess.resize, siglip.preprocess.resample) == ("exact", "bicubic")
    assert beit.preprocess == opened("B/16", classes=3).preprocess == Preprocess()
    assert clip.config.classes == 3


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


# --- a named variant beside a file ------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_variant_of_a_family_beside_its_checkpoint(tmp_path: Path) -> None:
    config = decode_variant("EVA02-Ti/14").at_size((28, 42))
    written = Checkpoint(config, random_state(config, 0), Preprocess((28, 42)), None, "vitdeploy", "eva")
    save_folder(written, tmp_path)
    assert opened("EVA02-Ti/14", checkpoint=tmp_path, image_size=(28, 42)).config == config
    assert config.rotary is not None
    otherwise = replace(config, rotary=replace(config.rotary, base=100.0))
    save_folder(replace(written, config=otherwise), tmp_path)
    assert opened("EVA02-Ti/14", checkpoint=tmp_path, image_size=(28, 42)).config == otherwise


@pytest.mark.slow
def test_variant_of_a_family_is_not_for_a_plain_checkpoint(tmp_path: Path) -> None:
    save_folder(opened("vit_tiny_patch14_28", classes=3), tmp_path)
    with pytest.raises(CheckpointError, match="another architecture than the variant named") as error:
        open_model("EVA02-Ti/14", checkpoint=tmp_path)
    assert "mlp_width 768, not 512; gated_mlp False, not True; rotary False, not True" in error.value.message


def test_checkpoint_goes_with_variants_only(folder: Path) -> None:
    with pytest.raises(
        UsageError,
        match="--checkpoint goes with a named variant, timm:NAME or torchvision:NAME, not 'digits'",
    ):
        open_model("digits", checkpoint=folder)


# --- our own folders --------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
def test_weights_of_ours_alone_tell_their_shape(tmp_path: Path) -> None:
    written = opened("deit_tiny_distilled_patch16_64", classes=3)
    save_folder(written, tmp_path)
    (tmp_path / "config.json").unlink()
    assert opened(checkpoint=tmp_path / "model.safetensors").config == written.config


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"preprocess": {"std": [1, 1]}}, "preprocess: mean and std must have a number for each channel"),
        ({"preprocess": {"std": [1, "x", 1]}}, "preprocess.std"),
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


@pytest.mark.parametrize("pickled", [False, True])
def test_open_clips_files_are_taken_from_the_hub(cache: Path, pickled: bool) -> None:
    repository = cache / "models--someone--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = repository / "snapshots" / "c0ffee"
    shutil.copytree(ORACLES / "open_clip" / "clip", snapshot)
    if pickled:
        state = load_file(snapshot / "open_clip_model.safetensors")
        (snapshot / "open_clip_model.safetensors").unlink()
        torch.save(state, snapshot / "open_clip_pytorch_model.bin")
    checkpoint = opened("someone/tiny-clip")
    assert checkpoint.family == "open_clip"
    assert "hub revision c0ffee" in checkpoint.notes


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
    assert (entry.source, entry.preprocess.size) == ("their_model:make", (2, 2))
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


def test_a_named_variant_leaves_channels_to_the_file(tmp_path: Path) -> None:
    config = replace(decode_variant("vit_tiny_patch16_32"), channels=1, depth=1)
    save_file(random_state(config, 0), tmp_path / "grey.safetensors")
    with pytest.raises(CheckpointError, match="depth 1, not 12"):
        open_model("vit_tiny_patch16_32", checkpoint=tmp_path / "grey.safetensors")
    save_file(random_state(replace(config, depth=12), 0), tmp_path / "grey.safetensors")
    checkpoint = opened("vit_tiny_patch16_32", checkpoint=tmp_path / "grey.safetensors")
    assert (checkpoint.config.channels, checkpoint.preprocess.mean) == (1, (0.5,))


def test_means_of_our_own_config_are_as_many_as_channels(tmp_path: Path) -> None:
    config = replace(decode_variant("vit_tiny_patch16_32"), channels=2, depth=1)
    spec = Preprocess((32, 32), mean=(0.1, 0.2), std=(0.3, 0.4))
    save_folder(Checkpoint(config, random_state(config, 0), spec, None, "vitdeploy", "two"), tmp_path)
    assert opened(str(tmp_path)).preprocess == spec
    edit_config(tmp_path, preprocess={"size": [32, 32]})
    assert "preprocess.mean has 3 numbers, but model.channels is 2" in refusal(str(tmp_path)).message
    edit_config(tmp_path, preprocess=None)
    assert opened(str(tmp_path)).preprocess.mean == (0.5, 0.5)
