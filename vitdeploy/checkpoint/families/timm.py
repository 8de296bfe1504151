"""timm's VisionTransformer: ``vit_*``, ``deit_*`` (distilled too), ``deit3_*``, DINOv2 and its registers.

Names are those of timm's state dict. Two elder spellings are understood as well: the released files of DINOv2
(``register_tokens``, ``w12``/``w3``) and of DeiT III (``gamma_1``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    config_object,
    flat,
    height_and_width,
    linear,
    merged_qkv,
    rename_tensors,
)
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import Activation, Preprocess, Size, ViTConfig
from vitdeploy.errors import CheckpointError, MissingDependency, did_you_mean
from vitdeploy.images.preprocess import from_timm


def _layout(norm: str) -> Layout:
    """``norm`` is where the final LayerNorm lies: before pooling, or after it (``fc_norm``)."""
    return {
        **linear("patch_embed", "patch_embed.proj"),
        "cls_token": Source("cls_token", flat(1)),
        "dist_token": Source("dist_token", flat(1)),
        "registers": Source("reg_token", flat(2)),
        "pos_embed": Source("pos_embed", flat(2)),
        **linear("blocks.{i}.norm1", "blocks.{i}.norm1"),
        **merged_qkv("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias"),
        **linear("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        "blocks.{i}.scale1": Source("blocks.{i}.ls1.gamma"),
        **linear("blocks.{i}.norm2", "blocks.{i}.norm2"),
        **linear("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        **linear("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        "blocks.{i}.scale2": Source("blocks.{i}.ls2.gamma"),
        **linear("norm", norm),
        **linear("representation", "pre_logits.fc"),
        **linear("head", "head"),
        **linear("head_dist", "head_dist"),
    }


_ELDER_NAMES = (
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),
)

# Unlike others of their width.
_SIXTEEN_HEADS = re.compile(r"vit_base_patch16_gap_224|vit_giantopt_.*")
_TANH_GELU = re.compile(
    r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip_gap_\d+|large_patch16_siglip_gap_512)"
)
# Same tensor names, another function.
_REFUSED = re.compile(r".*_rpn_.*")

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_ACTIVATION_CLASSES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
_NORMS = (None, "layernorm")


def _claims(foreign: Foreign) -> bool:
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= foreign.state.keys()


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    arguments, pretrained = config_object(config, "model_args"), config_object(config, "pretrained_cfg")
    architecture = str(config.get("architecture") or pretrained.get("architecture") or "").split(".")[0]
    _refuse_unsupported(architecture, arguments)
    state, originals = rename_tensors(foreign.state, _modern_name)
    layout = _layout("fc_norm" if "fc_norm.weight" in state else "norm")
    stated = _stated_fields(foreign.source, architecture, config, state)
    heads, sizes = what_is_open(template)
    result = infer_config(
        layout,
        state,
        foreign.source,
        heads=_heads(architecture, arguments) or heads,
        sizes=[*_sizes(arguments, pretrained), *sizes],
        **stated,
    )
    notes = [] if architecture or template else [heads_note(result)]
    if not pretrained:
        notes.append("no config.json of timm: preprocessing is timm's default for ViT")
    return Reading(
        config=result,
        layout=layout,
        state=state,
        preprocess=lambda size: _preprocess(pretrained, result.channels, size or result.image_size),
        ignored={"mask_token": None},
        originals=originals,
        labels=_labels(config, pretrained, result.classes),
        notes=tuple(notes),
    )


def _stated_fields(
    source: str, architecture: str, config: Mapping[str, object], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What the configuration says, and what the presence of a tensor means in timm."""
    arguments, late = config_object(config, "model_args"), "fc_norm.weight" in state
    fields: dict[str, Any] = {"norm_after_pool": late, "norm_eps": config_number(arguments, "norm_eps", 1e-6)}
    if (activation := _activation(architecture, arguments)) is not None:
        fields["activation"] = activation
    pool = arguments.get("global_pool") or config.get("global_pool") or ("avg" if late else None)
    if pool not in (None, "avg", "token"):
        raise CheckpointError(f"{source}: pooling by {pool!r} is not supported")
    if "dist_token" in state:
        fields["pool"] = "both_heads"
    elif pool is not None:
        fields["pool"] = "mean" if pool == "avg" else "cls"
    if arguments.get("pos_embed") in ("", "none"):
        fields["position"] = "none"
    for ours, theirs in (("classes", "num_classes"), ("depth", "depth")):
        if (value := arguments.get(theirs, config.get(theirs))) is not None:
            fields[ours] = config_integer({theirs: value}, theirs, 0)
    return fields


