"""A bundle's preprocessing as an image processor of transformers: ``preprocessor_config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from PIL import Image

from vitdeploy.config import Preprocess, Size, size_name
from vitdeploy.errors import UsageError
from vitdeploy.images.preprocess import from_huggingface

_HINT = "export with --resize exact or shortest_edge where the model was trained so"
_FLOAT = "_float"


def processor_config(spec: Preprocess, where: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ``AutoImageProcessor`` reads, and what it does otherwise than the bundle, a line each.

    Args:
        where: what errors call the bundle.

    Raises:
        UsageError: no image processor of transformers prepares images so.
    """
    if spec.channels != 3:
        raise UsageError(
            f"{where}: reads images of {spec.channels} channels, and transformers' image processors give 3"
        )
    if spec.resize in ("cover", "contain"):
        raise UsageError(
            f"{where}: images are resized to {spec.resize} {size_name(spec.resize_to or spec.size)}, which "
            "no image processor of transformers does",
            hint=_HINT,
        )
    config = {
        "image_processor_type": _class(spec),
        **_geometry(spec),
        "do_rescale": True,
        "rescale_factor": spec.rescale,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    crops = spec.resize != "exact" or spec.resize_to not in (None, spec.size)
    notes = []
    if crops and spec.crop_rounding != "floor":
        notes.append("where a margin is odd, the crop of transformers begins a pixel before this model's")
    if not spec.exif:
        notes.append(
            "transformers turns photographs as their EXIF data says, which this model's pipeline does not"
        )
    if from_huggingface(config) != _understood(spec):
        raise AssertionError(f"{where}: {config} is read back as another preprocessing than {spec}")
    return config, tuple(notes)


def _understood(spec: Preprocess) -> Preprocess:
    """What a processor of transformers makes of it, apart from what its own settings cannot say."""
    same = replace(spec, exif=True, crop_rounding="floor", pad=(0, 0, 0))
    return same if spec.resize != "none" else replace(same, resample=Preprocess.resample)


def _class(spec: Preprocess) -> str:
    """The processor whose own way the settings are, as other programs go by its name."""
    if spec.resample.endswith(_FLOAT):
        return "DINOv3ViTImageProcessor"
    if spec.resize != "exact":
        return "CLIPImageProcessor"
    return "ViTImageProcessor" if spec.resize_to is None else "DeiTImageProcessor"


def _geometry(spec: Preprocess) -> dict[str, Any]:
    """How images are resized and cropped."""
    geometry: dict[str, Any] = {"do_resize": spec.resize != "none"}
    if spec.resize != "none":
        code = spec.resample.removesuffix(_FLOAT).upper()
        geometry["resample"] = int(Image.Resampling[code])
        edge = {"shortest_edge": spec.resize_edge}
        geometry["size"] = edge if spec.resize_edge else _named(spec.resize_to or spec.size)
    crops = spec.resize != "exact" or spec.resize_to is not None
    return geometry | {"do_center_crop": crops} | ({"crop_size": _named(spec.size)} if crops else {})


def _named(size: Size) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
