"""Open a model, whatever the user calls it, as our configuration and our tensors.

A name is, in the order it is tried: ``digits``, a named variant (``vit_base_patch16_224``, ``B/16``),
``timm:<name>``, a Python entry ``module:function``, a folder or file, an id on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitdeploy.bundle.files import sha256
from vitdeploy.checkpoint import families
from vitdeploy.checkpoint.families import reference
from vitdeploy.checkpoint.families.base import Foreign, Reading, take_over
from vitdeploy.checkpoint.families.timm import from_library
from vitdeploy.checkpoint.files import SUFFIXES, Weights, read_json, read_shards, read_weights
from vitdeploy.checkpoint.footprint import require_memory
from vitdeploy.checkpoint.refusals import no_weights, refuse_quantised, refuse_shard
from vitdeploy.config import (
    DEFAULT_MODEL,
    ModelConfig,
    Preprocess,
    Scores,
    Size,
    ViTConfig,
    decode_variant,
    is_variant,
    model_fields,
    variant_names,
)
from vitdeploy.data import digits_folder
from vitdeploy.errors import CheckpointError, ConfigError, MissingDependency, UsageError, did_you_mean
from vitdeploy.model.registry import expected_shapes
from vitdeploy.scores import usual_scores

DIGITS = "digits"

_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("config.json", "preprocessor_config.json", "adapter_config.json")
_HUB_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
"""What is downloaded: the second where the first is not there."""
_INDEX = ".index.json"
_IN_FOLDERS = (
    *("model.safetensors", f"model.safetensors{_INDEX}", "weights.safetensors"),
    *("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
)
"""Where a folder's weights are, in the order that they are looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A model ready for export: configuration, weights, preprocessing, labels, and where they are from."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    """Exactly the names and shapes of ``registry.expected_shapes(config)``; dtypes as in the file. A position
    table that was interpolated is float64, or float32 where its family computes it so."""
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    family: str
    source: str
    scores: Scores = "softmax"
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """File names to sha256."""
    seed: int | None = None
    """The seed of random weights; None where the weights are from a file."""


@dataclass(frozen=True)
class UserModule:
    """Any module of the user's: exported as it is."""

    module: nn.Module
    source: str
    image_size: Size = (224, 224)
    notes: tuple[str, ...] = ()


