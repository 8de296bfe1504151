"""A bundle's model as transformers' image classifiers lay it out: ``config.json`` and named tensors.

What a class of transformers computes, the family that reads its files knows
(``vitdeploy.checkpoint.families``): a model is written for the first class whose files would be read back as
just this model, and where none would, it is refused. So nothing is said twice, and what is written is what
the readers' tests hold against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Manifest
from vitdeploy.checkpoint import families
from vitdeploy.checkpoint.families import image_text
from vitdeploy.checkpoint.families.base import Family, Foreign, Reading, filled, take_over, template_of
from vitdeploy.checkpoint.places import from_path
from vitdeploy.config import ModelConfig, Scores, Size, SwinConfig, ViTConfig, size_name
from vitdeploy.errors import CheckpointError, ConfigError, UsageError
from vitdeploy.model.registry import expected_shapes

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""``hidden_act`` of each activation."""
_PROBLEMS: Mapping[Scores, str] = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
    "none": "regression",
}
_HINT = "the ONNX files alone go to a server: --target triton-server or docker"

Fields = dict[str, Any]


@dataclass(frozen=True)
class _Class:
    """A class of transformers for image classification."""

    model_type: str
    name: str
    fields: Callable[[Any], Fields | None]
    """What ``config.json`` says of our configuration; None where it is of another kind altogether."""
    prefix: str
    """Before the names of all but the heads' tensors."""
    head: str = "classifier"
    own: bool = False
    """Whether it is none of transformers', but in a file of ours beside the weights."""
    unread: Callable[[ModelConfig], Mapping[str, Tensor]] = lambda config: {}
    """Tensors that the class holds and its logits do not need."""


@dataclass(frozen=True)
class HubModel:
    """How a model is written."""

    config: Fields
    """``config.json``."""
    names: Mapping[str, str]
    """Our parameters to their tensors; several to one where they are stacked there, in this order."""
    kind: _Class
    family: Family

    @property
    def model_type(self) -> str:
        return self.kind.model_type

    @property
    def architecture(self) -> str:
        """The class in transformers."""
        return self.kind.name

    @property
    def needs_code(self) -> bool:
        """Whether the class lies in the folder, so that transformers asks for trust in it."""
        return self.kind.own


def hub_model(manifest: Manifest, where: object) -> HubModel:
    """The class of transformers that computes the bundle's logits, and what its files say.

    Args:
        where: what errors call the bundle.

    Raises:
        UsageError: there is none; says why.
    """
    config = manifest.model
    if config is None:
        raise UsageError(
            f"{where}: is of a module of one's own, of which transformers has no class", hint=_HINT
        )
    if not isinstance(config, (ViTConfig, SwinConfig)):
        raise UsageError(
            f"{where}: transformers has no image classifier of the kind {config.kind!r}", hint=_HINT
        )
    nearest: tuple[int, str] | None = None
    for kind in _CLASSES:
        described = kind.fields(config)
        if described is None:
            continue
        document = _document(kind, described, manifest)
        family = _FAMILIES[kind.model_type]
        try:
            reading = family.read(_empty(kind, document, config, where), None)
        except (CheckpointError, ConfigError):  # the class cannot be so, whatever its weights
            continue
        differing = _differences(config, reading.config)
        if not differing:
            # These interpolate in every call, and take each table for one of a square.
            if family.positions.even_at_own_size and config.grid[0] != config.grid[1]:
                raise UsageError(
                    f"{where}: transformers' {kind.name} computes images of {size_name(config.image_size)} "
                    "with positions of another grid: it takes them for those of a square",
                    hint=f"export with a square --image-size; {_HINT}",
                )
            return HubModel(document, _names(reading, config), kind, family)
        said = f"{kind.name} is nearest, where {differing[0]}"
        if nearest is None or len(differing) < nearest[0]:
            nearest = len(differing), said
    why = f" ({nearest[1]})" if nearest else ""
    raise UsageError(
        f"{where}: transformers has no image classifier that computes this model{why}", hint=_HINT
    )


