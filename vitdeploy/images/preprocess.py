"""From a decoded image to ``pixel_values``: resize, centre crop, rescale, normalise.

Pillow resizes, numpy does the rest, so that the pixels are those of transformers' PIL image processors and of
timm's evaluation transform. A ``Preprocess`` says what to do; ``from_huggingface`` and ``from_timm`` read it
from a checkpoint's own configuration. DINOv3's processor rescales before it resizes: there pixels are resized
in float32 (``bilinear_float``), to those of torchvision within its float32 rounding.

For a model of one channel, images become grey first, as Pillow's ``convert("L")`` makes them: the luma of
ITU-R BT.601, (19595 R + 38470 G + 7471 B + 32768) / 65536 rounded down. So does timm, whose scripts open
images in that mode for such models; transformers' processors take what they are given, and its pipelines only
know RGB. Grey that was decoded to RGB comes back unchanged, as the weights add up to 65536.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitdeploy.config import Preprocess, Resample, Size
from vitdeploy.errors import CheckpointError, ConfigError, ImageError, did_you_mean
from vitdeploy.images.decode import MAX_PIXELS, load_image, upright

_FILTERS: Mapping[Resample, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_CODES: Mapping[int, Resample] = {int(code): name for name, code in _FILTERS.items()}
_FLOAT_FILTERS: Mapping[Resample, Image.Resampling] = {
    "bilinear_float": Image.Resampling.BILINEAR,
    "bicubic_float": Image.Resampling.BICUBIC,
}
"""Those whose results are not rounded to whole numbers before they are rescaled."""
_ALL_FILTERS = {**_FILTERS, **_FLOAT_FILTERS}
_FLOAT_CODES: Mapping[int, Resample] = {int(code): name for name, code in _FLOAT_FILTERS.items()}


def pixel_values(
    image: Image.Image, spec: Preprocess, kind: Literal["float", "uint8", "patches"]
) -> NDArray[Any]:
    """Return the network's input for one image: what ``apply`` gives, or ``apply_uint8`` for uint8 input.

    Raises:
        ImageError: as ``apply``.
    """
    return apply_uint8(image, spec) if kind == "uint8" else apply(image, spec)


def apply(image: Image.Image, spec: Preprocess) -> NDArray[np.float32]:
    """Return the network's input for one image: (C, H, W) float32, C-contiguous, H and W from ``spec.size``.

    ``image`` is what ``load_image`` returned; any other Pillow image goes through it first.

    Raises:
        ImageError: as ``load_image``, or the image is so elongated that resizing it would exhaust memory,
            or the model's channels are not those of an image.
    """
    if spec.resample in _FLOAT_FILTERS:
        return _apply_float(image, spec)
    pixels = apply_uint8(image, spec)
    table = _levels(spec.rescale, spec.mean, spec.std)
    values = np.empty((spec.channels, *spec.size), dtype=np.float32)
    for channel in range(spec.channels):
        np.take(table[channel], pixels[:, :, channel], out=values[channel], mode="clip")
    return values


@functools.lru_cache(maxsize=16)
def _levels(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """What becomes of a channel's 256 possible values: (C, 256), read-only.

    Computed in float64 and then float32, as transformers does.
    """
    levels = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    of_each, by = (np.array(values, dtype=np.float32)[:, None] for values in (mean, std))
    table: NDArray[np.float32] = (levels - of_each) / by
    table.flags.writeable = False
    return table


def _apply_float(image: Image.Image, spec: Preprocess) -> NDArray[np.float32]:
    """As ``apply``, but pixels are resized in float32, each channel by itself."""
    image, (height, width) = _prepared(image, spec)
    values = np.empty((spec.channels, *spec.size), dtype=np.float32)
    for channel, mean, std in zip(range(spec.channels), spec.mean, spec.std, strict=True):
        band = image.getchannel(channel).convert("F")
        pixels = np.array(_crop(band.resize((width, height), _FLOAT_FILTERS[spec.resample]), spec))
        values[channel] = (pixels * np.float32(spec.rescale) - np.float32(mean)) / np.float32(std)
    return values


def apply_uint8(image: Image.Image, spec: Preprocess) -> NDArray[np.uint8]:
    """Return the resized and cropped image before rescaling and normalising: (H, W, C) uint8.

    ``(x * spec.rescale - spec.mean) / spec.std`` of it is ``apply``, up to float32 rounding; where the
    filter resizes floats, up to half a level of each pixel, too.

    Raises:
        ImageError: as ``apply``.
    """
    image, (height, width) = _prepared(image, spec)
    image = image.resize((width, height), _ALL_FILTERS[spec.resample])
    return np.array(_crop(image, spec)).reshape(*spec.size, spec.channels)


def _prepared(image: Image.Image, spec: Preprocess) -> tuple[Image.Image, Size]:
    """The image upright and in the model's colours, and the (height, width) to resize it to.

    Raises:
        ImageError: as ``apply``.
    """
    if not spec.takes_images:
        raise ImageError(f"an image cannot become a tensor of {spec.channels} channels")
    if type(image) is not Image.Image or image.mode != "RGB":
        image = load_image(image)
    if spec.exif:
        image = upright(image)
    if spec.channels == 1:
        image = image.convert("L")
    height, width = resized((image.height, image.width), spec)
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width}x{image.height} pixels is too elongated: resizing it to the "
            f"checkpoint's size gives {width}x{height}",
            hint="crop it first",
        )
    return image, (height, width)


def shown_size(image: Image.Image, spec: Preprocess) -> Size:
    """Height and width of a decoded image, turned as its EXIF data says where the preprocessing does so."""
    shown = upright(image) if spec.exif else image
    return shown.height, shown.width


def resized(size: Size, spec: Preprocess) -> Size:
    """The (height, width) that an image of ``size`` is resized to, before cropping."""
    if spec.resize == "none":
        return size
    target = spec.resize_to or spec.size
    if spec.resize == "exact":
        return target
    height, width = size
    if spec.resize_edge is not None:
        longer = spec.resize_edge * max(size) / min(size)
        return (int(longer), spec.resize_edge) if width <= height else (spec.resize_edge, int(longer))
    ratios = height / target[0], width / target[1]
    ratio = min(ratios) if spec.resize == "cover" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _crop(image: Image.Image, spec: Preprocess) -> Image.Image:
    """Cut ``spec.size`` out of the middle; where the image is smaller, ``spec.pad`` surrounds it."""
    height, width = spec.size
    if image.size == (width, height):
        return image
    top = _margin(image.height, height, spec)
    left = _margin(image.width, width, spec)
    if image.height >= height and image.width >= width:
        return image.crop((left, top, left + width, top + height))
    canvas = Image.new("RGB", (width, height), spec.pad).convert(image.mode)
    canvas.paste(image, (-left, -top))
    return canvas


def _margin(have: int, want: int, spec: Preprocess) -> int:
    """First row or column of the crop; negative where there is too little image."""
    if spec.crop_rounding == "floor":
        return (have - want) // 2
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def at_size(spec: Preprocess, size: Size) -> Preprocess:
    """Return ``spec`` for another network input ``size`` (height, width); the crop keeps its share.

    Where the shorter edge decided and ``size`` is not square, the image is resized to cover it instead.
    """
    if spec.resize == "none" or (spec.resize == "exact" and spec.resize_to is None):
        return replace(spec, size=size)
    if spec.resize_edge is None:
        shares = [before / after for before, after in zip(spec.resize_to or size, spec.size, strict=True)]
    else:
        shares = [spec.resize_edge / min(spec.size)] * 2
    height, width = (round(edge * share) for edge, share in zip(size, shares, strict=True))
    if spec.resize != "shortest_edge":
        return replace(spec, size=size, resize_to=(height, width))
    if height == width:
        return replace(spec, size=size, resize_edge=height)
    return replace(spec, size=size, resize="cover", resize_edge=None, resize_to=(height, width))


def for_channels(spec: Preprocess, channels: int) -> Preprocess:
    """Return ``spec`` for a model of so many channels, where it was written for RGB.

    The average of the three means stands for each channel, as in timm's loader, and so for the deviations.
    """
    if spec.channels == channels:
        return spec
    mean, std = (math.fsum(values) / len(values) for values in (spec.mean, spec.std))
    return replace(spec, mean=(mean,) * channels, std=(std,) * channels)


def channel_notes(spec: Preprocess, channels: int) -> tuple[str, ...]:
    """What to tell about a model whose images are not RGB; ``spec`` is its preprocessing as it was stated."""
    notes = []
    if channels == 1:
        notes.append("one channel: images become grey (Pillow's L, ITU-R BT.601) before they are resized")
    elif channels != 3:
        notes.append(f"{channels} channels: tensors go in, not images")
    if spec.channels != channels and (len(set(spec.mean)) > 1 or len(set(spec.std)) > 1):
        notes.append("mean and std are stated for RGB: each channel gets their average, as in timm's loader")
    return tuple(notes)


# --- a checkpoint's own configuration ----------------------------------------------------------------

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_INCEPTION = {"image_mean": 0.5, "image_std": 0.5}  # of each channel
_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SHORTEST = {"size": {"shortest_edge": 224}, "default_to_square": False, "do_center_crop": True}

# What each transformers class assumes for a setting that its configuration leaves out.
_PROCESSOR_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViTImageProcessor": _INCEPTION,
    "DeiTImageProcessor": {**_INCEPTION, "size": 256, "resample": 3, "do_center_crop": True},
    "BitImageProcessor": {**_OPENAI, **_SHORTEST, "resample": 3},
    "CLIPImageProcessor": {**_OPENAI, **_SHORTEST, "resample": 3},
    "SiglipImageProcessor": {
        **_INCEPTION,
        "size": {"height": 224, "width": 224},
        "default_to_square": False,
        "resample": 3,
    },
    "BeitImageProcessor": {**_INCEPTION, "resample": 3},
    "BlipImageProcessor": {**_OPENAI, "size": 384, "resample": 3},
    "DINOv3ViTImageProcessor": {**_IMAGENET, "size": {"height": 224, "width": 224}},
    "Qwen2VLImageProcessor": {**_OPENAI, "resample": 3},
}
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "size": 224,
    "default_to_square": True,
    "crop_size": 224,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
}
# The class of a model whose preprocessing configuration names none.
_PROCESSOR_OF_MODEL: Mapping[str, str] = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "beit": "BeitImageProcessor",
    "blip": "BlipImageProcessor",
    "vit_msn": "ViTImageProcessor",
    "vit_mae": "ViTImageProcessor",
    "swin": "ViTImageProcessor",
    "swinv2": "ViTImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
}
_RESCALES_FIRST = frozenset(("DINOv3ViTImageProcessor",))
"""Classes that resize what they have rescaled, so that nothing is rounded in between."""


_DINOV2 = {"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3, **_IMAGENET}
_SWIN = {"resample": 3, **_IMAGENET}
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "deit": {"size": {"height": 256, "width": 256}, "crop_size": 224, "resample": 3, **_IMAGENET},
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "vit_msn": _IMAGENET,
    "vit_mae": _IMAGENET,
    "swin": _SWIN,
    "swinv2": {**_SWIN, "size": 256},
}
"""The settings of families' published checkpoints, where they are not their processor's defaults."""


def published(model_type: str) -> Preprocess:
    """What a family's published checkpoints take, for one of transformers that comes without settings."""
    return from_huggingface(_PUBLISHED.get(model_type, {}), model_type)


PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "imagenet": ("dinov2", {**_DINOV2, "resample": 2}),
    "inception": ("vit", {}),
    "clip": ("clip", {}),
    "openai": ("clip", {}),
    "siglip": ("siglip", {}),
    "deit": ("deit", _PUBLISHED["deit"]),
    "dinov2": ("dinov2", _DINOV2),
    "dinov3": ("dinov3_vit", {}),
    "blip": ("vit", {**_OPENAI, "resample": 3}),
    "mae": ("vit", _IMAGENET),
    "swin": ("swin", _SWIN),
}
"""Preprocessing that models share, by the names that people know: a model type and its settings.

``imagenet`` is torchvision's: the shorter edge to 256, bilinear; ``inception`` scales to -1 ... 1.
"""


def preset(name: str) -> Preprocess:
    """One of ``PRESETS``, for 224 x 224 pixels."""
    model_type, settings = PRESETS[name]
    return from_huggingface(settings, model_type)


def from_huggingface(config: Mapping[str, Any], model_type: str = "vit", channels: int = 3) -> Preprocess:
    """Return what a ``preprocessor_config.json`` of transformers says, defaults of its class included.

    Args:
        config: the file's content. ViT, DeiT, BiT, CLIP, SigLIP, BEiT, BLIP, DINOv3 and, with a size
            of its own, Qwen2-VL are known, under their older and ``Fast`` names too, and the one that wraps
            timm's transforms.
        model_type: the model's, from ``config.json``; decides where the file names no processor.
        channels: the model's. Where they are not three, the file has to say mean and std for them.

    Raises:
        CheckpointError: a setting is unknown, malformed, not for so many channels, or gives images whose size
            varies. Names the key.
    """
    if config.get("image_processor_type") == "TimmWrapperImageProcessor":
        settings = config.get("pretrained_cfg")
        if not isinstance(settings, Mapping):
            raise _refusal("pretrained_cfg", settings, "is no object")
        return replace(from_timm(settings), exif=True)
    processor = _processor(config, model_type)
    given = {key: value for key, value in config.items() if value is not None}
    settings = {**_COMMON_DEFAULTS, **_PROCESSOR_DEFAULTS[processor], **given}
    for key in ("do_pad", "do_flip_channel_order", "do_grayscale", "rescale_offset"):
        if settings.get(key):
            raise _refusal(key, settings[key], "is not supported")
    crop = _size(settings["crop_size"], "crop_size", square=True) if settings["do_center_crop"] else None
    geometry: dict[str, Any] = {"size": crop, "resize": "none"}
    if settings["do_resize"]:
        size = _size(settings["size"], "size", square=settings["default_to_square"])
        if isinstance(size, int):
            geometry.update(resize="shortest_edge", resize_edge=size)
        else:
            geometry.update(resize="exact", resize_to=size if crop else None, size=crop or size)
        codes = _FLOAT_CODES if processor in _RESCALES_FIRST else _CODES
        geometry["resample"] = _choice(settings["resample"], "resample", codes)
    if geometry["size"] is None:
        key = "size" if settings["do_resize"] else "do_resize"
        raise _refusal(key, settings[key], "without do_center_crop gives images whose size varies")
    mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else (0.0, 1.0)
    return _checked(
        **geometry,
        rescale=_number(settings["rescale_factor"], "rescale_factor") if settings["do_rescale"] else 1.0,
        mean=_per_channel(mean, "image_mean", channels),
        std=_per_channel(std, "image_std", channels),
        exif=True,  # as load_image of transformers does before its processors
    )


