"""What the user says beats what the files say: against transformers and timm."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.checkpoints import edit_config, opened, save_tiny
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import UserModule, open_model
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import Preprocess
from vitdeploy.errors import CheckpointError, UsageError
from vitdeploy.images.preprocess import PRESETS, apply
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SHORTER_256 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "imagenet": ("BitImageProcessor", {**SHORTER_256, **IMAGENET, "resample": 2}),
    "inception": ("ViTImageProcessor", {}),
    "clip": ("CLIPImageProcessor", {}),
    "openai": ("CLIPImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {**IMAGENET, "size": {"height": 256, "width": 256}}),
    "dinov2": ("BitImageProcessor", {**SHORTER_256, **IMAGENET}),
    "mae": ("ViTImageProcessor", IMAGENET),
    "swin": ("ViTImageProcessor", {**IMAGENET, "resample": 3}),
    "blip": ("BlipImageProcessor", {"size": {"height": 224, "width": 224}}),
}
"""What the presets' names stand for, as transformers computes it. DINOv3's processor needs torchvision:
families/test_dinov3.py has what it makes of photographs, recorded."""


def photo(width: int = 301, height: int = 270) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def processed(kind: str, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What a processor of transformers makes of the photo."""
    processor = getattr(transformers, f"{kind}Pil")(**settings)
    pixels: np.ndarray[Any, Any] = processor(photo(), return_tensors="np")["pixel_values"][0]
    return pixels


def close(spec: Preprocess, kind: str, settings: dict[str, Any]) -> None:
    np.testing.assert_allclose(apply(photo(), spec), processed(kind, settings), rtol=0, atol=1e-6)


def stated(path: Path, **facts: Any) -> Any:
    return opened(str(path), stated=Stated(**facts))


# --- preprocessing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"dinov3"}))
def test_presets_are_what_their_names_stand_for(name: str) -> None:
    close(Stated(preprocess=name).prepare(Preprocess())[0], *PROCESSORS[name])