def write_weights(model: HubModel, bundle: Bundle, folder: Path) -> None:
    """Write ``model.safetensors``: the bundle's weights in its dtypes, what is in float64 rounded to float32.

    Raises:
        BundleError: the bundle's weights are damaged.
    """
    bundle.verify_hashes(bundle.weights)
    state: dict[str, Tensor] = {}
    for file in bundle.weights:
        state |= load_file(bundle.path(file))
    config = bundle.manifest.model
    assert config is not None
    parts: dict[str, list[Tensor]] = {}
    for ours, theirs in model.names.items():
        parts.setdefault(theirs, []).append(_narrowed(state[ours]))
    tensors = {
        name: _shaped(name, torch.cat(several) if len(several) > 1 else several[0])
        for name, several in parts.items()
    }
    tensors |= model.kind.unread(config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def check_written(model: HubModel, bundle: Bundle, folder: Path) -> None:
    """Read what was written as anybody's checkpoint, and hold it against the bundle: model, weights, labels.

    Raises:
        AssertionError: it is another one.
    """
    manifest = bundle.manifest
    config = manifest.model
    assert config is not None
    foreign, _ = from_path(folder, str(folder))
    reading = model.family.read(foreign, None)
    taken, _ = take_over(reading, model.family.name, str(folder))
    state: dict[str, Tensor] = {}
    for file in bundle.weights:
        state |= load_file(bundle.path(file))
    wrong = [name for name, tensor in state.items() if not torch.equal(taken[name], _narrowed(tensor))]
    if wrong or _differences(config, reading.config) or reading.labels != _labels(manifest):
        raise AssertionError(f"{folder}: is not read back as it was written: {wrong[:3]}")


# --- what the classes say ---------------------------------------------------------------------------------


def _common(config: ViTConfig) -> Fields:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "image_size": _side(config.image_size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
    }


def _side(size: Size) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _vit(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig):
        return None
    return {**_common(config), "intermediate_size": config.mlp_width, "qkv_bias": config.qkv_bias}


def _deit(config: ModelConfig) -> Fields | None:
    return _vit(config) if isinstance(config, ViTConfig) and config.distillation_token else None


def _deit_teacher(config: ModelConfig) -> Fields | None:
    return _deit(config) if isinstance(config, ViTConfig) and config.pool == "both_heads" else None


def _dinov2(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or config.registers or config.rotary or not config.layer_scale:
        return None
    return _of_dinov2(config)


def _dinov2_with_registers(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or config.rotary or not config.registers:
        return None
    return {**_of_dinov2(config), "num_register_tokens": config.registers}


def _of_dinov2(config: ViTConfig) -> Fields:
    # Of SwiGLU, two thirds are kept of the width that the ratio gives.
    inner = config.mlp_width * 3 // 2 if config.gated_mlp else config.mlp_width
    return {
        **_common(config),
        "mlp_ratio": max(1, round(inner / config.width)),
        "qkv_bias": config.qkv_bias,
        "use_swiglu_ffn": config.gated_mlp,
        "use_mask_token": False,
    }


def _beit(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or not (config.score_bias or config.final_norm == "pooled"):
        return None
    return {
        **_common(config),
        "intermediate_size": config.mlp_width,
        "use_mask_token": False,
        "use_absolute_position_embeddings": config.position == "learned",
        "use_relative_position_bias": config.score_bias,
        "use_shared_relative_position_bias": False,
        "use_mean_pooling": config.pool == "mean",
        "layer_scale_init_value": 0.1 if config.layer_scale else 0.0,
    }


def _swin(config: ModelConfig) -> Fields | None:
    if not isinstance(config, SwinConfig) or config.version != 1:
        return None
    return _of_swin(config, config.windows[0][0])


def _swinv2(config: ModelConfig) -> Fields | None:
    if not isinstance(config, SwinConfig) or config.version != 2:
        return None
    measures = [window[0] for window in config.pretrained_windows] or [0] * len(config.depths)
    # Windows are cut to small maps, so that the largest is what was configured.
    return {
        **_of_swin(config, max(window[0] for window in config.windows)),
        "pretrained_window_sizes": measures,
    }


def _of_swin(config: SwinConfig, window: int) -> Fields:
    return {
        "image_size": _side(config.image_size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": window,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "hidden_act": _ACTIVATIONS[config.activation],
        "use_absolute_embeddings": config.position,
        "layer_norm_eps": config.norm_eps,
    }


def _tower(config: ViTConfig) -> Fields:
    return {**_common(config), "intermediate_size": config.mlp_width}


def _siglip(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or config.cls_token:
        return None
    tower = {**_tower(config), "model_type": "siglip_vision_model", "vision_use_head": False}
    # The tokens of the text tower, which is not there, are its vocabulary's only by accident.
    return {"vision_config": tower, "text_config": {"bos_token_id": None, "eos_token_id": None}}


def _clip(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or not config.pre_norm:
        return None
    return {"vision_config": {**_tower(config), "model_type": "clip_vision_model"}}


def _clip_zero_shot(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or config.head_on != "embedding" or not config.projection:
        return None
    return {**_tower(config), "projection_dim": config.projection}


def _siglip_zero_shot(config: ModelConfig) -> Fields | None:
    if not isinstance(config, ViTConfig) or config.head_on != "embedding" or config.projection:
        return None
    return _tower(config) if config.pool == "probe" else None


def _unread_norm(config: ModelConfig) -> Mapping[str, Tensor]:
    """CLIP's norm behind pooling, which its classifier has and passes by."""
    assert isinstance(config, ViTConfig)
    name = f"{image_text.PREFIX}.post_layernorm"
    return {f"{name}.weight": torch.ones(config.width), f"{name}.bias": torch.zeros(config.width)}


def _unread_mask(config: ModelConfig) -> Mapping[str, Tensor]:
    """What stands for patches that are hidden in training."""
    assert isinstance(config, ViTConfig)
    return {"dinov2_with_registers.embeddings.mask_token": torch.zeros(1, config.width)}


_TOWER = image_text.PREFIX
_CLASSES: tuple[_Class, ...] = (
    _Class("clip_vision_model", image_text.CLIP_ZERO_SHOT, _clip_zero_shot, _TOWER, own=True),
    _Class("siglip_vision_model", image_text.SIGLIP_ZERO_SHOT, _siglip_zero_shot, _TOWER, own=True),
    _Class("deit", "DeiTForImageClassificationWithTeacher", _deit_teacher, "deit", head="cls_classifier"),
    _Class("deit", "DeiTForImageClassification", _deit, "deit"),
    _Class(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        _dinov2_with_registers,
        "dinov2_with_registers",
        unread=_unread_mask,
    ),
    _Class("dinov2", "Dinov2ForImageClassification", _dinov2, "dinov2"),
    _Class("beit", "BeitForImageClassification", _beit, "beit"),
    _Class("swin", "SwinForImageClassification", _swin, "swin"),
    _Class("swinv2", "Swinv2ForImageClassification", _swinv2, "swinv2"),
    _Class("siglip", "SiglipForImageClassification", _siglip, _TOWER),
    _Class("clip", "CLIPForImageClassification", _clip, _TOWER, unread=_unread_norm),
    _Class("vit", "ViTForImageClassification", _vit, "vit"),
)
"""In the order that they are tried."""
_FAMILIES: Mapping[str, Family] = {
    kind.model_type: next(
        family
        for family in families.FAMILIES
        if family.claims(Foreign("", {}, {"model_type": kind.model_type}))
    )
    for kind in _CLASSES
}
"""That reads the files of a model type."""


# --- from our configuration to theirs ---------------------------------------------------------------------


def _document(kind: _Class, described: Fields, manifest: Manifest) -> Fields:
    """``config.json`` as a whole."""
    labels = _labels(manifest)
    document: Fields = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        **described,
        "dtype": "float32",
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": _PROBLEMS[manifest.scores],
    }
    if kind.own:
        document["auto_map"] = {"AutoModelForImageClassification": f"{MODULE}.{kind.name}"}
    return document


MODULE = "modeling_zero_shot"
"""Python's name for the file with the classes that are none of transformers'."""


def _labels(manifest: Manifest) -> tuple[str, ...]:
    """The bundle's, and transformers' own for a bundle that names none."""
    classes = manifest.model.classes if manifest.model else 0
    return manifest.labels or tuple(f"LABEL_{number}" for number in range(classes))


def _empty(kind: _Class, document: Fields, config: ModelConfig, where: object) -> Foreign:
    """The checkpoint with no more tensors than tell a family which of its models it is."""
    reads = config.output_shape("embedding" if getattr(config, "head_on", "") == "embedding" else "features")
    assert reads is not None
    with torch.device("meta"):
        state = {
            f"{kind.head}.weight": torch.empty(config.classes, *reads),
            f"{kind.prefix}.embeddings.mask_token": torch.empty(1),
            f"{kind.prefix}.encoder.nothing": torch.empty(1),
        }
        if projection := getattr(config, "projection", 0):
            state["visual_projection.weight"] = torch.empty(projection, 1)
    return Foreign(str(where), state, document)


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Where two configurations give different logits."""
    if ours.kind != theirs.kind:
        return [f"the kind is {theirs.kind!r}"]
    ours, theirs = _plain(ours), _plain(theirs)
    pairs = ((f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))  # type: ignore[arg-type]
    return [f"{name} is {other!r}, and this model's {mine!r}" for name, mine, other in pairs if mine != other]


def _plain(config: ModelConfig) -> ModelConfig:
    """The configuration with one way to say what logits cannot tell apart."""
    if isinstance(config, ViTConfig):
        norm = config.final_norm
        if norm == "read":
            norm = "pooled"
        if norm == "pooled" and config.pool == "cls":
            norm = "tokens"  # of which CLS is one
        return replace(config, final_norm=norm, codes=0, key_bias=config.qkv_bias and config.key_bias)
    if isinstance(config, SwinConfig):
        stages = range(len(config.depths))
        whole = all(config.padded(stage) == config.maps[stage] for stage in stages)
        return replace(
            config,
            windows=tuple(map(config.window, stages)),
            shifts=tuple(config.shift(stage, 1) for stage in stages),
            window_rule="fixed",
            pad_first=config.pad_first or whole,
            pretrained_windows=config.pretrained_windows if any(map(any, config.pretrained_windows)) else (),
        )
    return config


def _names(reading: Reading, config: ModelConfig) -> dict[str, str]:
    """Our parameters to the names of their tensors in the file."""
    names = {}
    for ours in expected_shapes(config):
        template, numbers = template_of(ours)
        names[ours] = reading.spell(filled(reading.layout[template].name, numbers))
    return names


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _shaped(name: str, tensor: Tensor) -> Tensor:
    """A tensor in the shape that files have: tables and tokens with an axis for the batch."""
    leaf = name.rpartition(".")[2]
    if leaf in ("cls_token", "distillation_token"):
        return tensor.reshape(1, 1, -1)
    if leaf in ("position_embeddings", "register_tokens"):
        return tensor.unsqueeze(0)
    if leaf == "probe":
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(-1, 1, 1) if leaf == "logit_scale" else tensor
