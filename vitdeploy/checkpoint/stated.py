"""What the user says of a model, which beats what its files say; and where each fact is from.

Labels, preprocessing, scores, heads and activation are what files often do not state, or state wrongly. Needs
no PyTorch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from vitdeploy.bundle.manifest import FactSource, first_problem
from vitdeploy.checkpoint.documents import read_bytes, read_json
from vitdeploy.config import Activation, ModelConfig, Preprocess, Resample, Scores, Size
from vitdeploy.errors import CheckpointError, ConfigError, UsageError, did_you_mean
from vitdeploy.images.preprocess import (
    PRESETS,
    at_size,
    channel_notes,
    for_channels,
    from_huggingface,
    from_timm,
    preset,
)

Facts = dict[str, FactSource]
Named = TypeVar("Named", bound=str)


@dataclass(frozen=True)
class Stated:
    """What the user says; None leaves a fact to the checkpoint.

    Raises:
        UsageError: a value that no model can have.
    """

    labels: Sequence[str] | str | os.PathLike[str] | None = None
    """One for each class, in order; or a file with them."""
    preprocess: Preprocess | Mapping[str, Any] | str | os.PathLike[str] | None = None
    """The name of a preset, a JSON file, its content, or a ``Preprocess``."""
    mean: Sequence[float] | float | None = None
    """Of each channel, where pixels are 0 to 1; one number stands for all."""
    std: Sequence[float] | float | None = None
    resize: int | Size | Literal["exact", "none"] | None = None
    """Before the crop: the shorter side in pixels, or (height, width); "exact": to the model's size."""
    crop: float | int | Size | None = None
    """The share of the shorter side that the crop keeps, up to 1.0; or its size in pixels, the model's."""
    resample: str | None = None
    scores: Scores | None = None
    heads: int | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        _known("kind of scores", self.scores, get_args(Scores))
        _known("activation", self.activation, get_args(Activation))
        _known("filter", self.resample, get_args(Resample))
        if self.heads is not None and self.heads < 1:
            raise UsageError(f"heads must be at least 1, not {self.heads}", hint="12 for ViT-B, 16 for ViT-L")
        if self.crop == 1:  # all of it, and not one pixel
            object.__setattr__(self, "crop", 1.0)
        if isinstance(self.crop, float) and not 0 < self.crop <= 1:
            raise UsageError(f"crop {self.crop:g} is no share of an image", hint="0.875, or a size in pixels")
        if isinstance(self.crop, float) and self.resize is not None:
            raise UsageError(
                "a crop's share says how to resize, and resize says it too", hint="leave one out"
            )
        for name in ("mean", "std"):
            said = getattr(self, name)
            values = said if isinstance(said, Sequence) else () if said is None else (said,)
            if not all(map(math.isfinite, values)) or (name == "std" and min(values, default=1) <= 0):
                what = "finite numbers" if name == "mean" else "positive numbers"
                raise UsageError(
                    f"{name} must be {what}, not {said}", hint="ImageNet's: --preprocess imagenet"
                )
            if max(values, default=0) > _PIXEL:
                message = f"{name} {said} is of pixels from 0 to 255; it is of pixels from 0 to 1 here"
                raise UsageError(message, hint="divide it by 255")

    def without(self, config: Mapping[str, object] | None) -> Mapping[str, object] | None:
        """A config.json without what the user says instead, which need not be readable then."""
        said = {key for name, keys in _IN_CONFIG.items() if getattr(self, name) is not None for key in keys}
        return _less(config, said, deeper=True) if config and said else config

    def name_classes(self, classes: int | None, read: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The labels: the user's, or those that were read.

        Args:
            classes: columns of the logits; None where only running the model can tell.

        Raises:
            UsageError: the user's are not as many as the classes, or not readable.
        """
        if self.labels is None:
            return read
        if isinstance(self.labels, (str, os.PathLike)):
            labels = read_labels(Path(self.labels), "--labels")
        else:
            labels = tuple(map(str, self.labels))
        check_labels(labels, classes)
        return labels

    def configure(self, config: ModelConfig) -> ModelConfig:
        """The configuration with the user's heads and activation.

        Raises:
            UsageError: this kind of model has none, or they do not fit.
        """
        said = {name: value for name in SHAPELESS if (value := getattr(self, name)) is not None}
        fields = asdict(config)  # type: ignore[call-overload]
        # Stages have heads each, which no one number tells.
        if missing := [n for n, value in said.items() if not isinstance(fields.get(n), type(value))]:
            kind, name = config.kind, min(missing)
            raise UsageError(
                f"a model of the kind {kind!r} has no {name} to choose", hint=f"leave out --{name}"
            )
        try:
            return replace(config, **said)  # type: ignore[type-var]
        except ConfigError as error:
            raise UsageError(error.message, hint=error.hint or "heads divide the width evenly") from error

    def refuse_shapeless(self, source: str) -> None:
        """Raise a UsageError for what cannot be said of a module that is exported as it is."""
        for name in SHAPELESS:
            if getattr(self, name) is not None:
                message = f"{source} is exported as it is: its {name} cannot be chosen"
                raise UsageError(message, hint="choose it where the module is made")

    def prepare(self, read: Preprocess, channels: int = 3) -> tuple[Preprocess, tuple[str, ...]]:
        """The preprocessing for ``read.size``, and notes: the user's, or what was read, with single settings.

        Args:
            channels: the model's.

        Raises:
            UsageError: a setting that does not fit the size, or contradicts another.
            CheckpointError: the user's file is wrong.
        """
        spec = for_channels(read, channels)
        if self.preprocess is not None:
            spec = for_channels(_chosen(self.preprocess, spec), channels)
        try:
            spec = replace(spec, **self._colours(channels), **self._geometry(spec))
        except ConfigError as error:
            hint = error.hint or "--mean and --std take as many numbers as there are channels, or one"
            raise UsageError(error.message, hint=hint) from error
        if spec.channels != channels:
            raise UsageError(
                f"mean and std are of {spec.channels} channels, and the model has {channels}",
                hint="one number stands for all channels",
            )
        said = self.preprocess is not None or self.mean is not None
        return spec, channel_notes(spec if said else read, channels)

    def prepare_another(self, read: Preprocess, first: Preprocess, channels: int) -> Preprocess:
        """The preprocessing for a further image size, ``read.size``.

        What is stated in pixels is meant for the first size: another one keeps its share.

        Args:
            read: as of :meth:`prepare`.
            first: what that returned for the first size.
        """
        in_pixels = isinstance(self.resize, int | tuple) or isinstance(self.crop, int | tuple)
        return at_size(first, read.size) if in_pixels else self.prepare(read, channels)[0]

    def facts(self, assumed: Collection[str], known: Sequence[str]) -> Facts:
        """Where each of the ``known`` facts is from, and each single setting of the user's.

        Args:
            assumed: facts that the files do not state.
        """
        facts: Facts = {name: "default" if name in assumed else "checkpoint" for name in known}
        said = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if isinstance(self.crop, float):
            said.append("resize")
        if isinstance(self.preprocess, str) and self.preprocess in PRESETS and "preprocess" in facts:
            facts["turn"] = facts["preprocess"]  # which a preset leaves as it was
        return facts | dict.fromkeys(said, "user")

    def _colours(self, channels: int) -> dict[str, Any]:
        said = {"mean": self.mean, "std": self.std}
        return {
            name: tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * channels
            for name, value in said.items()
            if value is not None
        }

    def _geometry(self, spec: Preprocess) -> dict[str, Any]:
        settings: dict[str, Any] = {} if self.resample is None else {"resample": self.resample}
        free: dict[str, Any] = {"resize_edge": None, "resize_to": None}
        (height, width), resize, crop = spec.size, self.resize, self.crop
        if isinstance(crop, float):
            # As timm's crop_pct.
            edges = math.floor(height / crop), math.floor(width / crop)
            resize = edges[0] if height == width else None
            settings |= {**free, "resize": "cover", "resize_to": edges}
        elif crop is not None:
            sides = crop if isinstance(crop, tuple) else (crop, crop)
            if sides != spec.size:
                model, hint = f"{height}x{width}", "x".join(map(str, dict.fromkeys(sides)))
                raise UsageError(
                    f"the crop is what the model reads, {model} pixels", hint=f"--image-size {hint}"
                )
        if isinstance(resize, str):
            settings |= {**free, "resize": _known("resize", resize, ("exact", "none"))}
        elif isinstance(resize, int):
            _covers(resize >= min(spec.size), resize, spec.size)
            settings |= {**free, "resize": "shortest_edge", "resize_edge": resize}
        elif resize is not None:
            _covers(resize[0] >= height and resize[1] >= width, resize, spec.size)
            settings |= {**free, "resize": "exact", "resize_to": resize}
        return settings


SHAPELESS = ("heads", "activation")
"""What no tensor's shape tells."""
_IN_CONFIG = {
    "labels": ("id2label", "label_names", "labels"),
    "scores": ("problem_type", "scores"),
    "activation": ("hidden_act", "act_layer"),
}
"""What the families call these facts in their config.json, or in an object of it."""
_HOW = ("resize", "resize_edge", "resize_to")
_PIXEL = 2.0
"""No mean and no deviation of pixels from 0 to 1 is as large."""


def check_labels(labels: Sequence[str], classes: int | None) -> None:
    """Raise a UsageError where there is not one label for each class.

    Args:
        classes: columns of the logits; None where it is not known yet.
    """
    if classes == 0:
        raise UsageError("labels name classes, and this model has no head", hint="leave the labels out")
    if classes is not None and len(labels) != classes:
        raise UsageError(
            f"{len(labels)} labels, but the model has {classes} classes", hint="one label for each, in order"
        )


def parsed_fields(kind: type[Any], values: Mapping[str, object], where: str, key: str) -> Any:
    """A frozen dataclass of ``vitdeploy.config`` from what a file says.

    Args:
        where: the file, for errors.
        key: what the object is called in it.

    Raises:
        CheckpointError: an unknown field, or a wrong value.
    """
    names, correct = [field.name for field in fields(kind)], f"correct {where}"
    for name in values:
        if name not in names:
            guess = did_you_mean(name, names)
            raise CheckpointError(f"{where}: {key} has no field {name!r}{guess}", hint=correct)
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error, key)}", hint=correct) from error
    except ConfigError as error:
        raise CheckpointError(f"{where}: {key}: {error.message}", hint=error.hint or correct) from error


