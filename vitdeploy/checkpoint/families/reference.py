"""The reference models' names: ``weights.safetensors`` of bundles, folders of ``config.json`` and weights.

``config.json`` is ``{"model_type": "vitdeploy", "model": {...}, "preprocess": {...}, "labels": [...],
"scores": "softmax"}``: the fields of a ``ModelConfig`` (of ``ViTConfig`` where no ``kind`` stands among them)
and of ``Preprocess``, one label for each class or null, and what becomes of logits (softmax, sigmoid, none).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from vitdeploy.bundle.manifest import first_problem
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_object,
    expected_of,
    linear,
    template_of,
)
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import CORRECT
from vitdeploy.checkpoint.stated import parsed_fields
from vitdeploy.config import ModelConfig, Preprocess, Scores, Size, ViTConfig, model_type
from vitdeploy.errors import CheckpointError, ConfigError
from vitdeploy.images.preprocess import at_size

MODEL_TYPE = "vitdeploy"

_TOKENS = (
    *("cls_token", "dist_token", "registers", "pos_embed", "blocks.{i}.scale1", "blocks.{i}.scale2"),
    *("blocks.{i}.attn.score_bias", "probe_pool.probe", "projection.weight"),
)
_LAYERS = (
    "patch_embed",
    *(f"blocks.{{i}}.{layer}" for layer in ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj")),
    *(f"blocks.{{i}}.{layer}" for layer in ("norm2", "mlp.fc1", "mlp.fc2")),
    *("pre_norm", "blocks.{i}.mlp.norm"),
    *(f"probe_pool.{layer}" for layer in ("q", "k", "v", "proj", "norm", "mlp.fc1", "mlp.fc2")),
    *("norm", "representation", "head", "head_dist", "code_head"),
)
_LAYOUT: Layout = {name: Source(name) for name in _TOKENS} | {
    name: source for layer in _LAYERS for name, source in linear(layer, layer).items()
}


def _claims(foreign: Foreign) -> bool:
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] == MODEL_TYPE
    return {"patch_embed.weight", "blocks.0.attn.q.weight"} <= foreign.state.keys()


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    stated = foreign.config or {}
    assumed: dict[str, str | None] = {}
    notes: tuple[str, ...] = ()
    layout = _LAYOUT
    config: ModelConfig
    if stated.get("model") is not None:
        config = _model(config_object(stated, "model"))
        names = expected_of(config, len(foreign.state), foreign.source)
        layout = {template: Source(template) for template, _ in map(template_of, names)}
    else:
        heads, sizes = what_is_open(template, foreign.wanted)
        inferred = infer_config(_LAYOUT, foreign.state, foreign.source, heads=heads, sizes=sizes)
        assumed |= {"heads": None if template else heads_note(inferred), "activation": None}
        notes = shape_note(inferred, template, foreign.wanted)
        config = inferred
    base = Preprocess(size=config.image_size)
    if not stated.get("preprocess"):
        assumed["preprocess"] = None
    else:
        base = parsed_fields(Preprocess, config_object(stated, "preprocess"), "config.json", "preprocess")
        if base.channels != config.channels:
            raise CheckpointError(
                f"config.json: preprocess.mean has {base.channels} numbers, but model.channels is "
                f"{config.channels}",
                hint="state one number for each channel in mean and std",
            )

    def preprocess(size: Size | None) -> Preprocess:
        return base if size in (None, base.size) else at_size(base, size)

    labels = _labels(stated.get("labels"), config.classes)
    return Reading(
        config,
        layout,
        foreign.state,
        preprocess,
        labels=labels,
        scores=_scores(stated.get("scores")),
        notes=notes,
        assumed=assumed,
    )


def _model(values: Mapping[str, object]) -> ModelConfig:
    try:
        kind, fields = model_type(values)
    except ConfigError as error:
        raise CheckpointError(f"config.json: model: {error.message}", hint=CORRECT) from error
    model: ModelConfig = parsed_fields(kind, fields, "config.json", "model")
    return model


def _labels(labels: object, classes: int) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError("config.json: labels must be a list of strings", hint=CORRECT)
    if len(labels) != classes:
        raise CheckpointError(
            f"config.json: {len(labels)} labels, but the head has {classes} classes", hint=CORRECT
        )
    return tuple(labels)


def _scores(scores: object) -> Scores | None:
    if scores is None:
        return None
    try:
        return TypeAdapter[Scores](Scores).validate_python(scores)
    except ValidationError as error:
        raise CheckpointError(f"config.json: {first_problem(error, 'scores')}", hint=CORRECT) from error


FAMILY = Family(MODEL_TYPE, _claims, _read, PositionRule(antialias=True))