def from_timm(pretrained_cfg: Mapping[str, Any]) -> Preprocess:
    """Return what timm's ``create_transform(**resolve_data_config(...))`` does for evaluation.

    Args:
        pretrained_cfg: timm's settings of a model (``"pretrained_cfg"`` in its ``config.json``): input_size,
            crop_pct, crop_mode, interpolation, mean, std; each with timm's default where missing. For a
            model of other channels timm keeps the RGB mean and std: they are returned as they are stated, and
            ``for_channels`` makes them the model's.

    Raises:
        CheckpointError: a setting is unknown or malformed. Names the key.
    """
    channels, *size = _integers(pretrained_cfg.get("input_size") or (3, 224, 224), "input_size", 3)
    fraction = _number(pretrained_cfg.get("crop_pct") or 0.875, "crop_pct")
    height, width = (math.floor(edge / fraction) for edge in size)
    mean = _for_rgb_or(channels, pretrained_cfg.get("mean") or _IMAGENET["image_mean"], "mean")
    geometry: dict[str, Any] = {"resize_to": (height, width)}
    match pretrained_cfg.get("crop_mode") or "center":
        case "squash":
            geometry["resize"] = "exact"
        case "border":
            colour = mean if len(mean) == 3 else mean[:1] * 3
            geometry.update(resize="contain", pad=tuple(round(255 * value) for value in colour))
        case "center" if height != width:
            geometry["resize"] = "cover"
        case "center":
            geometry = {"resize": "shortest_edge", "resize_edge": height}
        case unknown:
            raise _refusal("crop_mode", unknown, "is none of center, squash, border")
    names = {name: name for name in _FILTERS}
    return _checked(
        **geometry,
        size=tuple(size),
        crop_rounding="round",
        resample=_choice(pretrained_cfg.get("interpolation") or "bicubic", "interpolation", names),
        mean=mean,
        std=_for_rgb_or(channels, pretrained_cfg.get("std") or _IMAGENET["image_std"], "std"),
    )


