"""``timm:NAME`` and ``torchvision:NAME``: ViTs as their families read them, everything else as a module.

The libraries are not installed here: stand-ins build small networks, with what timm and torchvision say of
their own models (``tests/oracles/record_libraries.py``).
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, UserModule, open_model
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.errors import CheckpointError, MissingDependency, UsageError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.subject import subject_of
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

SAID = json.loads((ORACLES / "libraries.json").read_text())


class ResNet(nn.Module):
    """A small network with what a ResNet has: BatchNorm, a residual, a head named fc."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 4, stride=4, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        nn.init.zeros_(self.bn2.weight)  # as libraries do
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.fc(x.mean(dim=(2, 3)))


def stand_in_timm(monkeypatch: pytest.MonkeyPatch, built: list[dict[str, Any]] | None = None) -> None:
    def create_model(name: str, pretrained: bool, num_classes: int | None = None) -> nn.Module:
        if built is not None:
            built.append({"name": name, "pretrained": pretrained, "num_classes": num_classes})
        said = SAID["timm"][name]
        classes = said["num_classes"] if num_classes is None else num_classes
        model: Any = type(said["kind"], (ResNet,), {})(classes or 5)
        model.pretrained_cfg, model.num_classes = said["pretrained_cfg"], classes
        if not classes:
            model.fc = nn.Identity()
        if said["kind"] == "VisionTransformer":
            model.blocks = nn.ModuleList([type("DiffBlock", (nn.Identity,), {})()])
            model.set_input_size = sized
        return model.train()

    def sized(size: tuple[int, int]) -> None:
        assert size[0] % 16 == 0, "Input height (100) should be divisible by patch size (16)"

    class ImageNetInfo:
        def __init__(self, subset: str) -> None:
            assert subset == "imagenet-1k"

        def label_descriptions(self) -> list[str]:
            return [*SAID["timm"]["resnet50"]["labels"], *(f"class {i}" for i in range(3, 1000))]

    library, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    library.__dict__.update(
        list_models=lambda pretrained=False: list(SAID["timm"]), create_model=create_model
    )
    data.__dict__.update(
        infer_imagenet_subset=lambda model: "imagenet-1k" if model.num_classes == 1000 else None,
        ImageNetInfo=ImageNetInfo,
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    monkeypatch.setitem(sys.modules, "timm.data", data)


def stand_in_torchvision(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., nn.Module] = ResNet
) -> list[Any]:
    """Returns the weights that it was asked for."""

    def transforms_of(settings: dict[str, Any]) -> Callable[[], Any]:
        made = types.SimpleNamespace(**settings)
        made.interpolation = types.SimpleNamespace(value=settings["interpolation"])
        return lambda: made

    def get_model_weights(name: str) -> Any:
        members = dict(SAID["torchvision"][name]["weights"])
        members["DEFAULT"] = members[SAID["torchvision"][name]["default"]]  # an alias, as in torchvision

        class Weights(enum.Enum):
            def transforms(self) -> Any:
                return transforms_of(self.value["transforms"])()

            @property
            def meta(self) -> dict[str, Any]:
                return {"categories": [*self.value["categories"], *(f"class {i}" for i in range(3, 1000))]}

        return Weights(f"{name}_Weights", members)  # type: ignore[call-overload]

    asked: list[Any] = []

    def get_model(name: str, weights: Any, num_classes: int = 1000) -> nn.Module:
        asked.append(weights if weights is None else weights.name)
        return make(num_classes)

    library, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.__dict__.update(
        list_models=lambda module: list(SAID["torchvision"]) if module is models else ["fcn_resnet50"],
        get_model=get_model,
        get_model_weights=get_model_weights,
    )
    library.__dict__["models"] = models
    monkeypatch.setitem(sys.modules, "torchvision", library)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return asked


def opened(name: str, **arguments: Any) -> UserModule:
    found = open_model(name, **arguments)
    assert isinstance(found, UserModule)
    assert not found.module.training
    return found


# --- timm --------------------------------------------------------------------------------------------------


def test_a_cnn_of_timm_is_a_module_with_its_own_labels_and_preprocessing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_timm(monkeypatch)
    model = opened("timm:resnet50")
    assert (model.source, model.family, model.output, model.seed) == ("timm:resnet50", "timm", "logits", None)
    spec = model.preprocess
    # crop_pct 0.95, bicubic, ImageNet's numbers: what its pretrained_cfg says.
    assert (spec.size, spec.resize, spec.resize_edge, spec.resample) == (
        (224, 224),
        "shortest_edge",
        235,
        "bicubic",
    )
    assert (spec.mean, spec.exif) == ((0.485, 0.456, 0.406), False)
    assert model.labels is not None
    assert (len(model.labels), model.labels[0]) == (1000, "tench, Tinca tinca")
    assert model.facts == {"preprocess": "checkpoint", "labels": "checkpoint", "scores": "default"}
    (note,) = model.notes
    assert note == (
        "timm builds resnet50 as ResNet, which vitdeploy does not rewrite: it is exported as it is, with the "
        "same proof but no rewrites and no kernels"
    )