def _refuse_unsupported(architecture: str, arguments: Mapping[str, object]) -> None:
    unsupported = []
    if _REFUSED.fullmatch(architecture):
        unsupported.append(f"architecture {architecture}")
    if arguments.get("pool_include_prefix"):
        unsupported.append("pool_include_prefix")
    if arguments.get("norm_layer") not in _NORMS:
        unsupported.append(f"norm_layer {arguments['norm_layer']!r}")
    unsupported += [f"{key} {arguments[key]!r}" for key in ("attn_layer", "block_fn") if arguments.get(key)]
    if unsupported:
        raise CheckpointError(
            f"timm's {', '.join(unsupported)} is not supported",
            hint="--model module:function exports any nn.Module, timm.create_model(...) too",
        )


def _modern_name(name: str) -> str:
    for pattern, replacement in _ELDER_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _heads(architecture: str, arguments: Mapping[str, object]) -> Callable[[int], int] | None:
    """The heads that the configuration or the name settles."""
    if "num_heads" in arguments:
        heads = config_integer(arguments, "num_heads", 0)
        if heads < 1:
            raise CheckpointError(f"config.json: num_heads must be at least 1, not {heads}")
        return lambda width: heads
    return (lambda width: 16) if _SIXTEEN_HEADS.fullmatch(architecture) else None


def _activation(architecture: str, arguments: Mapping[str, object]) -> Activation | None:
    name = arguments.get("act_layer")
    if name is None:
        return "gelu_tanh" if _TANH_GELU.fullmatch(architecture) else None
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        guess = did_you_mean(str(name), _ACTIVATIONS)
        raise CheckpointError(f"config.json: act_layer {name!r} is not supported{guess}")
    return _ACTIVATIONS[name]


def _sizes(arguments: Mapping[str, object], pretrained: Mapping[str, object]) -> list[Size]:
    sizes = []
    if arguments.get("img_size") is not None:
        sizes.append(height_and_width(arguments["img_size"], "img_size"))
    shape = pretrained.get("input_size")
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        sizes.append(height_and_width(shape[1:], "input_size"))
    return sizes


def _preprocess(pretrained: Mapping[str, object], channels: int, size: Size) -> Preprocess:
    settings = pretrained or {"crop_pct": 0.9, "mean": 0.5, "std": 0.5}
    return from_timm({**settings, "input_size": (channels, *size)})


def _labels(
    config: Mapping[str, object], pretrained: Mapping[str, object], classes: int
) -> tuple[str, ...] | None:
    """timm's ``label_names``, in words where ``label_descriptions`` has them."""
    names = config.get("label_names") or pretrained.get("label_names")
    if not names or not classes:
        return None
    if isinstance(names, Mapping):
        names = [names.get(str(index), names.get(index)) for index in range(max(classes, len(names)))]
    if not isinstance(names, (list, tuple)) or len(names) != classes or None in names:
        count = len(names) if isinstance(names, (list, tuple)) else 0
        raise CheckpointError(f"config.json: {count} label_names, but the head has {classes} classes")
    words = config_object(config, "label_descriptions") or config_object(pretrained, "label_descriptions")
    return tuple(str(words.get(str(name), name)) for name in names)


FAMILY = Family("timm", _claims, _read, PositionRule(antialias=True, dtype=torch.float32))


def from_library(name: str) -> Foreign:
    """Return timm's pretrained model ``name``, downloaded by timm.

    Raises:
        MissingDependency: timm is not installed.
        CheckpointError: timm does not know the model, cannot get its weights, or builds it from other blocks.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependency("timm", extra="hub", purpose=f"--model timm:{name}") from error
    names = timm.list_models() + timm.list_models(pretrained=True)
    if name not in names:
        raise CheckpointError(f"timm has no model {name!r}{did_you_mean(name, names)}")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the download raises: HTTP, offline, disk, no weights published
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"timm could not load the pretrained weights of {name}: {reason}",
            hint="download its model.safetensors and config.json into a folder, and give that folder",
        ) from error
    return Foreign(f"timm:{name}", model.state_dict(), _config_of(model, name))


def _config_of(model: Any, name: str) -> dict[str, object]:
    """What timm's hub config.json would say of a live model, with what only the module knows."""
    kinds = type(model).__name__, type(model.blocks[0]).__name__ if hasattr(model, "blocks") else ""
    if kinds not in (("VisionTransformer", "Block"), ("VisionTransformerDistilled", "Block")):
        raise CheckpointError(
            f"timm builds {name} as {' of '.join(filter(None, kinds))}, which is not supported",
            hint="--model module:function exports any nn.Module, timm.create_model(...) too",
        )
    block = model.blocks[0]
    activation = type(block.mlp.act).__name__
    arguments = {
        "num_heads": block.attn.num_heads,
        "norm_eps": block.norm1.eps,
        "act_layer": _ACTIVATION_CLASSES.get(activation, activation),
        "global_pool": model.global_pool,
        "img_size": list(model.patch_embed.img_size),
        "pool_include_prefix": model.pool_include_prefix,
    }
    return {"architecture": name, "model_args": arguments, "pretrained_cfg": dict(model.pretrained_cfg)}
