"""An architecture that vitdeploy does not know: MLP-mixer blocks in two stages over patches, and a head.

It is registered as a contributor would do it: a line in the table of configurations, one in that of
architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.checkpoint.opening import Checkpoint, random_state
from vitdeploy.config import ModelConfig, Output, Preprocess, Size, kinds
from vitdeploy.model import registry
from vitdeploy.model.architecture import Architecture
from vitdeploy.model.deployed import Add, DeployedModel, Linear, Norm, Site
from vitdeploy.model.folds import doubled
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.reference import Reference


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    kind = "toy"

    width: int
    image_size: Size = (16, 24)
    patch_size: int = 8
    channels: int = 3
    classes: int = 5
    stages: tuple[int, ...] = (1, 2)

    @property
    def depth(self) -> int:
        return sum(self.stages)

    @property
    def patches(self) -> int:
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)

    @property
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        return {"features": (self.width,), "logits": (self.classes,)}

    @property
    def summary(self) -> str:
        return f"toy of width {self.width}"


class Mixer(nn.Module):
    """x + (W LN(x)')', the tokens mixed by one matrix."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mix = nn.Linear(config.patches, config.patches)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)  # (N, T, D)


class Stage(nn.Module):
    def __init__(self, config: ToyConfig, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer(config) for _ in range(depth))


class Patches(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, config.width, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (N, T, D)


class Readout(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor, output: Output) -> Tensor:
        features = x.mean(dim=1)  # (N, D)
        return self.head(features) if output == "logits" else features


class Toy(Reference):
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Patches(config)
        self.layers = nn.ModuleList(Stage(config, depth) for depth in config.stages)
        self.readout = Readout(config)

    def stages(self) -> list[tuple[str, nn.Module]]:
        blocks = [
            (f"layers.{i}.blocks.{j}", block)
            for i, stage in enumerate(self.layers)
            for j, block in enumerate(stage.blocks)
        ]
        return [("embedding", self.embedding), *blocks]


class DeployedPatches(nn.Module):
    def __init__(self, part: Patches, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(part.patch_embed.weight.flatten(1).t(), part.patch_embed.bias)

    def forward(self, x: Tensor) -> Tensor:
        patch, channels = self.config.patch_size, self.config.channels
        rows, columns = (side // patch for side in self.config.image_size)
        x = x.reshape(-1, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        return self.patch_embed(x.reshape(-1, rows * columns, channels * patch * patch))  # (N, T, D)


class DeployedMixer(nn.Module):
    def __init__(self, part: Mixer) -> None:
        super().__init__()
        self.norm = Norm(part.norm.weight, part.norm.bias, part.norm.eps)
        self.mix, self.add = Linear(part.mix.weight.t(), part.mix.bias), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2))


class Mean(Site):
    """A site of the architecture's own."""

    always_fp32 = True

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype or x.dtype).mean(dim=1)


class DeployedReadout(nn.Module):
    def __init__(self, part: Readout, outputs: tuple[Output, ...]) -> None:
        super().__init__()
        self.outputs, self.mean = outputs, Mean()
        self.head = Linear(part.head.weight.t(), part.head.bias) if "logits" in outputs else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = {"features": self.mean(x)}
        if self.head is not None:
            results["logits"] = self.head(results["features"])
        return tuple(results[output] for output in self.outputs)


class ToyArchitecture(Architecture[ToyConfig, Toy]):
    def reference(self, config: ToyConfig, *, fused_attention: bool = False) -> Toy:
        return Toy(config)

    def forward_flops(self, config: ToyConfig) -> int:
        patches = 2 * config.patches * config.channels * config.patch_size**2 * config.width
        return patches + config.depth * 2 * config.patches**2 * config.width

    def applied_rewrites(
        self, config: ToyConfig, outputs: tuple[Output, ...], input_kind: str
    ) -> tuple[Rewrite, ...]:
        return (Rewrite(name="patches_to_gemm", detail="the patch convolution is one GEMM"),)

    @torch.no_grad()
    def deploy(
        self,
        reference: Toy,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: str,
        preprocess: Preprocess,
    ) -> DeployedModel:
        embedding, *blocks = (doubled(part) for _, part in reference.stages())
        mixers = [DeployedMixer(block) for block in blocks]
        model = DeployedModel(
            assign_dtypes(DeployedPatches(embedding, reference.config), "embedding", plan),
            [assign_dtypes(mixer, f"blocks.{i}", plan) for i, mixer in enumerate(mixers)],
            assign_dtypes(DeployedReadout(doubled(reference.readout), outputs), "readout", plan),
            outputs,
        )
        model.output_dtype = plan.output_dtype
        return model.eval()


CONFIG = ToyConfig(width=8)
SPEC = Preprocess(size=CONFIG.image_size)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: dict[str, Any] = {**kinds.CONFIGS, "toy": ToyConfig}
    monkeypatch.setattr(kinds, "CONFIGS", configs)
    monkeypatch.setattr(registry, "ARCHITECTURES", {**registry.ARCHITECTURES, "toy": ToyArchitecture()})


def toy_checkpoint() -> Checkpoint:
    """Random weights; the architecture must be registered."""
    state = {name: 10 * tensor for name, tensor in random_state(CONFIG, seed=1).items()}
    return Checkpoint(CONFIG, state, SPEC, ("a", "b", "c", "d", "e"), "vitdeploy", "toy")
