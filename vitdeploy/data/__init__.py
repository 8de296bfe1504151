"""Data that travels inside the package: a small trained ViT and the real images it was tested on.

The model, its accuracy and how it was trained: ``digits/README.md``. ``examples/train_digits.py`` writes it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["DIGITS", "digits_folder", "digits_heldout", "digits_images"]

DIGITS = "digits"
"""What the checkpoint is called."""


def digits_folder() -> Path:
    """The checkpoint ``digits``: a folder with ``config.json`` and ``model.safetensors``, in our naming."""
    return Path(str(resources.files(__name__) / "digits"))


def digits_heldout() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images held out from training and their labels: (K, 8, 8, 3) uint8 RGB and (K,) int64."""
    with np.load(digits_folder() / "heldout.npz", allow_pickle=False) as held_out:
        grey, labels = held_out["images"], held_out["labels"]
    return np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int64)


def digits_images() -> list[Path]:
    """Some of the held-out images as PNG and JPEG, sorted; a name begins with the label: ``3_0012.png``."""
    folder = digits_folder() / "images"
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
