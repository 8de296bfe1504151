"""timm's VisionTransformer: ``vit_*``, ``deit_*`` (distilled too), ``deit3_*``, DINOv2, CLIP's and SigLIP's.

Names are those of timm's state dict. Two elder spellings are understood as well: the released files of DINOv2
(``register_tokens``, ``w12``/``w3``) and of DeiT III (``gamma_1``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    part,
    refuse_indivisible,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.huggingface import scores_of
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm_names import activation_of, heads_of, is_plain, kind_of, width_of
from vitdeploy.checkpoint.refusals import CORRECT, OTHER_MODEL, cut, shown
from vitdeploy.config import Activation, Pool, Preprocess, Size, ViTConfig
from vitdeploy.errors import ArchitectureError, CheckpointError, MissingDependency, did_you_mean
from vitdeploy.images.preprocess import from_timm


def layout_of(norm: str) -> Layout:
    """``norm`` is where the final LayerNorm lies: before pooling, or after it (``fc_norm``)."""
    return {
        **linear("patch_embed", "patch_embed.proj"),
        **linear("pre_norm", "norm_pre"),
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
        "probe_pool.probe": Source("attn_pool.latent", flat(1)),
        **linear("probe_pool.q", "attn_pool.q"),
        **{
            f"probe_pool.{name}.{leaf}": Source(f"attn_pool.kv.{leaf}", part(index, of=2))
            for index, name in enumerate("kv")
            for leaf in ("weight", "bias")
        },
        **linear("probe_pool.proj", "attn_pool.proj"),
        **linear("probe_pool.norm", "attn_pool.norm"),
        **linear("probe_pool.mlp.fc1", "attn_pool.mlp.fc1"),
        **linear("probe_pool.mlp.fc2", "attn_pool.mlp.fc2"),
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
_VIT_SETTINGS = {"crop_pct": 0.9, "mean": 0.5, "std": 0.5}
_POOLS: Mapping[str, Pool] = {"avg": "mean", "token": "cls", "map": "probe"}


def _claims(foreign: Foreign) -> bool:
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= foreign.state.keys()


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    architecture, arguments = architecture_of(config), config_object(config, "model_args")
    _refuse_unsupported(foreign.source, architecture, arguments)
    head = sole_head(foreign.state, "head")
    state, originals = rename_tensors(foreign.state, lambda name: modern_name(name, head))
    layout = layout_of("fc_norm" if "fc_norm.weight" in state else "norm")
    stated = stated_fields(foreign.source, architecture, config, state)
    heads = known_heads(architecture, arguments) or what_is_open(template, foreign.wanted)[0]
    reading = reading_of(foreign, template, layout, state, originals, heads=heads, **stated)
    if not architecture and "blocks.0.gamma_1" in foreign.state:
        also = "gamma_1 is taken for DeiT III's layer scale; timm's vit_*_rope_ape_* have the same names"
        reading = replace(reading, notes=(*reading.notes, also))
    return reading


def reading_of(
    foreign: Foreign,
    template: ViTConfig | None,
    layout: Layout,
    state: Mapping[str, Tensor],
    originals: Mapping[str, str],
    *,
    heads: Callable[[int], int],
    **stated: Any,
) -> Reading:
    """What all of timm's transformers have in common: configuration, preprocessing, labels, notes.

    Args:
        state: with the head under ``head``, whatever the file calls it.
        heads: attention heads for a width.
        stated: fields of ``ViTConfig`` that shapes cannot tell.
    """
    config = foreign.config or {}
    arguments, pretrained = config_object(config, "model_args"), pretrained_of(config)
    architecture, head = architecture_of(config), sole_head(foreign.state, "head")
    _, sizes = what_is_open(template, foreign.wanted)
    own_sizes = own_sizes_of(config)
    result = infer_config(layout, state, foreign.source, heads=heads, sizes=[*own_sizes, *sizes], **stated)
    if own_sizes and foreign.wanted is None:
        refuse_indivisible("timm", foreign.source, own_sizes[0], result.patch_size)
    if result.pool == "probe" and result.prefix_tokens:
        raise CheckpointError(
            f"{foreign.source}: timm's attention pooling of the patches alone, beside "
            f"{result.prefix_tokens} other tokens, is not supported",
            hint=OTHER_MODEL,
        )
    notes: tuple[str, ...] = () if head in (None, "head") else (f"the head is the linear layer {head!r}",)
    assumed: dict[str, str | None] = {}
    if "num_heads" not in arguments and width_of(architecture) not in (None, result.width):
        assumed["heads"] = heads_note(result)
    notes += shape_note(result, template, foreign.wanted, own_sizes)
    if not architecture:
        assumed |= {"heads": None if template else heads_note(result), "activation": None}
    if not pretrained:
        assumed["preprocess"] = "no config.json of timm: preprocessing is timm's default for ViT"
    labels = labels_of(config, pretrained, result.classes)
    ignored: dict[str, str | None] = {"mask_token": None}
    if labels is None and _projects(state):
        result = replace(result, projection=result.classes, classes=0)
        layout = {**layout, "projection.weight": layout["head.weight"]}
        ignored["head.bias"] = None
        notes = (*notes, "the head is CLIP's projection, as its bias of zeros tells: there are no logits")
    return Reading(
        config=result,
        layout=layout,
        state=state,
        preprocess=lambda size: preprocess_of(
            config, pretrained, result.channels, size or result.image_size, _VIT_SETTINGS
        ),
        ignored=ignored,
        originals=originals,
        labels=labels,
        scores=scores_of(config) if is_wrapped(config) else None,
        notes=notes,
        assumed=assumed,
    )


def _projects(state: Mapping[str, Tensor]) -> bool:
    """Whether the head is the projection of a published CLIP, which timm gives a bias of zeros."""
    bias = state.get("head.bias")
    return "norm_pre.weight" in state and bias is not None and bias.ndim == 1 and not bias.any()


def stated_fields(
    source: str,
    architecture: str,
    config: Mapping[str, object],
    state: Mapping[str, Tensor],
    norm_eps: float = 1e-6,
) -> dict[str, Any]:
    """What the configuration says, and what the presence of a tensor means in timm.

    Args:
        norm_eps: where the configuration does not say it.
    """
    arguments, late = config_object(config, "model_args"), "fc_norm.weight" in state
    fields: dict[str, Any] = {
        "final_norm": "pooled" if late else "tokens",
        # CLIP's, which have a norm before the blocks, have another number there.
        "norm_eps": config_number(arguments, "norm_eps", 1e-5 if "norm_pre.weight" in state else norm_eps),
    }
    if (activation := activation_by_argument(arguments) or activation_of(architecture)) is not None:
        fields["activation"] = activation
    pool = arguments.get("global_pool") or config.get("global_pool") or ("avg" if late else None)
    if pool is not None and pool not in _POOLS:
        raise CheckpointError(f"{source}: pooling by {shown(pool)} is not supported", hint=OTHER_MODEL)
    if "dist_token" in state:
        fields["pool"] = "both_heads"
    elif pool is not None:
        fields["pool"] = _POOLS[str(pool)]
    if arguments.get("pos_embed") in ("", "none"):
        fields["position"] = "none"
    # transformers keeps the number of classes of a model that it saves without its head.
    body = is_wrapped(config) and "ForImageClassification" not in str(config.get("architectures"))
    for ours, theirs in (("depth", "depth"),) if body else (("classes", "num_classes"), ("depth", "depth")):
        if (value := arguments.get(theirs, config.get(theirs))) is not None:
            fields[ours] = config_integer({theirs: value}, theirs, 0)
    return fields


def is_wrapped(config: Mapping[str, object]) -> bool:
    """Whether transformers saved it, as a ``TimmWrapperModel``."""
    return config.get("model_type") == "timm_wrapper"


def architecture_of(config: Mapping[str, object]) -> str:
    """timm's name of the model, without its tag; empty where there is none."""
    return str(config.get("architecture") or pretrained_of(config).get("architecture") or "").split(".")[0]


