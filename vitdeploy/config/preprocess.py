"""How images become what a model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitdeploy.config.common import Size
from vitdeploy.errors import ConfigError

Resample = Literal[
    "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "bilinear_float", "bicubic_float"
]
"""Pillow's filters; ``_float`` where resized pixels are not rounded to whole numbers."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes ``pixel_values``: decode, RGB or grey, resize, centre crop, rescale, normalise.

    ``mean`` and ``std`` have a number for each channel of the model: three are red, green, blue; one is grey,
    to which images are converted before they are resized. A model of other channels reads tensors only, of
    which ``rescale``, ``mean`` and ``std`` say how they are scaled.

    ``size`` is the final (height, width): what is larger after resizing is cropped around the centre,
    what is smaller is surrounded by ``pad``. ``resize`` says how the image is resized before:

    ``"exact"``           to ``resize_to`` (``size`` where that is None), whatever its shape
    ``"shortest_edge"``   the shorter side becomes ``resize_edge`` pixels, its shape is kept
    ``"cover"``           to the smallest of its shape that covers ``resize_to``
    ``"contain"``         to the largest of its shape that fits into ``resize_to``
    ``"none"``            not at all

    Raises:
        ConfigError: the settings contradict each other.
    """

    size: Size = (224, 224)
    resize: Literal["exact", "shortest_edge", "cover", "contain", "none"] = "exact"
    resize_edge: int | None = None
    resize_to: Size | None = None
    resample: Resample = "bilinear"
    crop_rounding: Literal["floor", "round"] = "floor"
    """Where the centre of an odd margin is: transformers rounds down, torchvision to even."""
    pad: tuple[int, int, int] = (0, 0, 0)
    """Red, green, blue (0-255) around an image that is smaller than ``size``."""
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    exif: bool = False
    """Turn the image as its EXIF orientation says; only where the checkpoint's own pipeline does."""

    def __post_init__(self) -> None:
        for height, width in (self.size, self.resize_to or self.size):
            if min(height, width) < 1:
                raise ConfigError(f"preprocessing size {height}x{width} is not positive")
        if (self.resize == "shortest_edge") != (self.resize_edge is not None):
            raise ConfigError("resize_edge goes with resize='shortest_edge', and only with it")
        if self.resize_edge is not None and self.resize_edge < 1:
            raise ConfigError(f"resize_edge must be at least 1, not {self.resize_edge}")
        if self.resize_to is not None and self.resize in ("shortest_edge", "none"):
            raise ConfigError(f"resize_to does not go with resize={self.resize!r}")
        if self.resize_to is None and self.resize in ("cover", "contain"):
            raise ConfigError(f"resize={self.resize!r} needs resize_to")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConfigError(
                "mean and std must have a number for each channel of the model, those of std positive; they "
                f"have {len(self.mean)} and {len(self.std)}"
            )
        if {len(self.pad)} != {3} or min(self.pad) < 0 or max(self.pad) > 255:
            raise ConfigError(f"pad must be three numbers from 0 to 255, not {self.pad}")

    @property
    def channels(self) -> int:
        """Of the tensor: as many as there are means."""
        return len(self.mean)

    @property
    def takes_images(self) -> bool:
        """Whether images can become such a tensor: in grey or in red, green and blue."""
        return self.channels in (1, 3)