def test_a_look_alike_of_a_vit_is_a_module_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_timm(monkeypatch)
    model = opened("timm:vit_dwee_patch16_reg1_gap_256", image_size=(128, 160))
    assert "timm builds vit_dwee_patch16_reg1_gap_256 as VisionTransformer of DiffBlock" in model.notes[0]
    assert "no rewrites" in model.notes[0]
    assert (model.preprocess.size, model.preprocess.resize) == ((128, 160), "cover")
    with pytest.raises(UsageError, match="cannot be made for 100x128 pixels: Input height"):
        opened("timm:vit_dwee_patch16_reg1_gap_256", image_size=(100, 128))


def test_several_sizes_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_timm(monkeypatch)
    sizes = {"image_size": (224, 224), "further_sizes": ((160, 192),)}
    (other,) = opened("timm:resnet50", **sizes).further
    assert (other.size, other.resize, other.resize_to, other.mean[0]) == (
        (160, 192),
        "cover",
        (168, 201),
        0.485,
    )
    with pytest.raises(UsageError, match="made for one image size at a time"):
        open_model("timm:vit_dwee_patch16_reg1_gap_256", **sizes)


def test_what_has_no_head_gives_features(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_timm(monkeypatch)
    model = opened("timm:convnext_tiny.dinov3_lvd1689m")
    subject = subject_of(model, (), "float")
    assert (subject.outputs, model.labels) == (("features",), None)
    assert subject.reference(torch.zeros(2, 3, 224, 224))["features"].shape == (2, 6)
    with pytest.raises(UsageError, match="gives what it returns, features; logits cannot be chosen"):
        subject_of(model, ("logits",), "float")


def test_random_weights_need_no_network_and_leave_nothing_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    stand_in_timm(monkeypatch, built)
    state = torch.get_rng_state()
    model, same, other = (opened("timm:resnet50", random=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(call["pretrained"] for call in built)
    assert (model.seed, model.labels) == (3, None)
    assert "no checkpoint: the weights of timm:resnet50 are random (seed 3)" in model.notes
    ours, again, others = (dict(m.module.state_dict()) for m in (model, same, other))
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())
    assert not torch.equal(others["conv1.weight"], ours["conv1.weight"])
    for name in ("bn2.weight", "bn1.running_mean", "bn1.running_var", "bn2.bias"):
        assert ours[name].unique().numel() == 6, name


def test_what_has_weights_of_its_own_cannot_be_random(tmp_path: Path) -> None:
    for name, checkpoint in (("digits", None), ("timm:resnet50", tmp_path)):
        with pytest.raises(UsageError, match="cannot be random"):
            open_model(name, checkpoint=checkpoint, random=True)
    assert isinstance(open_model("vit_tiny_patch16_224", random=True, image_size=(32, 32)), Checkpoint)


# --- weights of a file -------------------------------------------------------------------------------------


def trained(classes: int) -> ResNet:
    torch.manual_seed(classes)
    model = ResNet(classes)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.bn1.running_mean, model.bn2.running_var):
            assert isinstance(tensor, Tensor)
            tensor.add_(torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
@pytest.mark.parametrize("head", ["fc", "fc.1"])
def test_a_file_gives_weights_and_the_number_of_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, prefix: str, head: str
) -> None:
    built: list[dict[str, Any]] = []
    stand_in_timm(monkeypatch, built)
    asked = stand_in_torchvision(monkeypatch)
    model = trained(7)
    state = {prefix + name.replace("fc.", f"{head}."): tensor for name, tensor in model.state_dict().items()}
    other = {"loss.centre": torch.zeros(3)} if prefix else {}
    torch.save({"state_dict": state | other}, tmp_path / "best.pth.tar")
    found = opened(f"{library}:resnet50", checkpoint=tmp_path / "best.pth.tar")
    assert not any(call["pretrained"] for call in built)
    assert set(asked) <= {None}
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.module(pixels), model(pixels))
    assert (found.labels, found.seed) == (None, None)
    assert list(found.provenance) == ["best.pth.tar"]
    if prefix:
        assert f"weights taken from names that begin with {prefix!r}; 1 others left out" in found.notes
    assert ("the head is the linear layer 'fc.1'" in found.notes) is (head == "fc.1")


def test_a_file_that_does_not_fit_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_timm(monkeypatch)
    state, path = trained(7).state_dict(), tmp_path / "w.safetensors"
    state["conv1.weight"] = torch.zeros(6, 3, 8, 8)
    state["extra.weight"] = state.pop("bn1.bias")
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        open_model("timm:resnet50", checkpoint=path)
    assert caught.value.message == (
        f"{path} does not fit timm:resnet50: 1 missing (bn1.bias), 1 unexpected (extra.weight), "
        "1 of the wrong shape (conv1.weight is 6x3x8x8, must be 6x3x4x4)"
    )
    good = trained(7).state_dict()
    save_file(good | {"fc.bias": torch.full((7,), torch.nan)}, path)
    with pytest.raises(CheckpointError, match="not finite"):
        open_model("timm:resnet50", checkpoint=path)
    # Old files lack what BatchNorm counts in training only.
    save_file({name: t for name, t in good.items() if not name.endswith("num_batches_tracked")}, path)
    opened("timm:resnet50", checkpoint=path)