def open_model(
    name: str | None = None,
    *,
    checkpoint: Path | str | None = None,
    image_size: Size | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Checkpoint | UserModule:
    """Open a model by its name, or weights from a file.

    Args:
        name: see the module; ``DEFAULT_MODEL`` when neither a name nor a checkpoint is given.
        checkpoint: a file or folder with the weights. A ``name`` beside it must be a named variant: it gives
            the architecture's heads and image size, the file gives the rest.
        image_size: height and width to build for; position embeddings interpolate by the family's own rule.
        classes: how many classes the model is expected to have; of a variant with random weights, how many it
            gets.
        seed: of random weights, where a named variant comes without a checkpoint.

    Raises:
        UsageError: the name is unknown, or does not go with the other arguments.
        ConfigError: the resolution is not divisible by the patch.
        CheckpointError: the checkpoint cannot be read, or is wrong.
        MissingDependency: the hub's or timm's library is needed and not installed.
    """
    if checkpoint is not None:
        template = _template(name) if name is not None else None
        foreign, files = _from_path(Path(checkpoint), str(checkpoint))
        return _convert(foreign, files, template, image_size, classes)
    name = name or DEFAULT_MODEL
    if name == DIGITS:
        foreign, files = _from_path(digits_folder(), DIGITS)
        return _convert(foreign, files, None, image_size, classes)
    if is_variant(name):
        return _random(name, image_size, classes, seed)
    if name.startswith("timm:"):
        return _convert(from_library(name.removeprefix("timm:")), Weights({}, {}), None, image_size, classes)
    if _ENTRY.fullmatch(name) and not Path(name).exists():
        return _user_module(name, image_size)
    foreign, files = _from_path(Path(name), name) if Path(name).exists() else _from_hub(name)
    return _convert(foreign, files, None, image_size, classes)


def save_folder(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` that ``open_model`` reads back as they are.

    Raises:
        OSError: the folder cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": reference.MODEL_TYPE,
        "model": model_fields(checkpoint.config),
        "preprocess": dataclasses.asdict(checkpoint.preprocess),
        "labels": checkpoint.labels,
        "scores": checkpoint.scores,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in checkpoint.state.items()}
    save_file(state, path / "model.safetensors")


def _template(name: str) -> ViTConfig:
    if not is_variant(name):
        raise UsageError(
            f"--checkpoint goes with a named variant, not {name!r}{did_you_mean(name, variant_names())}",
            hint="leave --model out to let the checkpoint say what it is",
        )
    return decode_variant(name)


# --- where a checkpoint lies ----------------------------------------------------------------------------


def _from_path(path: Path, source: str) -> tuple[Foreign, Weights]:
    """Read a folder, or a weights file with what describes it beside it."""
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if path.is_dir():
        folder, weights = path, _folder_weights(path, source)
    elif path.name.endswith(_INDEX):
        folder, weights = path.parent, read_shards(path)
    else:
        refuse_shard(path, source)
        folder, weights = path.parent, read_weights(path)
    config, files = _description(folder, whole=path.is_dir())
    processor = folder / "preprocessor_config.json"
    described = config is not None and processor.is_file()
    if described:
        files[processor.name] = sha256(processor)
    refuse_quantised(source, weights.state, config)
    foreign = Foreign(source, weights.state, config, read_json(processor) if described else None)
    return foreign, replace(weights, files={**weights.files, **files})


def _folder_weights(folder: Path, source: str) -> Weights:
    there = [name for name in _IN_FOLDERS if (folder / name).is_file()]
    if not there:
        others = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        raise no_weights(folder, source, _IN_FOLDERS, others)
    first = folder / there[0]
    return read_shards(first) if first.name.endswith(_INDEX) else read_weights(first)


def _description(folder: Path, *, whole: bool) -> tuple[dict[str, object] | None, dict[str, str]]:
    """What describes the weights of a folder: config.json, or a bundle's manifest; and its sha256."""
    manifest = folder / "manifest.json"
    config = folder / "config.json"
    if config.is_file():
        content = read_json(config)
        # Beside a single weights file, a config.json may be about something else altogether.
        if whole or not content.keys().isdisjoint(("model_type", "architecture")):
            return content, {config.name: sha256(config)}
    if manifest.is_file():
        content = read_json(manifest)
        described = {key: content.get(key) for key in ("model", "preprocess", "labels", "scores")}
        return {"model_type": reference.MODEL_TYPE, **described}, {manifest.name: sha256(manifest)}
    if whole:
        raise CheckpointError(
            f"{folder}: there is no config.json",
            hint="give the weights file and its architecture: -m vit_base_patch16_224 --checkpoint FILE",
        )
    return None, {}


def _from_hub(name: str) -> tuple[Foreign, Weights]:
    """Download a model of the Hugging Face hub, or take it from the local cache."""
    if name.startswith(("/", ".", "~")) or Path(name).suffix.lower() in SUFFIXES:
        raise CheckpointError(f"{name}: no such file or folder")
    if not _HUB_ID.fullmatch(name):
        names = (*variant_names(), DIGITS)
        raise UsageError(
            f"unknown model {name!r}{did_you_mean(name, names)}",
            hint="a named variant, a folder or file, a hub id (owner/name), timm:NAME or module:function",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        purpose = f"{name!r} is no local path; getting it from the hub"
        raise MissingDependency("huggingface-hub", extra="hub", purpose=purpose) from error
    try:
        for weights in _HUB_WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, *weights]))
            if any(path for pattern in weights for path in folder.glob(pattern)):
                break
    except Exception as error:  # the library raises HTTP, cache and validation errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is neither a local path nor to be had from the Hugging Face hub: {reason}",
            hint="check the name and the network; a downloaded folder can be given as a path",
        ) from error
    foreign, found = _from_path(folder, name)
    return foreign, replace(found, notes=(*found.notes, f"hub revision {folder.name}"))


# --- conversion -----------------------------------------------------------------------------------------


def _convert(
    foreign: Foreign, files: Weights, template: ViTConfig | None, image_size: Size | None, classes: int | None
) -> Checkpoint:
    family, foreign, dropped = families.recognise(foreign)
    try:
        reading = family.read(foreign, template)
    except ConfigError as error:  # the checkpoint's own numbers, not the user's
        raise CheckpointError(f"{foreign.source}: {error.message}", hint=error.hint) from error
    native = reading.config
    if template is not None:
        _check_template(foreign.source, native, template)
    if classes is not None and native.classes != classes:
        raise CheckpointError(f"{foreign.source} has {native.classes} classes, not {classes}")
    size = image_size or (template.image_size if template else reading.default_size) or native.image_size
    config = native.at_size(size)
    require_memory(config)
    state, notes = take_over(reading, family.name, foreign.source)
    if fitted := family.positions.fit(state, native, size):
        state |= fitted
        notes = (*notes, _interpolation_note(reading, size, family.name))
    return Checkpoint(
        config=config,
        state=state,
        preprocess=reading.preprocess(size),
        labels=reading.labels,
        family=family.name,
        source=foreign.source,
        scores=reading.scores or usual_scores(config.classes),
        notes=(*files.notes, *dropped, *reading.notes, *notes),
        provenance=files.files,
    )


def _check_template(source: str, config: ModelConfig, template: ViTConfig) -> None:
    fields = ("patch_size", "channels", "width", "depth", "heads", "mlp_width", "distillation_token")
    differing = [
        f"{field} {getattr(config, field, None)}, not {getattr(template, field)}"
        for field in fields
        if getattr(config, field, None) != getattr(template, field)
    ]
    if differing:
        raise CheckpointError(
            f"{source} is of another architecture than the variant named: {'; '.join(differing)}",
            hint="name the variant it is of, or leave --model out",
        )


def _interpolation_note(reading: Reading, size: Size, family: str) -> str:
    (height, width), (old_height, old_width) = size, reading.config.image_size
    return f"positions interpolated from {old_height}x{old_width} to {height}x{width} pixels as {family} does"


def _random(name: str, image_size: Size | None, classes: int | None, seed: int) -> Checkpoint:
    if classes is not None and classes < 0:
        raise UsageError(f"classes must be at least 0, not {classes}")
    config = decode_variant(name)
    config = config.at_size(image_size or config.image_size)
    config = config if classes is None else replace(config, classes=classes)
    require_memory(config)
    return Checkpoint(
        config=config,
        state=random_state(config, seed),
        preprocess=Preprocess(size=config.image_size),
        labels=None,
        family="vitdeploy",
        source=name,
        scores=usual_scores(config.classes),
        notes=(f"no checkpoint: the weights of {name} are random (seed {seed})",),
        seed=seed,
    )


def random_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return float32 weights that depend on ``config`` and ``seed`` alone.

    Every parameter is normal with deviation 0.02, clamped to twice that, around 1 for the gains of LayerNorm
    and layer scale, around 0 otherwise: nothing is constant, so that every part shows in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        # Not trunc_normal_, which takes 30 times as long.
        tensor = torch.empty(shape).normal_(std=0.02, generator=generator).clamp_(-0.04, 0.04)
        gain = re.search(r"(norm\d?\.weight|scale\d)$", name)
        state[name] = tensor.add_(1.0) if gain else tensor
    return state


# --- the user's own module ------------------------------------------------------------------------------


def _user_module(name: str, image_size: Size | None) -> UserModule:
    """Call a user's function for its module, with the working directory importable as in ``python -c``."""
    module_name, function_name = name.split(":")
    with _working_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise UsageError(
                f"--model {name}: cannot import {module_name}: {_reason(error)}",
                hint="the module must lie in the working directory or be installed",
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            guess = did_you_mean(
                function_name, (key for key, value in vars(module).items() if callable(value))
            )
            raise UsageError(f"--model {name}: {module_name} has no function {function_name!r}{guess}")
        try:
            result = function()
        except Exception as error:
            message = f"--model {name}: calling it without arguments failed: {_reason(error)}"
            raise UsageError(message) from error
    if not isinstance(result, nn.Module):
        raise UsageError(f"--model {name}: it returned {type(result).__name__}, not a torch.nn.Module")
    return UserModule(result.eval(), name, image_size or (224, 224))


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
