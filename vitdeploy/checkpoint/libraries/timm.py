"""timm's models: its ViTs as the families beside read them, all others as modules."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vitdeploy.checkpoint.families import timm as family
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.libraries.base import Library
from vitdeploy.config import Preprocess, Size
from vitdeploy.images.preprocess import from_timm


class Timm(Library):
    name = "timm"

    def build(
        self, name: str, *, trained: bool, classes: int | None = None, cache_dir: Path | str | None = None
    ) -> nn.Module:
        return family.build(name, trained=trained, classes=classes, cache_dir=cache_dir)

    def described(self, name: str, module: nn.Module, *, trained: bool) -> Foreign:
        return family.described(name, module, trained=trained)

    def preprocess(self, name: str, module: nn.Module) -> Preprocess:
        return from_timm(module.pretrained_cfg)  # type: ignore[arg-type]

    def labels(self, name: str, module: nn.Module) -> tuple[str, ...] | None:
        return family.model_labels(module)

    def classifier(self, module: nn.Module) -> str | None:
        named = module.pretrained_cfg.get("classifier")  # type: ignore[union-attr, operator]
        return named if isinstance(named, str) else None

    def is_of_one_size(self, module: nn.Module) -> bool:
        return hasattr(module, "set_input_size")

    def resize(self, module: nn.Module, size: Size) -> None:
        module.set_input_size(size)  # type: ignore[operator]
