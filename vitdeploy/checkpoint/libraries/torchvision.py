"""torchvision's classifiers: its ViTs as the family beside reads them, all others as modules.

A name may have a dot and the weights behind it: ``resnet50.IMAGENET1K_V1``; its default weights otherwise.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.libraries.base import Library
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.config import Preprocess
from vitdeploy.errors import ArchitectureError, CheckpointError, MissingDependency, did_you_mean
from vitdeploy.images.preprocess import from_torchvision

_READ = "VisionTransformer"
"""The class that the family beside reads."""


class Torchvision(Library):
    name = "torchvision"

    def build(
        self, name: str, *, trained: bool, classes: int | None = None, cache_dir: Path | str | None = None
    ) -> nn.Module:
        weights = _weights(name)
        from torchvision.models import get_model

        if trained and weights is None:
            raise CheckpointError(
                f"torchvision publishes no weights of {name}", hint="--checkpoint, or --random"
            )
        sizes = {} if classes is None else {"num_classes": classes}
        try:
            with _downloads_in(cache_dir):
                built: nn.Module = get_model(
                    name.partition(".")[0], weights=weights if trained else None, **sizes
                )
        except Exception as error:  # whatever the download raises: HTTP, offline, disk
            reason = (str(error) or type(error).__name__).splitlines()[0]
            what = "load the trained weights of" if trained else "build"
            raise CheckpointError(
                f"torchvision could not {what} {name}: {reason}",
                hint="download its .pth file and give it with --checkpoint; --random takes random weights",
            ) from error
        return built

    def described(self, name: str, module: nn.Module, *, trained: bool) -> Foreign:
        kind = type(module).__name__
        if kind != _READ:
            raise ArchitectureError(
                f"torchvision builds {name} as {kind}, which vitdeploy does not rewrite",
                hint=f"-m torchvision:{name} exports it as it is",
            )
        weights: Any = _weights(name)
        layers: Any = module.encoder.layers  # type: ignore[union-attr]
        facts = {"image_size": module.image_size, "heads": layers[0].num_heads}
        config: dict[str, Any] = {"torchvision": {**facts, "transforms": _transforms(weights)}}
        if trained:
            config["labels"] = weights.meta["categories"]
        return Foreign(f"torchvision:{name}", module.state_dict(), config)

    def preprocess(self, name: str, module: nn.Module) -> Preprocess:
        return from_torchvision(_transforms(_weights(name)))

    def labels(self, name: str, module: nn.Module) -> tuple[str, ...] | None:
        weights: Any = _weights(name)
        return tuple(weights.meta["categories"])

    def classifier(self, module: nn.Module) -> str | None:
        layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        return layers[-1] if layers else None


@contextlib.contextmanager
def _downloads_in(folder: Path | str | None) -> Iterator[None]:
    """Let PyTorch keep downloads in this folder; None leaves it its own."""
    usual = torch.hub.get_dir()
    if folder is not None:
        torch.hub.set_dir(folder)
    try:
        yield
    finally:
        if folder is not None:
            torch.hub.set_dir(usual)


def _weights(name: str) -> enum.Enum | None:
    """The trained weights that a name means.

    Raises:
        MissingDependency: torchvision is not installed.
        CheckpointError: it has no classifier, or no weights, of this name.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependency("torchvision", extra="hub", purpose=f"--model torchvision:{name}") from error
    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        raise CheckpointError(
            f"torchvision has no classifier {shown(architecture)}{did_you_mean(architecture, known)}",
            hint="torchvision.models.list_models(torchvision.models) lists what it has",
        )
    published: type[enum.Enum] = models.get_model_weights(architecture)
    if tag and tag not in published.__members__:
        guess = did_you_mean(tag, published.__members__)
        raise CheckpointError(
            f"torchvision has no weights {shown(tag)} of {architecture}{guess}",
            hint=f"it has: {', '.join(published.__members__)}",
        )
    return published[tag or "DEFAULT"] if published.__members__ else None


def _transforms(weights: enum.Enum | None) -> dict[str, Any]:
    """The settings of the images that weights were evaluated on."""
    made: Any = weights.transforms() if weights is not None else None  # type: ignore[attr-defined]
    names = ("crop_size", "resize_size", "mean", "std")
    settings = {name: getattr(made, name) for name in names if hasattr(made, name)}
    interpolation = getattr(made, "interpolation", None)
    return settings if interpolation is None else {**settings, "interpolation": interpolation.value}
