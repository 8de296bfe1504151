"""open_clip's own files: CLIP's image tower as open_clip and OpenAI name it, and towers that timm builds.

``visual.*`` is the image tower, described by ``open_clip_config.json`` beside it. Tokens are normalised
before they are pooled, but where ``final_ln_after_pool`` says otherwise. A tower of timm's is
``visual.trunk.*`` in timm's own names, with a projection behind it or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vitdeploy.checkpoint.families import timm
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    config_object,
    height_and_width,
    linear,
    merged_qkv,
    refuse_indivisible,
    rename_tensors,
)
from vitdeploy.checkpoint.families.image_text import TEXT_LEFT_OUT
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import CORRECT, OTHER_MODEL, shown
from vitdeploy.config import Activation, ModelConfig, Pool, Preprocess, Size, ViTConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.images.preprocess import from_timm, published

PREFIX = "visual"
"""Of the image tower's names."""

_BLOCK = "visual.transformer.resblocks.{i}"
_LAYOUT: Layout = {
    "patch_embed.weight": Source("visual.conv1.weight"),
    "cls_token": Source("visual.class_embedding"),
    "pos_embed": Source("visual.positional_embedding"),
    **linear("pre_norm", "visual.ln_pre"),
    **linear("blocks.{i}.norm1", f"{_BLOCK}.ln_1"),
    **merged_qkv(f"{_BLOCK}.attn.in_proj_weight", f"{_BLOCK}.attn.in_proj_bias"),
    **linear("blocks.{i}.attn.proj", f"{_BLOCK}.attn.out_proj"),
    "blocks.{i}.scale1": Source(f"{_BLOCK}.ls_1.gamma"),
    **linear("blocks.{i}.norm2", f"{_BLOCK}.ln_2"),
    **linear("blocks.{i}.mlp.fc1", f"{_BLOCK}.mlp.c_fc"),
    **linear("blocks.{i}.mlp.fc2", f"{_BLOCK}.mlp.c_proj"),
    "blocks.{i}.scale2": Source(f"{_BLOCK}.ls_2.gamma"),
    **linear("norm", "visual.ln_post"),
    "projection.weight": Source("visual.proj", lambda tensor: tensor.t() if tensor.ndim == 2 else tensor),
}
_BARE = frozenset(("conv1.weight", "class_embedding", "ln_post.weight"))
"""Names of an image tower that was saved alone."""
_TRUNK = "visual.trunk."
_TRUNKS = (timm.FAMILY,)
"""What a trunk may be of."""
_PROJECTIONS = ("visual.head.proj", f"{_TRUNK}head")
"""Where the projection behind a trunk is: a layer of open_clip's, or timm's own head."""