@pytest.mark.parametrize(
    "said, kind, settings",
    [
        ({"mean": (0.1, 0.2, 0.3)}, "ViTImageProcessor", {"image_mean": [0.1, 0.2, 0.3]}),
        (
            {"mean": 0.25, "std": 0.125},
            "ViTImageProcessor",
            {"image_mean": [0.25] * 3, "image_std": [0.125] * 3},
        ),
        ({"resample": "bicubic"}, "ViTImageProcessor", {"resample": 3}),
        (
            {"resize": 256, "crop": 224},
            "BitImageProcessor",
            {**SHORTER_256, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ),
        (
            {"resize": (250, 230)},
            "DeiTImageProcessor",
            {"size": {"height": 250, "width": 230}, "crop_size": 224, "resample": 2},
        ),
        (
            {"crop": 0.875},  # timm's crop_pct: floor(224 / 0.875) is 256
            "BitImageProcessor",
            {**SHORTER_256, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ),
        (
            {"resize": "none"},
            "ViTImageProcessor",
            {"do_resize": False, "do_center_crop": True, "crop_size": 224},
        ),
        ({"preprocess": "clip", "mean": 0.5, "std": 0.5, "resize": "exact"}, "SiglipImageProcessor", {}),
    ],
)
def test_single_settings(said: dict[str, Any], kind: str, settings: dict[str, Any]) -> None:
    close(Stated(**said).prepare(Preprocess())[0], kind, settings)


@pytest.mark.parametrize("whole", [1, 1.0])
def test_a_crop_of_all_of_it(whole: float) -> None:
    """timm's crop_pct of 1.0: the shorter side becomes the model's size."""
    spec, _ = Stated(crop=whole).prepare(Preprocess())
    assert (spec.resize, spec.resize_edge) == ("shortest_edge", 224)


def test_files_of_transformers_timm_and_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    processor = transformers.BitImageProcessorPil(**PROCESSORS["dinov2"][1])
    path.write_text(processor.to_json_string())
    spec = Stated(preprocess=path).prepare(Preprocess())[0]
    close(spec, *PROCESSORS["dinov2"])
    path.write_text(json.dumps({"processor_class": "P", "image_processor": processor.to_dict()}))
    assert Stated(preprocess=path).prepare(Preprocess())[0] == spec
    timm = {"crop_pct": 0.875, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    for content in ({"pretrained_cfg": timm}, timm):
        path.write_text(json.dumps(content))
        said = Stated(preprocess=str(path)).prepare(Preprocess())[0]
        assert (said.resize_edge, said.resample, said.crop_rounding) == (256, "bilinear", "round")
    # Of our own settings, those that are left out stay as they were read.
    assert Stated(preprocess={"mean": [0.1, 0.2, 0.3]}).prepare(spec)[0].resize_edge == 256
    exact = Stated(preprocess={"preprocess": {"resize": "exact"}}).prepare(spec)[0]
    assert (exact.resize, exact.resize_edge, exact.mean) == ("exact", None, spec.mean)
    assert Stated(preprocess=spec).prepare(Preprocess(size=(448, 448)))[0].resize_edge == 512


@pytest.mark.parametrize(
    "said, words",
    [
        ({"mean": float("nan")}, "mean must be finite numbers"),
        ({"std": (0.2, float("inf"), 0.2)}, "std must be positive numbers"),
        ({"std": 0}, "std must be positive numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "of pixels from 0 to 255"),
    ],
)
def test_means_that_are_none(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Stated(**said)


@pytest.mark.parametrize(
    "said, words",
    [
        ({"preprocess": {"mean": [0.1]}}, "a number for each channel"),
        ({"preprocess": {"means": [0.1]}}, "no preprocessing of transformers, timm or a manifest"),
        ({"preprocess": {"resize": "sideways"}}, "preprocess.resize"),
        ({"preprocess": {"image_mean": [1], "image_processor_type": "OwlProcessor"}}, "is not supported"),
    ],
)
def test_wrong_settings(said: dict[str, Any], words: str) -> None:
    with pytest.raises((UsageError, CheckpointError), match=words):
        Stated(**said).prepare(Preprocess())[0]


def test_settings_that_cannot_be_read_are_no_matter_where_the_user_says_them(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "m")
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "OwlViTImageProcessor"}')
    with pytest.raises(CheckpointError, match="is not supported"):
        open_model(str(path))
    made = stated(path, preprocess="imagenet")
    assert made.preprocess.mean == (0.485, 0.456, 0.406)
    assert made.facts["preprocess"] == "user"
    assert not made.notes


# --- labels and scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text",
    [
        ("labels.txt", "cat\ndog\n\nowl\nfox \n"),
        ("labels.csv", "\ufeffcat\r\ndog\r\nowl\r\nfox\r\n"),
        ("labels.json", '["cat", "dog", "owl", "fox"]'),
        ("labels.json", '{"3": "fox", "0": "cat", "1": "dog", "2": "owl"}'),
        ("config.json", '{"id2label": {"0": "cat", "1": "dog", "2": "owl", "3": "fox"}, "x": 1}'),
    ],
)
def test_labels_of_a_file(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    made = stated(save_tiny(tmp_path / "m"), labels=file)
    assert (made.labels, made.facts["labels"]) == (("cat", "dog", "owl", "fox"), "user")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("l.txt", "cat\ndog\n", "2 labels, but the model has 4 classes"),
        ("l.txt", "\n", "there is no label in it"),
        ("l.json", "cat", "not a JSON list of labels"),
        ("l.json", '{"1": "a", "2": "b"}', "not a JSON list of labels"),
        ("l.json", '{"a": "b"}', "not a JSON list of labels"),
        ("l.json", "[1, 2, 3, 4]", "not a JSON list of labels"),
        ("l.json", "[" * 100_000, "not a JSON list of labels"),
    ],
)
def test_wrong_labels(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        stated(save_tiny(tmp_path / "m"), labels=tmp_path / name)


@pytest.mark.slow
@given(st.binary(max_size=200))
def test_any_bytes_as_labels(content: bytes) -> None:
    import tempfile

    for suffix in (".txt", ".json"):
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(content)
            file.flush()
            try:
                labels = Stated(labels=file.name).name_classes(None, None)
            except UsageError:
                continue
            assert labels


def test_labels_that_do_not_fit_the_file_are_replaced(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "m")
    edit_config(path, id2label={"0": "only"}, problem_type="unheard_of", hidden_act="unheard_of")
    made = stated(path, labels=list("abcd"), scores="sigmoid", activation="gelu")
    assert (made.labels, made.scores, made.config.activation) == (tuple("abcd"), "sigmoid", "gelu")
    assert {made.facts[name] for name in ("labels", "scores", "activation")} == {"user"}


# --- heads and activation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_heads_that_no_tensor_tells(tmp_path: Path) -> None:
    """timm's model with 8 heads of 16 columns: its weights alone are taken for 2 heads of 64."""
    case = ORACLES / "timm" / "vit"
    answer = load_file(case / "answer.safetensors")
    heads = json.loads((case / "config.json").read_text())["model_args"]["num_heads"]
    shutil.copy(case / "model.safetensors", tmp_path / "w.safetensors")
    guessed = opened(checkpoint=tmp_path / "w.safetensors")
    assert guessed.config.heads != heads
    assert any("number of heads" in note for note in guessed.notes)
    assert guessed.facts["heads"] == "default"
    said = opened(checkpoint=tmp_path / "w.safetensors", stated=Stated(heads=heads))
    assert not any("number of heads" in note for note in said.notes)
    output = forward_float64(build_reference(said.config, said.state), answer["pixels"])
    torch.testing.assert_close(output, answer["output"], rtol=0, atol=1e-10)


def test_activation_as_transformers_computes_it(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "m")
    edit_config(path, hidden_act="quick_gelu")
    model = transformers.ViTForImageClassification.from_pretrained(path).double().eval()
    edit_config(path, hidden_act="relu")
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    said = stated(path, activation="quick_gelu")
    with torch.inference_mode():
        expected = model(pixels).logits
    output = forward_float64(build_reference(said.config, said.state), pixels)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_an_activation_of_timms_that_is_unknown(tmp_path: Path) -> None:
    case = shutil.copytree(ORACLES / "timm" / "vit", tmp_path / "vit")
    content = json.loads((case / "config.json").read_text())
    content["model_args"]["act_layer"] = "unheard_of"
    (case / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="unheard_of"):
        open_model(str(case))
    assert stated(case, activation="silu").config.activation == "silu"


# --- where a model is from ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_where_each_fact_is_from(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "m")
    plain = opened(str(path))
    assert plain.facts == {
        **dict.fromkeys(("preprocess", "heads", "activation", "labels"), "checkpoint"),
        "scores": "default",
    }
    (path / "preprocessor_config.json").unlink()
    edit_config(path, problem_type="regression")
    assert opened(str(path)).facts["preprocess"] == "default"
    assert opened(str(path)).facts["scores"] == "checkpoint"
    assert stated(path, crop=0.9).facts == plain.facts | {
        "preprocess": "default",
        "scores": "checkpoint",
        "crop": "user",
        "resize": "user",
    }


def test_means_of_other_channels() -> None:
    grey, notes = Stated(preprocess="imagenet").prepare(Preprocess(), 1)
    assert grey.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert any("grey" in note for note in notes)
    assert Stated(mean=0.25).prepare(Preprocess(), 4)[0].mean == (0.25,) * 4
    two = Stated(mean=(0.1, 0.2), std=(0.3, 0.4))
    assert two.prepare(Preprocess(), 2)[0].std == (0.3, 0.4)
    with pytest.raises(UsageError, match="mean and std are of 2 channels, and the model has 3"):
        two.prepare(Preprocess())


def test_a_preset_leaves_the_turning_as_it_was(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "m")
    assert stated(path, preprocess="imagenet").facts["turn"] == "checkpoint"
    assert "turn" not in stated(path, preprocess={"mean": [0.1, 0.2, 0.3]}).facts


def test_a_module_of_the_users() -> None:
    module = torch.nn.Flatten()
    from vitdeploy.checkpoint.opening import user_module

    user = user_module(module, "m", (64, 64), Stated(preprocess="imagenet", labels=["a"], scores="none"))
    assert (user.preprocess.size, user.preprocess.resize_edge) == ((64, 64), 73)
    assert (user.labels, user.scores) == (("a",), "none")
    assert isinstance(user, UserModule)
    with pytest.raises(UsageError, match="m is exported as it is: its heads cannot be chosen"):
        user_module(module, "m", None, Stated(heads=2))


def test_the_hubs_revision_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    folder = save_tiny(tmp_path / "m")

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    hub = types.ModuleType("huggingface_hub")
    hub.__dict__["snapshot_download"] = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    open_model("owner/name", revision="abc", cache_dir=tmp_path / "cache")
    assert (asked[0]["name"], asked[0]["revision"], asked[0]["cache_dir"]) == (
        "owner/name",
        "abc",
        tmp_path / "cache",
    )
    with pytest.raises(UsageError, match="a revision goes with a hub id"):
        open_model(str(folder), revision="abc")


def test_weights_of_the_users_in_timms_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = ORACLES / "timm" / "vit"
    settings = json.loads((case / "config.json").read_text())["model_args"]
    answer = load_file(case / "answer.safetensors")

    class VisionTransformer(torch.nn.Module):
        """What vitdeploy asks of timm's class of this name."""

        def __init__(self) -> None:
            super().__init__()
            block = type("Block", (), {})()
            block.attn = types.SimpleNamespace(num_heads=settings["num_heads"])
            block.norm1 = types.SimpleNamespace(eps=1e-6)
            block.mlp = types.SimpleNamespace(act=torch.nn.GELU())
            self.blocks, self.global_pool, self.pool_include_prefix = [block], "token", False
            self.patch_embed = types.SimpleNamespace(img_size=(16, 16))
            self.pretrained_cfg = {
                "input_size": (3, 16, 16),
                "crop_pct": 0.5,
                "mean": (0.1, 0.2, 0.3),
                "label_names": ["of", "the", "pretrained", "head"],
            }

    def create_model(name: str, pretrained: bool) -> torch.nn.Module:
        assert not pretrained
        return VisionTransformer()

    library = types.ModuleType("timm")
    library.__dict__.update(
        list_models=lambda pretrained=False: ["vit_tiny_patch16_224"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    shutil.copy(case / "model.safetensors", tmp_path / "w.safetensors")
    made = opened("timm:vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors")
    assert (made.preprocess.resize_edge, made.preprocess.mean, made.labels) == (32, (0.1, 0.2, 0.3), None)
    output = forward_float64(build_reference(made.config, made.state), answer["pixels"])
    torch.testing.assert_close(output, answer["output"], rtol=0, atol=1e-10)