def pretrained_of(config: Mapping[str, object]) -> Mapping[str, object]:
    """``pretrained_cfg``; elder files have its settings beside ``architecture``, as timm's loader knows."""
    nested = config_object(config, "pretrained_cfg")
    flat = not config.keys().isdisjoint(("input_size", "mean", "std", "crop_pct", "interpolation"))
    return config if flat and not nested else nested


def _refuse_unsupported(source: str, architecture: str, arguments: Mapping[str, object]) -> None:
    unsupported = [] if not architecture or is_plain(architecture) else [called(architecture)]
    refuse(source, unsupported + unsupported_arguments(arguments))


def unsupported_arguments(arguments: Mapping[str, object]) -> list[str]:
    """Arguments of the class VisionTransformer that make another model of it."""
    unsupported = ["pool_include_prefix"] if arguments.get("pool_include_prefix") else []
    if arguments.get("norm_layer") not in _NORMS:
        unsupported.append(f"norm_layer {shown(arguments['norm_layer'])}")
    return unsupported + [
        f"{key} {shown(arguments[key])}" for key in ("attn_layer", "block_fn") if arguments.get(key)
    ]


def called(architecture: str) -> str:
    """An architecture as an error names it."""
    kind = kind_of(architecture)
    return f"architecture {cut(architecture)}" + (f" ({kind})" if kind else "")