_IGNORED: Mapping[str, str | None] = {
    r"text\..*|transformer\.resblocks\..*|(token_embedding|ln_final)\..*": TEXT_LEFT_OUT,
    r"(text_projection|positional_embedding|attn_mask)(\.weight)?|logit_(scale|bias)": TEXT_LEFT_OUT,
    r"input_resolution|context_length|vocab_size": None,
}
_UNSUPPORTED = (
    *("attentional_pool", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"),
    *("scale_attn", "scale_fc"),
)
"""Settings of an image tower that change what it computes."""
_POOLS: Mapping[object, Pool] = {"tok": "cls", "avg": "mean"}
_CROPS: Mapping[str, str] = {"shortest": "center", "squash": "squash", "longest": "border"}
"""Ways to resize, and what timm calls them."""


def _claims(foreign: Foreign) -> bool:
    names = foreign.state.keys()
    return {"visual.conv1.weight", "visual.class_embedding"} <= names or names >= _BARE


def _claims_trunk(foreign: Foreign) -> bool:
    return any(name.startswith(_TRUNK) for name in foreign.state)


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    model = config_object(foreign.config, "model_cfg")
    vision = config_object(model, "vision_cfg")
    _refuse_unsupported(foreign.source, vision)
    bare = foreign.state.keys() >= _BARE
    state, originals = rename_tensors(foreign.state, lambda name: f"visual.{name}" if bare else name)
    assumed: dict[str, str | None] = {}
    heads, sizes = what_is_open(template, foreign.wanted)
    own_sizes: list[Size] = []
    if vision:
        heads = _heads(vision)
        own_sizes.append(height_and_width(vision.get("image_size", 224), "image_size"))
    config = infer_config(
        _LAYOUT,
        state,
        foreign.source,
        heads=heads,
        sizes=[*own_sizes, *sizes],
        norm_eps=config_number(config_object(vision, "norm_kwargs"), "eps", 1e-5),
        activation=_activation(foreign, model, vision, assumed),
        pre_norm=any(name.startswith("visual.ln_pre.") for name in state),
        pool=_POOLS[vision.get("pool_type", "tok")],
        final_norm="pooled" if vision.get("final_ln_after_pool") else "tokens",
    )
    if own_sizes and foreign.wanted is None:
        refuse_indivisible("open_clip", foreign.source, own_sizes[0], config.patch_size)
    if not vision and template is None:
        assumed["heads"] = heads_note(config)
    return Reading(
        config=config,
        layout=_LAYOUT,
        state=state,
        preprocess=_preprocess(foreign.config, config, assumed),
        ignored=_IGNORED,
        notes=shape_note(config, template, foreign.wanted, own_sizes),
        assumed=assumed,
        originals=originals,
        spell=lambda name: name.removeprefix("visual.") if bare else name,
    )


def _heads(vision: Mapping[str, object]) -> Callable[[int], int]:
    width_of_one = config_integer(vision, "head_width", 64)
    if width_of_one < 1:
        raise CheckpointError(f"open_clip_config.json: head_width is {width_of_one}", hint=CORRECT)
    return lambda width: max(1, width // width_of_one)


def _read_trunk(foreign: Foreign, template: ViTConfig | None) -> Reading:
    vision = config_object(config_object(foreign.config, "model_cfg"), "vision_cfg")
    rest = dict(foreign.state)
    projection = next((name for name in _PROJECTIONS if f"{name}.weight" in rest), "")
    weight, bias = (rest.pop(f"{projection}.{leaf}", None) for leaf in ("weight", "bias"))
    if bias is not None and bias.any():
        raise CheckpointError(
            f"{foreign.source}: a projection with a bias ({projection}.bias) is not supported",
            hint=OTHER_MODEL,
        )
    trunk = {name.removeprefix(_TRUNK): t for name, t in rest.items() if name.startswith(_TRUNK)}
    beside = {name: tensor for name, tensor in rest.items() if not name.startswith(_TRUNK)}
    inner = replace(foreign, state=trunk, config=_trunk_config(vision))
    family = next((family for family in _TRUNKS if family.claims(inner)), None)
    if family is None:
        name = f" {shown(vision['timm_model_name'])}" if vision.get("timm_model_name") else ""
        raise CheckpointError(
            f"{foreign.source}: its image tower is of timm{name}, and no plain ViT", hint=OTHER_MODEL
        )
    reading = family.read(inner, template)
    state, layout, config = {**reading.state, **beside}, dict(reading.layout), reading.config
    if weight is not None and isinstance(config, ViTConfig):
        place = f"{projection}.weight"
        state[place], layout["projection.weight"] = weight, Source(place)
        config = replace(config, projection=weight.shape[0] if weight.ndim else 0)
    assumed = {name: note for name, note in reading.assumed.items() if name != "preprocess"}
    return replace(
        reading,
        config=config,
        layout=layout,
        state=state,
        preprocess=_preprocess(foreign.config, config, assumed),
        ignored={**reading.ignored, **_IGNORED},
        assumed=assumed,
        originals={name: f"{_TRUNK}{reading.originals.get(name, name)}" for name in reading.state},
        spell=lambda name: name if name.startswith("visual.") else f"{_TRUNK}{name}",
    )


def _trunk_config(vision: Mapping[str, object]) -> Mapping[str, object] | None:
    """What timm's own config.json would say of a trunk."""
    if not vision:
        return None
    config: dict[str, object] = {"architecture": vision.get("timm_model_name") or ""}
    if vision.get("timm_pool"):
        config["global_pool"] = vision["timm_pool"]
    if vision.get("image_size") is not None:
        config["model_args"] = {"img_size": vision["image_size"]}
    return config


def _refuse_unsupported(source: str, vision: Mapping[str, object]) -> None:
    settings = [f"{key} {shown(vision[key])}" for key in _UNSUPPORTED if vision.get(key)]
    if (pool := vision.get("pool_type", "tok")) not in _POOLS:
        settings.append(f"pool_type {shown(pool)}")
    if settings:
        raise CheckpointError(
            f"{source}: open_clip's {', '.join(settings)} is not supported",
            hint="--model module:function exports any nn.Module, the visual tower of open_clip too",
        )


def _activation(
    foreign: Foreign,
    model: Mapping[str, object],
    vision: Mapping[str, object],
    assumed: dict[str, str | None],
) -> Activation:
    """The activation, which no tensor tells: of the configuration, the name, or as open_clip's default."""
    if model.get("quick_gelu", not model and "input_resolution" in foreign.state):
        return "quick_gelu"
    if not model and "quickgelu" in Path(foreign.source).name.casefold():
        assumed["activation"] = "the file does not tell the activation: its name says quick_gelu"
        return "quick_gelu"
    form = config_object(vision, "act_kwargs").get("approximate", "none")
    if form not in ("none", "tanh"):
        raise CheckpointError(
            f"open_clip_config.json: act_kwargs has the form {shown(form)} of GELU", hint=CORRECT
        )
    if not model:
        assumed["activation"] = (
            "the file does not tell the activation: gelu is taken; OpenAI's and quickgelu models need "
            "--activation quick_gelu"
        )
    return "gelu" if form == "none" else "gelu_tanh"


def _preprocess(
    config: Mapping[str, object] | None, model: ModelConfig, assumed: dict[str, str | None]
) -> Callable[[Size | None], Preprocess]:
    """What ``open_clip.image_transform`` does for evaluation; of OpenAI's models where nothing is stated."""
    stated, usual = config_object(config, "preprocess_cfg"), published("clip")
    if not stated:
        assumed["preprocess"] = "no preprocess_cfg of open_clip: preprocessing is that of OpenAI's CLIP"
    way = stated.get("resize_mode") or "shortest"
    if not isinstance(way, str) or way not in _CROPS:
        raise CheckpointError(
            f"open_clip_config.json: resize_mode {shown(way)} is none of {', '.join(_CROPS)}", hint=CORRECT
        )
    settings = {
        "crop_pct": 1.0,
        "crop_mode": _CROPS[way],
        # "random" means bicubic here.
        "interpolation": "bilinear" if stated.get("interpolation") == "bilinear" else "bicubic",
        "mean": stated.get("mean") or usual.mean,
        "std": stated.get("std") or usual.std,
    }
    fill = config_integer(stated, "fill_color", 0)

    def preprocess(size: Size | None) -> Preprocess:
        spec = from_timm({**settings, "input_size": (model.channels, *(size or model.image_size))})
        return replace(spec, pad=(fill, fill, fill)) if way == "longest" else spec

    return preprocess


TOWER = Family(
    "open_clip",
    _claims,
    _read,
    PositionRule(antialias=True, dtype=torch.float32, square_source=True, by_count=True),
)
TRUNK = Family("open_clip_timm", _claims_trunk, _read_trunk, timm.FAMILY.positions)
