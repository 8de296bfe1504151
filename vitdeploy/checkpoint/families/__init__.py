"""Foreign families of ViT checkpoints, one file each, and the registry that finds the right one.

To add a family: write its file with a ``Family``, add it to ``FAMILIES``, test it against its own code.
"""

from __future__ import annotations

from vitdeploy.checkpoint.families import deit, dinov2, google, reference, timm, torchvision, vit
from vitdeploy.checkpoint.families.base import Family, Foreign
from vitdeploy.errors import CheckpointError, did_you_mean

FAMILIES: tuple[Family, ...] = (
    reference.FAMILY,
    dinov2.WITH_REGISTERS,
    dinov2.PLAIN,
    deit.FAMILY,
    vit.FAMILY,
    timm.FAMILY,
    torchvision.FAMILY,
    google.FAMILY,
)
"""In the order they are asked; the first that claims a checkpoint reads it."""

_HINT = "any nn.Module can be exported as it is: --model module:function"


def recognise(foreign: Foreign) -> Family:
    """Return the family a checkpoint belongs to.

    Raises:
        CheckpointError: none claims it.
    """
    for family in FAMILIES:
        if family.claims(foreign):
            return family
    model_type = (foreign.config or {}).get("model_type")
    if model_type is not None:
        supported = [reference.MODEL_TYPE, "dinov2_with_registers", "dinov2", "deit", "vit"]
        raise CheckpointError(
            f"{foreign.source}: model_type {model_type!r} in config.json is not supported"
            f"{did_you_mean(str(model_type), supported)}",
            hint=f"supported: {', '.join(sorted(supported))}; {_HINT}",
        )
    first = ", ".join(sorted(foreign.state)[:3]) or "none"
    raise CheckpointError(
        f"{foreign.source}: no known family names its tensors like this: {first}, ...",
        hint=f"known: {', '.join(family.name for family in FAMILIES)}; {_HINT}",
    )
