"""Libraries that build models by their own names: ``timm:resnet50``, ``torchvision:vit_b_16``."""

from __future__ import annotations

from vitdeploy.checkpoint.libraries.base import Library
from vitdeploy.checkpoint.libraries.timm import Timm
from vitdeploy.checkpoint.libraries.torchvision import Torchvision

LIBRARIES: tuple[Library, ...] = (Timm(), Torchvision())


def library_of(name: str | None) -> tuple[Library, str] | None:
    """The library that a model's name begins with, and its own name there; None where it begins with none."""
    begin, colon, rest = (name or "").partition(":")
    found = next((library for library in LIBRARIES if library.name == begin), None)
    return (found, rest) if found and colon else None
