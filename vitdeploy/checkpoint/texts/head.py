"""A zero-shot head: the embeddings of labels, as the weights of a classifier on an image's embedding.

Logits are exp(logit_scale) * cosine + logit_bias: of CLIP, whose softmax they are for, there is no bias; of
SigLIP each has a sigmoid of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.manifest import FactSource
from vitdeploy.checkpoint.families.base import Foreign, shape_text
from vitdeploy.checkpoint.files import read_weights
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.checkpoint.texts import huggingface, open_clip
from vitdeploy.checkpoint.texts.prompts import ZeroShot, check_names
from vitdeploy.checkpoint.texts.tokenizer import INSTEAD, Tokenizer, read_tokenizer
from vitdeploy.checkpoint.texts.tower import TextNaming, logit_scale_and_bias, read_text_tower
from vitdeploy.config import ModelConfig, Scores, ViTConfig
from vitdeploy.errors import CheckpointError, UsageError
from vitdeploy.model.text import TextConfig, embed_texts

_NAMINGS: tuple[TextNaming, ...] = (huggingface.NAMING, open_clip.NAMING)
_VECTORS = "label -> vector, as safetensors.torch.save_file writes a dict of them"
_STATE_IT = 'save_file(vectors, FILE, metadata={"logit_scale": "4.6052"})'
"""Hints."""
_LARGEST_SCALE = math.log(1e6)
"""What is beyond it is no logarithm: CLIP's is at most that of 100."""
_UNIT = 1e-3
"""What the length of a normalised vector may be off by; fp16 is off by less."""


@dataclass(frozen=True)
class Head:
    """The head, and what becomes of its logits."""

    labels: tuple[str, ...]
    weight: Tensor
    """(labels, E) float64."""
    bias: Tensor
    """(labels,) float64."""
    scores: Scores
    scores_from: FactSource
    notes: tuple[str, ...]
    files: Mapping[str, str]
    """File names to sha256."""


@dataclass(frozen=True)
class _Texts:
    """What stands for the labels."""

    labels: tuple[str, ...]
    vectors: Tensor
    """(labels, E) float64, of length 1."""
    scale: float | None
    bias: float | None
    scale_from: FactSource
    notes: tuple[str, ...]
    files: Mapping[str, str]


def zero_shot_head(said: ZeroShot, config: ModelConfig, foreign: Foreign) -> Head:
    """The head for a model without one.

    Raises:
        UsageError: this model has no place for it, or what is said does not fit it.
        CheckpointError: the text tower, its tokenizer or the file with vectors is wrong.
        MissingDependency: labels in words need the library ``tokenizers``.
    """
    source = foreign.source
    if not isinstance(config, ViTConfig):
        raise UsageError(f"{source}: a model of the kind {config.kind!r} takes no zero-shot head")
    if config.classes:
        raise UsageError(
            f"{source} has a head of {config.classes} classes, and a zero-shot head takes the place of none",
            hint="leave out --zero-shot, or give the model before it was fine-tuned",
        )
    texts = _from_words(said, foreign) if said.vectors is None else _from_file(said.vectors, foreign)
    if texts.vectors.shape[1] != config.embedding:
        what = said.vectors or "the text tower"
        raise UsageError(
            f"{source} embeds images into {config.embedding} numbers, {what} texts into "
            f"{texts.vectors.shape[1]}",
            hint="both must be of one model",
        )
    if texts.scale is None:
        raise UsageError(
            f"neither {source} nor {said.vectors} states logit_scale, the logarithm of the logits' factor",
            hint=_STATE_IT,
        )
    if texts.scale > _LARGEST_SCALE:
        raise UsageError(
            f"logit_scale {texts.scale:g} is the logarithm of a factor, and exp({texts.scale:g}) is none",
            hint="4.6052 for a factor of 100",
        )
    alone = "zero-shot: the softmax of a single label is 1 for every image (--scores none gives its logit)"
    return Head(
        labels=texts.labels,
        weight=math.exp(texts.scale) * texts.vectors,
        bias=torch.full((len(texts.labels),), texts.bias or 0.0, dtype=torch.float64),
        scores="softmax" if texts.bias is None else "sigmoid",
        scores_from=texts.scale_from,
        notes=texts.notes if texts.bias is not None or len(texts.labels) > 1 else (*texts.notes, alone),
        files=texts.files,
    )


# --- labels in words --------------------------------------------------------------------------------------


def _from_words(said: ZeroShot, foreign: Foreign) -> _Texts:
    """The text tower's embeddings: of each template normalised, averaged, normalised again."""
    naming = next((naming for naming in _NAMINGS if naming.claims(foreign)), None)
    if naming is None or foreign.folder is None:
        raise UsageError(
            f"{foreign.source} has no text tower to embed labels with",
            hint=INSTEAD,
        )
    labels = said.labels()
    reading, tower = read_text_tower(naming, foreign)
    tokenizer = read_tokenizer(foreign.folder, foreign.source, reading.tokenizer, reading.clean)
    prompts = [prompt for label in labels for prompt in said.prompts(label)]
    tokens = [_tokens(prompt, tokenizer, tower.config, foreign.source) for prompt in prompts]
    each = _normalised(embed_texts(tower, tokens), prompts)  # (labels * templates, E)
    mean = each.unflatten(0, (len(labels), -1)).mean(dim=1)
    scale, bias = logit_scale_and_bias(foreign.state, foreign.source)
    file = {said.file.name: sha256(said.file)} if said.file is not None else {}
    return _Texts(
        labels,
        _normalised(mean, labels),
        scale,
        bias,
        "checkpoint",
        (_note(said),),
        {**tokenizer.files, **file},
    )


