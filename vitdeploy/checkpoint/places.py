"""Where a checkpoint lies: a folder, a file beside what describes it, an adapter with its base, the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vitdeploy.bundle.files import sha256
from vitdeploy.checkpoint import lora
from vitdeploy.checkpoint.documents import read_json
from vitdeploy.checkpoint.families import qwen, reference
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.files import SUFFIXES, Weights, read_shards, read_weights, shards_of
from vitdeploy.checkpoint.refusals import no_weights, not_there, refuse_quantised, refuse_shard
from vitdeploy.data import DIGITS
from vitdeploy.errors import CheckpointError, MissingDependency, UsageError, did_you_mean
from vitdeploy.variants import variant_names

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where transformers describes preprocessing; the second is of models that read text, too."""
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_HUB_FILES = ("config.json", *_PROCESSORS, _OPEN_CLIP_CONFIG, lora.CONFIG, *lora.WEIGHTS)
_INDEX = ".index.json"
_HUB_WEIGHTS = (
    ("model.safetensors", f"model.safetensors{_INDEX}"),
    ("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
    *((name,) for name in _OPEN_CLIP),
)
"""What is downloaded: the second where the first is not there, and so on; behind an index, its shards."""
_IN_FOLDERS = (
    *("model.safetensors", f"model.safetensors{_INDEX}", "weights.safetensors"),
    *("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
    *_OPEN_CLIP,
)
"""Where a folder's weights are, in the order that they are looked for."""


def from_path(path: Path, source: str) -> tuple[Foreign, Weights]:
    """Read a folder, or a weights file with what describes it beside it."""
    if not path.exists():
        raise not_there(source)
    if path.name in lora.WEIGHTS and lora.is_adapter(path.parent):
        path = path.parent
    if path.is_dir() and lora.is_adapter(path) and not any((path / name).is_file() for name in _IN_FOLDERS):
        return _adapted(path, source)
    if path.is_dir():
        folder, weights = path, _folder_weights(path, source)
    elif path.name.endswith(_INDEX):
        folder, weights = path.parent, read_shards(path, _part(path.parent))
    else:
        refuse_shard(path, source)
        folder, weights = path.parent, read_weights(path, _part(path.parent))
    of_open_clip = not weights.files.keys().isdisjoint(_OPEN_CLIP)
    config, files = _description(folder, whole=path.is_dir(), of_open_clip=of_open_clip)
    processor, read = (None, {}) if config is None or of_open_clip else _processor(folder)
    refuse_quantised(source, weights.state, config)
    foreign = Foreign(source, weights.state, config, processor, folder=folder)
    return foreign, replace(weights, files={**weights.files, **files, **read})


def _adapted(folder: Path, source: str) -> tuple[Foreign, Weights]:
    """A LoRA adapter, merged into the base that it names; what its folder says of the model goes first."""
    adapter = lora.read_adapter(folder, source)
    path = next((path for path in lora.base_paths(adapter) if path.exists()), None)
    if path is not None and path.is_dir() and lora.is_adapter(path):
        raise CheckpointError(
            f"{source}: its base {adapter.base!r} is an adapter, too",
            hint=f"merge that one first: {lora.MERGE}",
        )
    try:
        base, files = from_hub(adapter.base, None, None) if path is None else from_path(path, adapter.base)
    except (CheckpointError, UsageError, MissingDependency) as error:
        raise (lora.base_missing(adapter) if path is None else error) from error
    foreign, weights = lora.merge(adapter, base, files)
    config, own = _description(folder, whole=False)
    if config is not None and config.get("model_type") == (foreign.config or {}).get("model_type"):
        foreign = replace(foreign, config=config)
        weights = replace(weights, files={**weights.files, **own})
    processor, read = _processor(folder)
    if processor is not None:
        foreign = replace(foreign, processor=processor)
        weights = replace(weights, files={**weights.files, **read})
    return foreign, weights


def _processor(folder: Path) -> tuple[Mapping[str, object] | None, dict[str, str]]:
    """The preprocessing that a folder of transformers' describes, and the sha256 of the file that does."""
    for name in _PROCESSORS:
        if (path := folder / name).is_file():
            content = read_json(path)
            settings = content.get("image_processor", content if name == _PROCESSORS[0] else None)
            if isinstance(settings, Mapping):
                return settings, {name: sha256(path)}
    return None, {}


def _folder_weights(folder: Path, source: str) -> Weights:
    there = [name for name in _IN_FOLDERS if (folder / name).is_file()]
    if not there:
        others = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        raise no_weights(folder, source, _IN_FOLDERS, others)
    first = folder / there[0]
    read = read_shards if first.name.endswith(_INDEX) else read_weights
    return read(first, _part(folder))


def _part(folder: Path) -> tuple[str, ...]:
    """What is read of the weights in a folder, as its config.json says: see ``qwen.part_of``."""
    config = folder / "config.json"
    return qwen.part_of(read_json(config)) if config.is_file() else ()


def _description(
    folder: Path, *, whole: bool, of_open_clip: bool = False
) -> tuple[dict[str, object] | None, dict[str, str]]:
    """What describes the weights of a folder: config.json, or a bundle's manifest; and its sha256."""
    if of_open_clip:  # a config.json beside it is about another file
        own = folder / _OPEN_CLIP_CONFIG
        return (read_json(own), {own.name: sha256(own)}) if own.is_file() else (None, {})
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


def from_hub(
    name: str, revision: str | None, cache_dir: Path | str | None, also: Sequence[str] = ()
) -> tuple[Foreign, Weights]:
    """Download a model of the Hugging Face hub, or take it from the local cache.

    Args:
        also: files to have beside those that every model needs.
    """
    if name.startswith(("/", ".", "~")) or Path(name).suffix.lower() in SUFFIXES:
        raise not_there(name)
    if not _HUB_ID.fullmatch(name):
        names = (*variant_names(), DIGITS)
        raise UsageError(
            f"unknown model {name!r}{did_you_mean(name, names)}",
            hint="a named variant (`vitdeploy list`), a folder or file, a hub id (owner/name), timm:NAME, "
            "torchvision:NAME or module:function",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        purpose = f"{name!r} is no local path; getting it from the hub"
        raise MissingDependency("huggingface-hub", extra="hub", purpose=purpose) from error

    def fetch(*files: str) -> Path:
        wanted = [*_HUB_FILES, *also, *files]
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=wanted))

    try:
        for weights in _HUB_WEIGHTS:
            folder = fetch(*weights)
            there = [file for file in weights if (folder / file).is_file()]
            if there and there[0].endswith(_INDEX):
                # The shards that hold what is read of this model, and no others.
                shards = set(shards_of(folder / there[0], _part(folder)).values())
                folder = fetch(*weights, *sorted(shards))
            if there:
                break
    except CheckpointError:
        raise
    except Exception as error:  # the library raises HTTP, cache and validation errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is neither a local path nor to be had from the Hugging Face hub: {reason}",
            hint="check the name, the network and HF_TOKEN; a downloaded folder can be given as a path",
        ) from error
    foreign, found = from_path(folder, name)
    return foreign, replace(found, notes=(*found.notes, f"hub revision {folder.name}"))