def refuse(source: str, unsupported: Sequence[str]) -> None:
    """Raise an ArchitectureError where there is anything of timm's that is not computed here."""
    if unsupported:
        raise ArchitectureError(
            f"{source}: timm's {', '.join(unsupported)} is not supported",
            hint="-m timm:NAME --checkpoint with this file exports timm's model as it is, without rewrites",
        )


def modern_name(name: str, head: str | None) -> str:
    """The name that timm gives it today; ``head`` is the linear layer in the head's place."""
    if head is not None and name.rpartition(".")[0] == head:
        return f"head.{name.rpartition('.')[2]}"
    for pattern, replacement in _ELDER_NAMES:
        name = pattern.sub(replacement, name)
    return name


def known_heads(architecture: str, arguments: Mapping[str, object]) -> Callable[[int], int] | None:
    """The heads that the configuration or the name settles."""
    if "num_heads" in arguments:
        heads = config_integer(arguments, "num_heads", 0)
        if heads < 1:
            raise CheckpointError(f"config.json: num_heads must be at least 1, not {heads}", hint=CORRECT)
        return lambda width: heads
    known = heads_of(architecture)
    return None if known is None else lambda width: known


def activation_by_argument(arguments: Mapping[str, object]) -> Activation | None:
    """What ``act_layer`` says, where it is there."""
    name = arguments.get("act_layer")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        guess = did_you_mean(str(name), _ACTIVATIONS)
        raise CheckpointError(f"config.json: act_layer {shown(name)} is not supported{guess}", hint=CORRECT)
    return _ACTIVATIONS[name]


def own_sizes_of(config: Mapping[str, object]) -> list[Size]:
    """The image sizes that a configuration states, the model's first."""
    sizes, arguments, pretrained = [], config_object(config, "model_args"), pretrained_of(config)
    if arguments.get("img_size") is not None:
        sizes.append(height_and_width(arguments["img_size"], "img_size"))
    shape = pretrained.get("input_size")
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        sizes.append(height_and_width(shape[1:], "input_size"))
    return sizes


def preprocess_of(
    config: Mapping[str, object],
    pretrained: Mapping[str, object],
    channels: int,
    size: Size,
    usual: Mapping[str, object],
) -> Preprocess:
    """What timm's transform does; ``usual`` are the settings where no file has some."""
    settings = pretrained or usual
    # transformers turns photographs as their EXIF orientation says before it hands them to timm's transform.
    return replace(from_timm({**settings, "input_size": (channels, *size)}), exif=is_wrapped(config))


def labels_of(
    config: Mapping[str, object], pretrained: Mapping[str, object], classes: int
) -> tuple[str, ...] | None:
    """timm's ``label_names`` (``labels`` in elder files), in words where ``label_descriptions`` has them."""
    places = [found.get(key) for key in ("label_names", "labels") for found in (config, pretrained)]
    names = next(filter(None, places), None)
    if not names or not classes:
        return None
    if isinstance(names, Mapping):
        names = [names.get(str(index), names.get(index)) for index in range(max(classes, len(names)))]
    if not isinstance(names, (list, tuple)) or len(names) != classes or None in names:
        count = len(names) if isinstance(names, (list, tuple)) else 0
        raise CheckpointError(
            f"config.json: {count} label_names, but the head has {classes} classes", hint=CORRECT
        )
    words = config_object(config, "label_descriptions") or config_object(pretrained, "label_descriptions")
    return tuple(str(words.get(str(name), name)) for name in names)


