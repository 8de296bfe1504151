"""Records what timm's evaluation transform makes of small images, for tests/images/test_preprocess.py.

Needs timm and torchvision, which the test environment does not have. From the root of the repository:

    PYTHONPATH=. python tests/oracles/record_timm_preprocess.py

writes tests/oracles/timm_preprocess.npz: ``image.<name>`` (H, W, 3) uint8; ``output.<case>`` (3, H, W)
float32; ``cases`` and ``versions``, JSON texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vitdeploy.bundle.golden import GOLDEN_NAMES, golden_images

IMAGES = {
    "wide": ("still_life", (43, 61)),
    "tall": ("foliage", (57, 31)),
    "square": ("landscape", (40, 40)),
    "smaller": ("still_life", (13, 10)),
    "long": ("foliage", (6, 120)),
    "pixel": ("foliage", (1, 1)),
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {"input_size": (3, 24, 24)},
    "vit_augreg": {"input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bicubic", **INCEPTION},
    "deit3": {"input_size": (3, 24, 24), "crop_pct": 1.0, "interpolation": "bicubic", **IMAGENET},
    "bilinear_odd": {"input_size": (3, 21, 21), "crop_pct": 0.95, "interpolation": "bilinear", **IMAGENET},
    "nearest": {"input_size": (3, 20, 20), "crop_pct": 0.9, "interpolation": "nearest", **INCEPTION},
    "lanczos": {"input_size": (3, 20, 20), "crop_pct": 0.8, "interpolation": "lanczos", **INCEPTION},
    "hamming": {"input_size": (3, 20, 20), "crop_pct": 0.9, "interpolation": "hamming", **INCEPTION},
    "box": {"input_size": (3, 20, 20), "crop_pct": 0.9, "interpolation": "box", **INCEPTION},
    "squash": {"input_size": (3, 24, 24), "crop_pct": 0.9, "crop_mode": "squash", **INCEPTION},
    "squash_whole": {"input_size": (3, 25, 20), "crop_pct": 1.0, "crop_mode": "squash", **IMAGENET},
    "border": {"input_size": (3, 24, 24), "crop_pct": 1.0, "crop_mode": "border", **IMAGENET},
    "border_cropped": {"input_size": (3, 23, 24), "crop_pct": 0.77, "crop_mode": "border", **IMAGENET},
    "cover": {"input_size": (3, 20, 32), "crop_pct": 0.9, "interpolation": "bicubic", **INCEPTION},
    "cover_odd": {"input_size": (3, 31, 18), "crop_pct": 0.875, "interpolation": "bilinear", **IMAGENET},
    "more_than_whole": {"input_size": (3, 25, 25), "crop_pct": 1.3, **INCEPTION},
}


def main() -> None:
    images = {name: golden_images(size)[GOLDEN_NAMES.index(scene)] for name, (scene, size) in IMAGES.items()}
    arrays = {f"image.{name}": pixels for name, pixels in images.items()}
    cases = {}
    for config_name, config in CONFIGS.items():
        transform = create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False)
        for image_name, pixels in images.items():
            case = f"{config_name}-{image_name}"
            cases[case] = {"config": config, "image": image_name}
            arrays[f"output.{case}"] = transform(Image.fromarray(pixels)).numpy()
    versions = {library.__name__: library.__version__ for library in (timm, torchvision, PIL, np)}
    path = Path(__file__).with_name("timm_preprocess.npz")
    np.savez_compressed(path, cases=json.dumps(cases), versions=json.dumps(versions), **arrays)
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