def _less(values: Mapping[str, Any], names: Collection[str], *, deeper: bool) -> dict[str, Any]:
    """An object without these names; ``deeper``, and without them in the objects that it holds."""
    return {
        name: _less(value, names, deeper=False) if deeper and isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in names
    }


def _known(what: str, name: Named | None, choices: Sequence[str]) -> Named | None:
    if name is not None and name not in choices:
        raise UsageError(
            f"unknown {what} {name!r}{did_you_mean(name, choices)}", hint=f"known: {', '.join(choices)}"
        )
    return name


def _covers(covers: bool, resize: int | Size, size: Size) -> None:
    if not covers:
        smaller = "x".join(map(str, resize if isinstance(resize, tuple) else (resize,)))
        raise UsageError(
            f"resizing to {smaller} leaves less than the {size[0]}x{size[1]} pixels that the model reads",
            hint="a larger resize, or a smaller --image-size",
        )


def read_labels(path: Path, flag: str) -> tuple[str, ...]:
    """Labels of a file: one per line; or JSON, a list, numbers to names, or an object with ``id2label``.

    Args:
        flag: by which the user gave it, for errors.

    Raises:
        UsageError: the file is missing, empty, or numbers its labels otherwise than from 0.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (CheckpointError, UnicodeDecodeError) as error:
        message = f"{flag} {path}: {getattr(error, 'message', 'it is not UTF-8 text')}"
        raise UsageError(message, hint="a text file with one label per line, or JSON") from error
    if path.suffix.lower() == ".json":
        try:
            labels = _labels_of(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{flag} {path}: not a JSON list of labels, nor numbers from 0 to labels",
                hint='["cat", "dog"], or {"0": "cat", "1": "dog"}',
            ) from error
    else:
        labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise UsageError(f"{flag} {path}: there is no label in it", hint="one per line, in order")
    return labels


def _labels_of(content: object) -> tuple[str, ...]:
    if isinstance(content, dict) and "id2label" in content:
        content = content["id2label"]
    if isinstance(content, dict):
        numbered = {int(number): label for number, label in content.items()}
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError("gaps")
        content = [numbered[number] for number in range(len(numbered))]
    if not isinstance(content, list) or not all(isinstance(label, str) for label in content):
        raise ValueError("no list of strings")
    return tuple(content)


def _chosen(said: Preprocess | Mapping[str, Any] | str | os.PathLike[str], read: Preprocess) -> Preprocess:
    """The user's preprocessing, for the size of what was read."""
    if isinstance(said, Preprocess):
        return at_size(said, read.size)
    if isinstance(said, str) and said in PRESETS:
        # How files are turned is no matter of a preset.
        return replace(at_size(preset(said), read.size), exif=read.exif)
    if isinstance(said, Mapping):
        return at_size(_read_settings(said, "preprocess", read), read.size)
    path = Path(said)
    if not path.is_file():
        name = os.fspath(said)
        raise UsageError(
            f"--preprocess {name}: neither a preset nor a file{did_you_mean(name, PRESETS)}",
            hint=f"presets: {', '.join(PRESETS)}",
        )
    return at_size(_read_settings(read_json(path), str(path), read), read.size)


def _read_settings(content: Mapping[str, Any], where: str, read: Preprocess) -> Preprocess:
    """Settings as transformers, timm or a manifest writes them; of a manifest's, some may be left out."""
    inner = content.get("image_processor")  # of a processor_config.json
    content = inner if isinstance(inner, Mapping) else content
    own, timm = content.get("preprocess", content), content.get("pretrained_cfg", content)
    names = {field.name for field in fields(Preprocess)}
    if isinstance(own, Mapping) and own and own.keys() <= names:
        rest = {
            name: value for name, value in asdict(read).items() if "resize" not in own or name not in _HOW
        }
        spec: Preprocess = parsed_fields(Preprocess, rest | dict(own), where, "preprocess")
        return spec
    if not content.keys().isdisjoint(
        ("image_processor_type", "feature_extractor_type", "do_resize", "image_mean")
    ):
        return from_huggingface(content, channels=read.channels)
    if isinstance(timm, Mapping) and not timm.keys().isdisjoint(("crop_pct", "interpolation", "input_size")):
        return from_timm({**timm, "input_size": (read.channels, *read.size)})
    raise CheckpointError(
        f"{where}: no preprocessing of transformers, timm or a manifest",
        hint='{"resize": "exact", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}',
    )
