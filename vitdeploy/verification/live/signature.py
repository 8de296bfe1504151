"""Whether a live model takes and gives the tensors that the bundle's does: names, dtypes, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import TensorSpec, input_spec, output_spec
from vitdeploy.errors import UsageError
from vitdeploy.verification.live.client import LiveTensor, ModelFacts


@dataclass(frozen=True)
class Signature:
    """One input and one output of a bundle's model; a first dimension that varies is ``"N"``."""

    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class SignatureCheck:
    """How a live model's tensors compare with the bundle's."""

    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images: bool = False
    """It takes image files instead of tensors."""
    batch: int | None = None
    """The one batch size it takes; None where that varies."""


def signature_of(bundle: Bundle) -> Signature:
    """What the bundle's model takes and gives, whatever the batch size.

    Raises:
        UsageError: it has no artifact, and its model is none of ours.
    """
    manifest = bundle.manifest
    if manifest.artifacts:
        first = manifest.artifacts[0]
        given, made = first.inputs[0], first.outputs[0]
    elif manifest.model is not None:
        given, made = input_spec(manifest.model, manifest.input), output_spec(manifest.model, manifest.output)
    else:
        raise UsageError(f"{bundle.root}: has neither an artifact nor a model, so nothing can serve it")
    return Signature(_varying(given), _varying(made))


def check_signature(model: ModelFacts, signature: Signature) -> SignatureCheck:
    """Compare what the server says with what the bundle's model is."""
    if len(model.inputs) == 1 and model.inputs[0].datatype == "BYTES":
        return SignatureCheck(images=True)
    if not model.inputs or not model.outputs:
        what = "inputs" if not model.inputs else "outputs"
        return SignatureCheck(notes=(f"the server does not describe its {what}, so they were not compared",))
    failures, batch = [], None
    for kind, spec, tensors in (
        ("input", signature.input, model.inputs),
        ("output", signature.output, model.outputs),
    ):
        tensor = next((tensor for tensor in tensors if tensor.name == spec.name), None)
        if tensor is None:
            there = ", ".join(tensor.name for tensor in tensors)
            failures.append(f"the {kind} is named {there}, the bundle's {spec.name}")
            continue
        failures += _differences(kind, spec, tensor)
        if kind == "input" and tensor.shape and tensor.shape[0] > 0:
            batch = tensor.shape[0]
    if len(model.inputs) > 1:
        there = ", ".join(tensor.name for tensor in model.inputs)
        failures.append(f"it takes {len(model.inputs)} inputs ({there}), the bundle's model one")
    return SignatureCheck(tuple(failures), batch=batch)


def _varying(spec: TensorSpec) -> TensorSpec:
    return spec.model_copy(update={"shape": ("N", *spec.shape[1:])})


def _differences(kind: str, spec: TensorSpec, tensor: LiveTensor) -> list[str]:
    found = []
    if tensor.datatype != DATATYPES[spec.dtype]:
        found.append(f"the {kind} {spec.name} is {tensor.datatype}, the bundle's {DATATYPES[spec.dtype]}")
    want = [size if isinstance(size, int) else -1 for size in spec.shape]
    have = list(tensor.shape)
    same = len(have) == len(want) and all(
        mine in (theirs, -1) or theirs == -1 for mine, theirs in zip(want[1:], have[1:], strict=True)
    )
    if not same:
        why = _why(kind, want[1:], have[1:])
        found.append(f"the {kind} {spec.name} has the shape {have}, the bundle's {want}{why}")
    return found


def _why(kind: str, want: Sequence[int], have: Sequence[int]) -> str:
    """What two shapes without the batch tell of how a model came to differ."""
    if kind == "output" and len(want) == len(have) == 1:
        return ": a model with other classes"
    if kind == "input" and len(want) == len(have) == 3:
        if have in ([*want[1:], want[0]], [want[2], *want[:2]]):
            return ": channels are last in one and first in the other"
        if sorted(have) != sorted(want):
            return ": a model for other images"
    return ""
