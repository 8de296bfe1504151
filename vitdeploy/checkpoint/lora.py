"""LoRA adapters of PEFT, merged in float64 into the weights of their base.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685): a layer W becomes W + s B A, with s = alpha / r, or
alpha / sqrt(r) with rsLoRA (https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) then
gives each of its rows the length that it has learned. What was trained as a whole, as a new
classifier is, replaces the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdeploy.bundle.files import sha256
from vitdeploy.checkpoint.documents import read_json
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.huggingface import file_name
from vitdeploy.checkpoint.files import Weights, read_weights
from vitdeploy.checkpoint.refusals import cut, shown, some
from vitdeploy.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE = "PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(DIR)"
"""What merges any adapter, in words of Python."""

_PREFIX = "base_model.model."
_MODELS = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "beit.", "timm_model.", "model.")
"""What transformers puts before the names of a model below a head; ``model.`` before DINOv3's blocks."""
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.(?P<leaf>weight|bias))?"
)
_KNOWN = frozenset(
    (
        # obeyed below
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias"),
        *("modules_to_save", "peft_type", "base_model_name_or_path", "init_lora_weights"),
        # of the training, or told by the tensors
        *("auto_mapping", "inference_mode", "task_type", "peft_version", "lora_dropout", "runtime_config"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
        # of other layers than a ViT has
        *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
    )
)
"""Settings of an adapter; any other that is set means another function, now or in later versions of PEFT."""
_HEADS = ("classifier.weight", "cls_classifier.weight", "head.weight")
_LABELS = ("id2label", "label2id", "labels", "label_names", "label_descriptions")
_INITIAL = (True, False, None, "true", "gaussian", "orthogonal", "eva")
"""Beginnings of an adapter that leave the base's weights as they are; PiSSA and its like change them."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder has it."""

    source: str
    """What the user called it; errors name it."""
    folder: Path
    settings: Mapping[str, Any]
    weights: Weights

    @property
    def base(self) -> str:
        """A path, or an id on the hub."""
        return str(self.settings["base_model_name_or_path"])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's configuration and weights."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def read_adapter(folder: Path, source: str) -> Adapter:
    """Read an adapter.

    Raises:
        CheckpointError: it cannot be read, is no LoRA adapter, does something that is not merged here, or
            does not name its base.
    """
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise _refusal(source, f"is an adapter of the kind {cut(str(kind))}; LoRA's are merged")
    odd = sorted(key for key, value in settings.items() if value and key not in _KNOWN)
    if settings.get("revision") == "main":
        odd.remove("revision")
    if settings.get("init_lora_weights", True) not in _INITIAL:
        odd.append(f"init_lora_weights {shown(settings['init_lora_weights'])}")
    if odd:
        raise _refusal(source, f"is a LoRA adapter with {some(odd, 3)}, which is not merged here")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{source} is a LoRA adapter that does not name its base (base_model_name_or_path)",
            hint=f"write the base's folder into {CONFIG}, or merge it: {MERGE}",
        )
    name = next(name for name in WEIGHTS if (folder / name).is_file())
    weights = read_weights(folder / name)
    files = {**weights.files, CONFIG: sha256(folder / CONFIG)}
    return Adapter(source, folder, settings, replace(weights, files=files))


def base_paths(adapter: Adapter) -> list[Path]:
    """Where the base may lie: as the adapter says from here, in its folder, and beside it."""
    return [Path(adapter.base), adapter.folder / adapter.base, adapter.folder.parent / adapter.base]


def base_missing(adapter: Adapter) -> CheckpointError:
    return CheckpointError(
        f"{adapter.source} is a LoRA adapter, and its base {shown(adapter.base)} is not here",
        hint=f"put the base's folder there or write its place into {CONFIG}; or merge: {MERGE}",
    )


def merge(adapter: Adapter, base: Foreign, files: Weights) -> tuple[Foreign, Weights]:
    """The base with the adapter merged into it; layers that it changes are float64.

    Raises:
        CheckpointError: a tensor of the adapter is of another kind, or fits no layer of the base.
    """
    places = {_key(name): name for name in base.state}
    layers, whole = _layers(adapter)
    state = {**base.state, **{places.get(_key(name), name): tensor for name, tensor in whole.items()}}
    ranks = set()
    for layer, parts in layers.items():
        name = places.get(_key(f"{layer}.weight"))
        if name is None or not {"A", "B"} <= parts.keys():
            raise _misfit(adapter, layer, f"no layer of {base.source}" if name is None else "half an adapter")
        state[name] = _merged(adapter, layer, parts, state[name])
        ranks.add(parts["A"].shape[0])
        if "bias" in parts:
            bias = places.get(_key(f"{layer}.bias"))
            if bias is None or state[bias].shape != parts["bias"].shape:
                raise _misfit(adapter, layer, "a bias for a layer that has none of its size")
            state[bias] = state[bias].double() + _scale(adapter, layer, parts) * parts["bias"].double()
    foreign = replace(base, source=adapter.source, state=state)
    notes = [
        f"LoRA adapter (rank {_range(ranks)}, {len(layers)} layers) merged in float64 into {base.source}"
    ]
    if whole:
        modules = sorted({name.rpartition(".")[0] for name in whole})
        notes.append(f"taken over whole from the adapter: {some(modules, 4)}")
    foreign, said = _head_of_its_own(foreign, base, whole)
    notes = [*files.notes, *adapter.weights.notes, *notes, *said]
    return foreign, Weights(state, {**files.files, **adapter.weights.files}, tuple(notes))