_CLASSES = (
    ("VisionTransformer", "Block"),
    ("VisionTransformerDistilled", "Block"),
    ("Beit", "Block"),
    ("Eva", "EvaBlock"),
    ("SwinTransformer", "SwinTransformerBlock"),
    ("SwinTransformerV2", "SwinTransformerV2Block"),
)
"""Classes of timm's models and of their blocks; what else there is in them, architectures' names tell."""
_STAGED = ("SwinTransformer", "SwinTransformerV2")
"""Those whose blocks stand in stages."""

FAMILY = Family("timm", _claims, _read, PositionRule(antialias=True, dtype=torch.float32))


def build(
    name: str, *, trained: bool = True, classes: int | None = None, cache_dir: Path | str | None = None
) -> nn.Module:
    """Return timm's model ``name``, with the weights that it downloads or with random ones.

    Args:
        classes: of its head; the model's own when None.

    Raises:
        MissingDependency: timm is not installed.
        CheckpointError: timm does not know the model, or cannot get its weights.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependency("timm", extra="hub", purpose=f"--model timm:{name}") from error
    names = timm.list_models() + timm.list_models(pretrained=True)
    if name not in names:
        raise CheckpointError(
            f"timm has no model {shown(name)}{did_you_mean(name, names)}",
            hint="timm.list_models() lists what it has",
        )
    settings = {"cache_dir": cache_dir, "num_classes": classes}
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        model: nn.Module = timm.create_model(name, pretrained=trained, **given)
    except Exception as error:  # whatever the download raises: HTTP, offline, disk, no weights published
        reason = (str(error) or type(error).__name__).splitlines()[0]
        what = "load the pretrained weights of" if trained else "build"
        raise CheckpointError(
            f"timm could not {what} {name}: {reason}",
            hint="download its model.safetensors and give it with --checkpoint; or take --random weights",
        ) from error
    return model


def described(name: str, model: nn.Module, *, trained: bool) -> Foreign:
    """What this family reads of timm's model ``name``.

    Args:
        trained: whether its weights are those that timm's labels are about.

    Raises:
        ArchitectureError: timm builds it from other blocks.
    """
    config = _config_of(model, name)
    settings = config_object(config, "pretrained_cfg")
    if not trained:
        config["pretrained_cfg"] = {k: value for k, value in settings.items() if not k.startswith("label_")}
    elif not settings.get("label_names"):
        config["label_names"] = _imagenet_labels(model)
    return Foreign(f"timm:{name}", model.state_dict(), config)


def model_labels(model: Any) -> tuple[str, ...] | None:
    """The classes of a model of timm's, as its own settings name them, else as ImageNet does."""
    return labels_of({}, model.pretrained_cfg, model.num_classes) or _imagenet_labels(model)


def _imagenet_labels(model: nn.Module) -> tuple[str, ...] | None:
    """The classes in words, where their number tells a set of ImageNet's."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


def _config_of(model: Any, name: str) -> dict[str, object]:
    """What timm's hub config.json would say of a live model, with what only the module knows."""
    whole = type(model).__name__
    blocks: Any = ()
    if whole in dict(_CLASSES):
        blocks = model.layers[0].blocks if whole in _STAGED else model.blocks
    kinds = whole, type(blocks[0]).__name__ if len(blocks) else ""
    if kinds not in _CLASSES:
        raise ArchitectureError(
            f"timm builds {name} as {' of '.join(filter(None, kinds))}, which vitdeploy does not rewrite",
            hint=f"-m timm:{name} exports it as it is",
        )
    activation = type(blocks[0].mlp.act).__name__
    arguments = {
        "num_heads": blocks[0].attn.num_heads,
        "norm_eps": blocks[0].norm1.eps,
        "act_layer": _ACTIVATION_CLASSES.get(activation, activation),
        "global_pool": model.global_pool,
        "img_size": list(model.patch_embed.img_size),
        "pool_include_prefix": getattr(model, "pool_include_prefix", False),
    }
    return {"architecture": name, "model_args": arguments, "pretrained_cfg": dict(model.pretrained_cfg)}
