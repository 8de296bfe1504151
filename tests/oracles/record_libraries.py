"""Record what timm and torchvision say of models that are no plain ViTs, and torchvision's image transform.

Needs timm and torchvision, which the test environment does not have. From the root of the repository:

    PYTHONPATH=. python tests/oracles/record_libraries.py

writes tests/oracles/libraries.json: settings, classes, parameters, published operations; and
tests/oracles/torchvision_preprocess.npz: ``image.<name>`` (H, W, 3) uint8, ``output.<case>`` (3, H, W)
float32, ``cases``, JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torchvision
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from vitdeploy.bundle.golden import GOLDEN_NAMES, golden_images

HERE = Path(__file__).parent
TIMM = ("resnet50", "convnext_tiny", "convnext_tiny.dinov3_lvd1689m", "vit_dwee_patch16_reg1_gap_256")
TORCHVISION = ("resnet50", "convnext_tiny", "swin_t", "vit_b_16")
IMAGES = {
    "wide": ("still_life", (43, 61)),
    "tall": ("foliage", (57, 31)),
    "smaller": ("still_life", (13, 10)),
}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "resnet50_v1": {"crop_size": 24, "resize_size": 27},
    "resnet50_v2": {"crop_size": 24, "resize_size": 25},
    "swag": {"crop_size": 21, "resize_size": 21, "interpolation": InterpolationMode.BICUBIC},
    "inception": {"crop_size": 20, "resize_size": 23, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}


def settings_of(transform: Any) -> dict[str, Any]:
    names = ("crop_size", "resize_size", "mean", "std")
    return {name: getattr(transform, name) for name in names} | {
        "interpolation": transform.interpolation.value
    }


def of_timm(name: str) -> dict[str, Any]:
    model = timm.create_model(name)
    subset = infer_imagenet_subset(model)
    return {
        "kind": type(model).__name__,
        "pretrained_cfg": dict(model.pretrained_cfg),
        "num_classes": model.num_classes,
        "labels": ImageNetInfo(subset).label_descriptions()[:3] if subset else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def of_torchvision(name: str) -> dict[str, Any]:
    weights = torchvision.models.get_model_weights(name)
    return {
        "default": weights.DEFAULT.name,
        "weights": {
            one.name: {
                "transforms": settings_of(one.transforms()),
                "categories": one.meta["categories"][:3],
                "multiply_adds": round(1e9 * one.meta["_ops"]),
                "parameters": one.meta["num_params"],
            }
            for one in weights
        },
    }


def record_transforms() -> None:
    images = {name: golden_images(size)[GOLDEN_NAMES.index(scene)] for name, (scene, size) in IMAGES.items()}
    arrays = {f"image.{name}": pixels for name, pixels in images.items()}
    cases = {}
    for case, arguments in TRANSFORMS.items():
        transform = ImageClassification(**arguments)
        cases[case] = settings_of(transform)
        for name, pixels in images.items():
            arrays[f"output.{case}.{name}"] = transform(Image.fromarray(pixels)).numpy()
    np.savez_compressed(HERE / "torchvision_preprocess.npz", cases=np.array(json.dumps(cases)), **arrays)


def main() -> None:
    record = {
        "versions": {module.__name__: module.__version__ for module in (timm, torchvision)},
        "timm": {name: of_timm(name) for name in TIMM},
        "torchvision": {name: of_torchvision(name) for name in TORCHVISION},
    }
    (HERE / "libraries.json").write_text(json.dumps(record, indent=1) + "\n")
    record_transforms()


if __name__ == "__main__":
    main()