def from_torchvision(transforms: Mapping[str, Any]) -> Preprocess:
    """Return what ``weights.transforms()`` of torchvision's classifiers does to images that Pillow opened.

    Args:
        transforms: crop_size and resize_size, (edge,) each; mean, std and interpolation, of its class
            ImageClassification.

    Raises:
        CheckpointError: a setting is missing, unknown or malformed. Names the key.
    """
    (edge,) = _integers(transforms.get("crop_size"), "crop_size", 1)
    (resize,) = _integers(transforms.get("resize_size"), "resize_size", 1)
    names = {name: name for name in _FILTERS}
    return _checked(
        size=(edge, edge),
        resize="shortest_edge",
        resize_edge=resize,
        crop_rounding="round",
        resample=_choice(transforms.get("interpolation"), "interpolation", names),
        mean=_per_channel(transforms.get("mean"), "mean", 3),
        std=_per_channel(transforms.get("std"), "std", 3),
    )


def _processor(config: Mapping[str, Any], model_type: str) -> str:
    key = next((k for k in ("image_processor_type", "feature_extractor_type") if config.get(k)), None)
    if key is None:
        if model_type not in _PROCESSOR_OF_MODEL:
            raise _refusal("image_processor_type", None, f"is missing, and {model_type!r} has no default")
        return _PROCESSOR_OF_MODEL[model_type]
    name = str(config[key]).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in _PROCESSOR_DEFAULTS:
        suggestion = did_you_mean(name, _PROCESSOR_DEFAULTS)
        raise _refusal(key, config[key], f"is not supported{suggestion}")
    return name