def test_what_the_user_says_beats_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_timm(monkeypatch)
    said = Stated(labels=[str(i) for i in range(1000)], mean=0.5, crop=0.5, scores="none")
    model = opened("timm:resnet50", stated=said)
    assert (model.preprocess.mean, model.preprocess.resize_edge, model.scores) == (
        (0.5,) * 3,
        448,
        "none",
    )
    assert model.labels is not None
    assert model.labels[3] == "3"
    assert (model.facts["labels"], model.facts["crop"]) == ("user", "user")
    with pytest.raises(UsageError, match="its heads cannot be chosen"):
        open_model("timm:resnet50", stated=Stated(heads=2))


# --- torchvision -------------------------------------------------------------------------------------------


def test_a_cnn_of_torchvision_has_what_its_weights_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in_torchvision(monkeypatch)
    model = opened("torchvision:resnet50")
    spec = model.preprocess
    assert (spec.size, spec.resize_edge, spec.resample) == ((224, 224), 232, "bilinear")  # of IMAGENET1K_V2
    assert model.labels is not None
    assert model.labels[:2] == ("tench", "goldfish")
    assert opened("torchvision:resnet50.IMAGENET1K_V1").preprocess.resize_edge == 256
    assert asked == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    larger = opened("torchvision:resnet50", image_size=(336, 336)).preprocess
    assert (larger.size, larger.resize_edge) == ((336, 336), 348)


def test_a_name_that_torchvision_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torchvision(monkeypatch)
    with pytest.raises(CheckpointError, match=r"no classifier 'resnet5'; did you mean 'resnet50'\?"):
        open_model("torchvision:resnet5")
    with pytest.raises(CheckpointError, match="no weights 'V3' of resnet50") as caught:
        open_model("torchvision:resnet50.V3")
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in str(caught.value.hint)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(classes: int) -> nn.Module:
        assert torch.hub.get_dir() == str(tmp_path)
        raise OSError("no route to host\nmore")

    stand_in_torchvision(monkeypatch, offline)
    usual = torch.hub.get_dir()
    with pytest.raises(CheckpointError, match=r"trained weights of resnet50: no route to host$") as caught:
        open_model("torchvision:resnet50", cache_dir=tmp_path)
    assert "--random" in str(caught.value.hint)
    assert torch.hub.get_dir() == usual


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        MissingDependency, match="--model torchvision:resnet50 needs the library 'torchvision'"
    ) as e:
        open_model("torchvision:resnet50")
    assert (e.value.exit_code, e.value.hint) == (3, 'pip install "vitdeploy[hub]"')


class VisionTransformer(nn.Module):
    """What vitdeploy asks of torchvision's class of this name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors, self.image_size = tensors, 16
        self.encoder: Any = types.SimpleNamespace(layers=[types.SimpleNamespace(num_heads=2)])

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        return self.tensors


def test_a_vit_of_torchvision_is_rewritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its answers are those that torchvision gave; the library tells heads, labels and preprocessing."""
    tensors = load_file(ORACLES / "torchvision" / "vit.safetensors")
    answer = load_file(ORACLES / "torchvision" / "vit.answer.safetensors")
    tensors["heads.head.weight"] = torch.cat([tensors["heads.head.weight"]] * 200)
    tensors["heads.head.bias"] = torch.cat([tensors["heads.head.bias"]] * 200)
    stand_in_torchvision(monkeypatch, lambda classes: VisionTransformer(tensors))
    model = open_model("torchvision:vit_b_16")
    assert isinstance(model, Checkpoint)
    assert (model.family, model.config.classes, model.source) == ("torchvision", 1000, "torchvision:vit_b_16")
    assert model.labels is not None
    assert model.labels[0] == "tench"
    assert (model.preprocess.size, model.facts["preprocess"]) == ((16, 16), "checkpoint")
    assert model.notes == ()
    output = forward_float64(build_reference(model.config, model.state), answer["pixels"])
    torch.testing.assert_close(output[:, :5], answer["output"], rtol=0, atol=1e-10)
    save_file(load_file(ORACLES / "torchvision" / "vit.safetensors"), tmp_path / "w.safetensors")
    mine = open_model("torchvision:vit_b_16", checkpoint=tmp_path / "w.safetensors")
    assert isinstance(mine, Checkpoint)
    output = forward_float64(build_reference(mine.config, mine.state), answer["pixels"])
    torch.testing.assert_close(output, answer["output"], rtol=0, atol=1e-10)
    assert (mine.labels, mine.facts["heads"]) == (None, "checkpoint")


def test_the_folder_of_a_librarys_model_is_named_after_it() -> None:
    assert str(ExportRequest(model="torchvision:resnet50.IMAGENET1K_V1").default_folder) == (
        "torchvision-resnet50.IMAGENET1K_V1.bundle"
    )