def _tokens(text: str, tokenizer: Tokenizer, config: TextConfig, source: str) -> list[int]:
    """The tokens of a text, as its tower reads them.

    Raises:
        UsageError: it is too long.
        CheckpointError: tower and tokenizer are not of one model.
    """
    tokens = tokenizer.padded(text, config.length) if config.reads == "last" else tokenizer(text)
    if len(tokens) > config.length:
        raise UsageError(
            f"{shown(text)} has {len(tokens)} tokens, the text tower reads {config.length} at most",
            hint="a shorter label or template",
        )
    if not tokens or max(tokens) >= config.vocabulary:
        what = f"token {max(tokens)}" if tokens else "no token"
        raise CheckpointError(
            f"{source}: the tokenizer makes {what} of {shown(text)}, the text tower has {config.vocabulary}",
            hint="the tokenizer must be the model's own",
        )
    if config.reads == "end" and config.end not in tokens:
        raise CheckpointError(
            f"{source}: the tokenizer gives {shown(text)} no token {config.end} (eos_token_id), at which the "
            "text tower is read",
            hint="the tokenizer must be the model's own",
        )
    return tokens


def _note(said: ZeroShot) -> str:
    if not said.templates:
        return 'zero-shot: labels are embedded as they stand (--template "a photo of a {}" embeds more)'
    listed = ", ".join(map(repr, said.templates[:3]))
    more = f", and {len(said.templates) - 3} more" if len(said.templates) > 3 else ""
    return f"zero-shot: labels are embedded as {listed}{more}{', averaged' if said.templates[1:] else ''}"


# --- ready-made vectors -----------------------------------------------------------------------------------


def _from_file(path: Path, foreign: Foreign) -> _Texts:
    """Vectors of a safetensors file; its metadata may state ``logit_scale`` and ``logit_bias``."""
    where = f"--zero-shot {path}"
    try:
        vectors = read_weights(path).state
    except CheckpointError as error:
        raise UsageError(f"--zero-shot: {error.message}", hint=_VECTORS) from error
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    labels = tuple(sorted(vectors))
    check_names(labels, where)
    shapes = {label: tuple(vectors[label].shape) for label in labels}
    width = shapes[labels[0]]
    for label, shape in shapes.items():
        if len(shape) != 1 or shape != width or not vectors[label].is_floating_point():
            is_now = f"{shape_text(shape)} of {str(vectors[label].dtype).removeprefix('torch.')}"
            raise UsageError(
                f"{where}: {shown(label)} is {is_now}, not a vector as long as the others",
                hint=_VECTORS,
            )
    rows = torch.stack([vectors[label].double() for label in labels])  # (labels, E)
    unit = _normalised(rows, labels)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    notes = [f"zero-shot: {len(labels)} vectors of {path.name}, in the alphabetic order of their labels"]
    if (lengths - 1).abs().max() > _UNIT:
        notes.append(
            f"zero-shot: vectors of lengths {lengths.min():.3g} to {lengths.max():.3g} are normalised"
        )
    scale, bias = logit_scale_and_bias(foreign.state, foreign.source)
    scale_from: FactSource = "checkpoint"
    stated = {name: _number(metadata, name, where) for name in ("logit_scale", "logit_bias")}
    if stated["logit_scale"] is not None:
        # Both are one model's: a bias of another does not go with this scale.
        scale, bias, scale_from = stated["logit_scale"], stated["logit_bias"], "user"
        notes.append(f"zero-shot: logit_scale is that of {path.name}")
    elif stated["logit_bias"] is not None:
        raise UsageError(f"{where}: its metadata has a logit_bias without a logit_scale", hint=_STATE_IT)
    return _Texts(labels, unit, scale, bias, scale_from, tuple(notes), {path.name: sha256(path)})


def _number(metadata: Mapping[str, str], name: str, where: str) -> float | None:
    text = metadata.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {name} in its metadata is {shown(text)}, no number", hint=_STATE_IT)
    return value


def _normalised(rows: Tensor, names: list[str] | tuple[str, ...]) -> Tensor:
    """Rows (N, E) at length 1.

    Raises:
        UsageError: a row has no direction.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for name, length in zip(names, lengths.flatten().tolist(), strict=True):
        if not (math.isfinite(length) and length > 0):
            what = "all zeros" if length == 0 else "not finite"
            raise UsageError(f"the vector of {shown(name)} is {what}", hint="every label needs a direction")
    unit: Tensor = rows / lengths
    return unit