def _size(value: Any, key: str, *, square: bool) -> int | Size:
    """A (height, width), or the length of the shorter edge."""
    if isinstance(value, Mapping):
        if set(value) == {"height", "width"}:
            value = (value["height"], value["width"])
        elif set(value) == {"shortest_edge"} and key == "size":
            value, square = value["shortest_edge"], False
        else:
            raise _refusal(key, dict(value), "is not supported")
    if isinstance(value, int):
        (edge,) = _integers([value], key, 1)
        return (edge, edge) if square else edge
    height, width = _integers(value, key, 2)
    return height, width


def _integers(value: Any, key: str, count: int) -> list[int]:
    """``count`` positive integers."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise _refusal(key, value, f"is not {count} numbers")
    if not all(isinstance(item, int) and not isinstance(item, bool) and item > 0 for item in value):
        raise _refusal(key, value, "is not made of positive integers")
    return list(value)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _refusal(key, value, "is not a positive number")
    return float(value)


def _per_channel(value: Any, key: str, channels: int) -> tuple[float, ...]:
    """A number for each channel; a single one stands for all."""
    items = [value] * channels if isinstance(value, (int, float)) else value
    if not isinstance(items, (list, tuple)) or len(items) != channels:
        count = f"{channels} numbers" if channels > 1 else "one number"
        raise _refusal(key, value, f"is not {count}, as the model has {count.replace('number', 'channel')}")
    if not all(isinstance(item, (int, float)) and math.isfinite(item) for item in items):
        raise _refusal(key, value, "is not made of numbers")
    return tuple(map(float, items))


def _for_rgb_or(channels: int, value: Any, key: str) -> tuple[float, ...]:
    """Three numbers for RGB, whatever the channels; or one for each."""
    rgb = isinstance(value, (list, tuple)) and len(value) == 3
    return _per_channel(value, key, 3 if rgb else channels)


def _choice(value: Any, key: str, known: Mapping[Any, Resample]) -> Resample:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in known:
        raise _refusal(key, value, f"is none of {', '.join(map(str, known))}")
    return known[value]


def _checked(**settings: Any) -> Preprocess:
    try:
        return Preprocess(**settings)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's preprocessing is wrong: {error.message}") from error


def _refusal(key: str, value: Any, problem: str) -> CheckpointError:
    text = repr(value)
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return CheckpointError(
        f"the checkpoint's preprocessing setting {key} = {text} {problem}",
        hint="correct its preprocessing configuration",
    )
