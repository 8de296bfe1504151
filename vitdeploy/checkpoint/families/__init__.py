"""Foreign families of ViT checkpoints, one file each, and the registry that finds the right one.

To add a family: write its file with a ``Family``, add it to ``FAMILIES``, test it against its own code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from vitdeploy.checkpoint.families import (
    beit,
    blip,
    clip,
    deit,
    dinov2,
    dinov3,
    google,
    image_text,
    open_clip,
    qwen,
    reference,
    siglip,
    swin,
    timm,
    timm_beit,
    timm_eva,
    timm_hybrid,
    timm_swin,
    torchvision,
    vit,
)
from vitdeploy.checkpoint.families.base import Family, Foreign
from vitdeploy.checkpoint.families.timm_names import kind_of
from vitdeploy.checkpoint.files import is_average
from vitdeploy.checkpoint.refusals import cut, looks_like, shown, some
from vitdeploy.errors import CheckpointError, did_you_mean

FAMILIES: tuple[Family, ...] = (
    reference.FAMILY,
    dinov3.FAMILY,
    dinov2.WITH_REGISTERS,
    dinov2.PLAIN,
    deit.FAMILY,
    beit.FAMILY,
    vit.FAMILY,
    vit.MSN,
    vit.MAE,
    blip.FAMILY,
    clip.FAMILY,
    siglip.FAMILY,
    qwen.FAMILY,
    swin.FAMILY,
    swin.FAMILY_V2,
    open_clip.TOWER,
    open_clip.TRUNK,
    timm_beit.FAMILY,
    timm_eva.FAMILY,
    timm_hybrid.FAMILY,
    timm_swin.FAMILY,
    timm.FAMILY,
    torchvision.FAMILY,
    google.FAMILY,
)
"""In the order they are asked; the first that claims a checkpoint reads it."""

_HINT = "any nn.Module can be exported as it is: --model module:function"


_OWN = tuple(
    f.name
    for f in (
        *(vit.FAMILY, vit.MSN, vit.MAE, deit.FAMILY, dinov2.PLAIN, dinov2.WITH_REGISTERS, beit.FAMILY),
        *(swin.FAMILY, swin.FAMILY_V2),
    )
)
"""Families of transformers, whose names begin so where a base model is below a head."""
_PREFIXES = (*_OWN, image_text.PREFIX, open_clip.PREFIX)
"""What belongs to a family's names, even where all of them begin so."""
_TYPES = (*_OWN, *blip.MODEL_TYPES, *clip.MODEL_TYPES, *siglip.MODEL_TYPES, *qwen.MODEL_TYPES)
"""Model types of transformers that are read."""
_OTHERS = frozenset(
    (
        *("convnext", "cvt", "data2vec-vision", "hiera", "ijepa", "levit", "mobilevit", "pvt"),
        *("vit_hybrid", "yolos"),
    )
)
"""Model types of transformers that are others, not supported ones with a wrong letter."""


def recognise(foreign: Foreign) -> tuple[Family, Foreign, tuple[str, ...]]:
    """Return the family a checkpoint belongs to, its tensors as that family names them, and notes.

    Training frameworks put names of their own before a model's: ``module.``, ``_orig_mod.``, ``model.``,
    ``teacher.backbone.``. What is before every name is dropped; where other tensors lie beside the model, its
    prefix is searched.

    Raises:
        CheckpointError: none claims it.
    """
    prefix, inside = _below(foreign)
    if family := _claimant(inside):
        notes = (f"the prefix {prefix!r} of every name was dropped",) if prefix else ()
        return family, inside, notes
    counts = Counter(name.partition(".")[0] for name in inside.state if "." in name)
    for first in sorted(counts, key=lambda first: (not _is_deployed(first), -counts[first])):
        deeper, part = _below(_under(inside, f"{first}."))
        if family := _claimant(part):
            left = len(foreign.state) - len(part.state)
            where = f"{prefix}{first}.{deeper}"
            return (
                family,
                part,
                (f"weights taken from names that begin with {where!r}; {left} others left out",),
            )
    model_type = (foreign.config or {}).get("model_type")
    if model_type == "timm_wrapper":
        architecture = str((foreign.config or {}).get("architecture"))
        kind = kind_of(architecture)
        what = f" ({kind})" if kind else ""
        raise CheckpointError(
            f"{foreign.source}: timm's architecture {cut(architecture)}{what} is not supported", hint=_HINT
        )
    if model_type is not None:
        supported = [reference.MODEL_TYPE, *_TYPES, dinov3.MODEL_TYPE, "timm_wrapper"]
        other = str(model_type).casefold() in _OTHERS
        guess = "" if other else did_you_mean(str(model_type), supported)
        raise CheckpointError(
            f"{foreign.source}: model_type {shown(model_type)} in config.json is not supported{guess}",
            hint=f"vitdeploy list shows what is read; {_HINT}",
        )
    first = some([cut(name, 40) for name in sorted(foreign.state)], 3)
    raise CheckpointError(
        f"{foreign.source}: no known family names its tensors like this: {first}{looks_like(foreign.state)}",
        hint=f"vitdeploy list shows what is read; {_HINT}",
    )


def _is_deployed(first: str) -> bool:
    """Whether names that begin so are of the model that is deployed, where there are several."""
    return first == "teacher" or is_average(first)


def _claimant(foreign: Foreign) -> Family | None:
    return next((family for family in FAMILIES if family.claims(foreign)), None)


def _below(foreign: Foreign) -> tuple[str, Foreign]:
    """What every name begins with, but for a family's own prefix, and the checkpoint without it."""
    prefix = ""
    while foreign.state:
        first = next(iter(foreign.state)).partition(".")[0] + "."
        below = all(name.startswith(first) and name != first for name in foreign.state)
        if first[:-1] in _PREFIXES or not below:
            break
        prefix, foreign = prefix + first, _under(foreign, first)
    return prefix, foreign


def _under(foreign: Foreign, prefix: str) -> Foreign:
    """The tensors whose names begin so, without it."""
    state = {n.removeprefix(prefix): tensor for n, tensor in foreign.state.items() if n.startswith(prefix)}
    return replace(foreign, state=state)
