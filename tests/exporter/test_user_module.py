"""Modules that are exported as they are: LayerNorms of their own classes, FLOPs, features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import UserModule, user_module
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import BatchRange, ViTConfig
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.exporter.subject import ModuleSubject
from vitdeploy.exporter.user_module import island_norms, wrap
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.registry import architecture_of
from vitdeploy.model.user_module import module_flops


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of (N, C, H, W) over its channels, as ConvNeXt's classes in timm and torchvision are."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, stride=4), ChannelNorm(8), nn.Linear(8, 5)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))


def test_a_norm_of_a_class_of_its_own_stays_what_it_is() -> None:
    torch.manual_seed(0)
    module, pixels = Convolutional(), torch.randn(2, 3, 32, 32)
    wrapped = wrap(module, PrecisionPlan.of("bf16"))
    assert island_norms(wrapped) == ("module.norm",)
    assert (wrapped.module.norm.norm.weight.dtype, wrapped.module.conv.weight.dtype) == (
        torch.float32,
        torch.bfloat16,
    )
    assert module.norm.weight.dtype == torch.float32
    torch.testing.assert_close(wrapped(pixels), module(pixels), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_cnn_becomes_a_bundle_with_its_flops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    precisions = ("fp32", "fp16")
    request = ExportRequest(
        model=Convolutional(), image_size=(32, 48), batch=BatchRange(1, 2, 2), precisions=precisions
    )
    bundle = run_export(request, tmp_path / "out.bundle")
    # 96 places of 8 channels of 3 x 4 x 4 inputs, and the head; a multiply-add is two.
    assert bundle.manifest.flops == 2 * (96 * 8 * 48 + 8 * 5)
    assert bundle.manifest.parameters == 8 * 48 + 8 + 16 + 45
    assert bundle.artifact("fp16").islands == ("module.norm",)
    assert all(record.passed for record in bundle.manifest.parity)


@pytest.mark.slow
def test_flops_of_attention_are_those_of_our_own_count() -> None:
    """transformers' ViT, counted as it runs, against what our architecture adds up."""
    from transformers import ViTConfig as Theirs
    from transformers import ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = Theirs(hidden_size=32, intermediate_size=64, num_labels=7, **sizes)
    config = ViTConfig(image_size=(32, 32), patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)
    counted = module_flops(ViTForImageClassification(theirs), 3, (32, 32))
    assert counted == architecture_of(config).forward_flops(config)


def test_flops_of_what_pytorch_would_run_as_one_operation() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(1, 12, 16))

    fused = torch.backends.mha.get_fastpath_enabled()
    tokens, width, hidden = 12, 16, 32
    gemms = tokens * width * (3 * width + width + 2 * hidden)
    assert module_flops(Tokens(), 3, (8, 8)) == 2 * (gemms + 2 * tokens * tokens * width)
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_a_module_that_does_not_run_has_no_flops() -> None:
    assert module_flops(nn.Linear(7, 3), 3, (32, 32)) is None
    assert module_flops(nn.Flatten(), 3, (32, 32)) is None
    assert ModuleSubject(user_module(nn.Linear(7, 3), "m", (32, 32), Stated()), (), "float").flops is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "swin_t"])
def test_flops_and_parameters_are_those_that_are_published(name: str) -> None:
    """transformers' models of these sizes, against the numbers that torchvision publishes for its own."""
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
        SwinConfig,
        SwinForImageClassification,
    )

    models = {
        "resnet50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)),
        "convnext_tiny": lambda: ConvNextForImageClassification(ConvNextConfig(num_labels=1000)),
        "swin_t": lambda: SwinForImageClassification(SwinConfig(num_labels=1000)),
    }
    published = json.loads((ORACLES / "libraries.json").read_text())["torchvision"][name]
    said = published["weights"][published["default"]]
    model = models[name]()
    assert module_flops(model, 3, (224, 224)) == pytest.approx(2 * said["multiply_adds"], rel=5e-3)
    assert sum(parameter.numel() for parameter in model.parameters()) == said["parameters"]


def test_running_means_are_no_parameters() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    subject = ModuleSubject(UserModule(module, "a CNN"), (), "float")
    assert subject.parameters == 3 * 4 + 4 + 2 * 4
    assert set(subject.state) == set(module.state_dict())