def _layers(adapter: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each adapted layer (A, B, bias, magnitude), and the tensors that replace the base's."""
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for full, tensor in adapter.weights.state.items():
        name = full.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        found = _PART.fullmatch(name)
        if found is not None and (found["leaf"] != "bias" or found["part"] == "lora_B"):
            part = found["part"].removeprefix("lora_")
            part = "bias" if found["leaf"] == "bias" else "magnitude" if part == "magnitude_vector" else part
            layers.setdefault(found["layer"], {})[part] = tensor
        elif "lora_" in name:
            raise _misfit(adapter, name, "a part of an adapter that is not merged here")
        elif ".original_module." not in name:
            whole[name] = tensor
    if not layers:
        raise CheckpointError(f"{adapter.source} holds no LoRA layers", hint="give the folder of the base")
    return layers, whole


def _merged(adapter: Adapter, layer: str, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """W + s B A of one layer, with DoRA's lengths where it has them; (out, in) or a convolution's shape."""
    a, b, old = (tensor.double() for tensor in (parts["A"], parts["B"], weight))
    rank = a.shape[0] if a.ndim else 0
    shapes = (old.shape[:1] + (rank,) + (1,) * (old.ndim - 2), (rank, *old.shape[1:]))
    if old.ndim not in (2, 4) or not rank or (tuple(b.shape), tuple(a.shape)) != shapes:
        raise _misfit(adapter, layer, f"{_size(b)} by {_size(a)}, which do not make up {_size(old)}")
    stated = _pattern(adapter.settings, "rank_pattern", layer, "r")
    if stated not in (None, rank):
        raise _misfit(adapter, layer, f"of rank {rank}, where {CONFIG} says {shown(stated)}")
    new = old + _scale(adapter, layer, parts) * (b.flatten(1) @ a.flatten(1)).reshape(old.shape)
    if "magnitude" not in parts:
        if adapter.settings.get("use_dora"):
            raise _misfit(adapter, layer, "without the lengths of DoRA")
        return new
    lengths = parts["magnitude"].double().flatten()
    if old.ndim != 2 or lengths.shape != old.shape[:1]:
        raise _misfit(adapter, layer, "DoRA of a layer that is not linear")
    norms: Tensor = torch.linalg.vector_norm(new, dim=1)
    return new * (lengths / norms)[:, None]


def _scale(adapter: Adapter, layer: str, parts: Mapping[str, Tensor]) -> float:
    rank, alpha = parts["A"].shape[0], _pattern(adapter.settings, "alpha_pattern", layer, "lora_alpha")
    alpha = 8 if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{adapter.source}: lora_alpha must be a number, not {shown(alpha)}",
            hint=f"correct it in {CONFIG}",
        )
    return alpha / (math.sqrt(rank) if adapter.settings.get("use_rslora") else rank)


def _pattern(settings: Mapping[str, Any], table: str, layer: str, default: str) -> Any:
    """What a table of ends of layers' names says of a layer; the common value where none fits, as in PEFT."""
    patterns = settings.get(table) or {}
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{CONFIG}: {table} has no pattern {shown(pattern)}: {error}", hint="correct it"
            ) from error
    return settings.get(default)


def _head_of_its_own(
    foreign: Foreign, base: Foreign, whole: Mapping[str, Tensor]
) -> tuple[Foreign, list[str]]:
    """Without the base's labels where the adapter brings a classifier of another number of classes."""
    heads = {key: t.shape[0] for name, t in whole.items() if (key := _key(name)) in _HEADS and t.ndim == 2}
    before = {key: t.shape[0] for name, t in base.state.items() if (key := _key(name)) in heads and t.ndim}
    if foreign.config is None or heads == before:
        return foreign, []
    classes = next(iter(heads.values()))
    stated = {"num_classes": classes} if "num_classes" in foreign.config else {}
    config = {key: value for key, value in foreign.config.items() if key not in _LABELS} | stated
    for part in ("pretrained_cfg", "model_args"):
        if isinstance(nested := config.get(part), Mapping):
            config[part] = {k: v for k, v in nested.items() if k not in (*_LABELS, "num_classes")}
    note = f"the base's labels are not those of the adapter's {classes} classes"
    return replace(foreign, config=config), [note]


def _key(name: str) -> str:
    """One name for a tensor whether the file, transformers 4 or 5 in memory or PEFT names it."""
    name = next((name.removeprefix(model) for model in _MODELS if name.startswith(model)), name)
    return file_name(name, "", vit_mlp=True)


def _range(ranks: set[int]) -> str:
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _refusal(source: str, what: str) -> CheckpointError:
    return CheckpointError(f"{source} {what}", hint=f"merge it: {MERGE}")


def _misfit(adapter: Adapter, layer: str, what: str) -> CheckpointError:
    return CheckpointError(f"{adapter.source}: {cut(layer)} is {what}", hint=f"merge it with PEFT: {MERGE}")
