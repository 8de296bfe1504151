"""Whether a live model takes and gives what the bundle's does: names, dtypes, shapes, class names.

Class names are asked for through the protocol's classification extension: the likeliest classes as text,
"score:index:label".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitdeploy.backends.base import Array
from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import TensorSpec, input_spec, output_specs
from vitdeploy.errors import UsageError
from vitdeploy.verification.live.client import AnswerError, Client, LiveTensor, ModelFacts
from vitdeploy.verification.live.discovery import LiveModel


@dataclass(frozen=True)
class ModelSignature:
    """The input and the outputs of a bundle's model; a first dimension that varies is ``"N"``."""

    input: TensorSpec
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class SignatureCheck:
    """How a live model's tensors compare with the bundle's."""

    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images: bool = False
    """It takes image files instead of tensors."""
    batch: int | None = None
    """The one batch size it takes; None where that varies."""


def model_signature(bundle: Bundle) -> ModelSignature:
    """What the bundle's model takes and gives, whatever the batch size.

    Raises:
        UsageError: it has no artifact, and its model is none of ours.
    """
    manifest = bundle.manifest
    if manifest.artifacts:
        first = manifest.artifacts[0]
        given, made = first.inputs[0], first.outputs
    elif manifest.model is not None:
        given = input_spec(manifest.model, manifest.input)
        made = output_specs(manifest.model, manifest.outputs)
    else:
        raise UsageError(f"{bundle.root}: has neither an artifact nor a model, so nothing can serve it")
    return ModelSignature(_varying(given), tuple(map(_varying, made)))


def compare_signature(model: ModelFacts, signature: ModelSignature) -> SignatureCheck:
    """Compare what the server says with what the bundle's model is."""
    if model.takes_image_files:
        return SignatureCheck(images=True)
    if not model.inputs or not model.outputs:
        what = "inputs" if not model.inputs else "outputs"
        return SignatureCheck(notes=(f"the server does not describe its {what}, so they were not compared",))
    failures, batch = [], None
    for kind, spec, tensors in (
        ("input", signature.input, model.inputs),
        *(("output", spec, model.outputs) for spec in signature.outputs),
    ):
        tensor = next((tensor for tensor in tensors if tensor.name == spec.name), None)
        if tensor is None:
            names = ", ".join(tensor.name for tensor in tensors)
            one = kind == "input" or len(signature.outputs) == 1
            failures.append(
                f"the {kind} is named {names}, the bundle's {spec.name}"
                if one
                else f"it has no {kind} {spec.name}, which the bundle has; it has {names}"
            )
            continue
        failures += _differences(kind, spec, tensor)
        if kind == "input" and tensor.shape and tensor.shape[0] > 0:
            batch = tensor.shape[0]
    if len(model.inputs) > 1:
        names = ", ".join(tensor.name for tensor in model.inputs)
        failures.append(f"it takes {len(model.inputs)} inputs ({names}), the bundle's model one")
    return SignatureCheck(tuple(failures), batch=batch)


def _varying(spec: TensorSpec) -> TensorSpec:
    return spec.model_copy(update={"shape": ("N", *spec.shape[1:])})


def _differences(kind: str, spec: TensorSpec, tensor: LiveTensor) -> list[str]:
    differences = []
    if tensor.datatype != DATATYPES[spec.dtype]:
        differences.append(
            f"the {kind} {spec.name} is {tensor.datatype}, the bundle's {DATATYPES[spec.dtype]}"
        )
    want = [size if isinstance(size, int) else -1 for size in spec.shape]
    have = list(tensor.shape)
    same = len(have) == len(want) and all(
        mine in (theirs, -1) or theirs == -1 for mine, theirs in zip(want[1:], have[1:], strict=True)
    )
    if not same:
        why = _why(kind, want[1:], have[1:])
        differences.append(f"the {kind} {spec.name} has the shape {have}, the bundle's {want}{why}")
    return differences


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


@dataclass(frozen=True)
class LabelCheck:
    """Class names held against the bundle's."""

    compared: int = 0
    failures: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_labels(
    client: Client, model: LiveModel, signature: ModelSignature, bundle: Bundle, inputs: Array
) -> LabelCheck:
    """Ask for every class of one batch of golden images (n, ...), and compare the names.

    Raises:
        ServerError: the server cannot be asked.
    """
    labels = bundle.manifest.labels
    if labels is None or not bundle.manifest.classifies:
        return LabelCheck()
    if "classification" not in model.server.extensions:
        return LabelCheck(notes=("the server names no classes for tensors, so their order was not compared",))
    given = {signature.input.name: inputs}
    try:
        answer = client.infer(model.name, model.asked, given, ["logits"], classes=len(labels))
        names = read_classes(answer.outputs.get("logits"))
    except AnswerError as error:
        return LabelCheck(notes=(f"the server names no classes for tensors: {error.message}",))
    if not names:
        note = "the server has no labels beside this model, so their order was not compared"
        return LabelCheck(notes=(note,))
    failures, causes = compare_labels(names, labels)
    return LabelCheck(len(names), failures, causes)


def read_classes(array: Array | None) -> dict[int, str]:
    """The names of classes by index, from texts of "score:index:label"; without labels, none.

    Raises:
        AnswerError: these are no such texts.
    """
    if array is None or array.dtype.kind != "O":
        raise AnswerError("the answer has numbers, not classes")
    names: dict[int, str] = {}
    for text in array.reshape(-1):
        parts = bytes(text).decode(errors="replace").split(":", 2)
        if len(parts) < 2 or not parts[1].isdecimal():
            raise AnswerError(f"{':'.join(parts)!r} is not of the form score:index:label")
        if len(parts) == 3:
            names[int(parts[1])] = parts[2]
    return names


def compare_labels(
    names: Mapping[int, str], labels: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Failures and their likely cause; both empty where every name is the bundle's.

    Args:
        names: the server's, by index.
        labels: the bundle's.
    """
    labels = [_words(label) for label in labels]  # a file with a label per line has room for no more
    names = {index: _words(name) for index, name in sorted(names.items())}
    wrong = {i: name for i, name in names.items() if i >= len(labels) or labels[i] != name}
    if not wrong:
        return (), ()
    index = next(iter(wrong))
    right = repr(labels[index]) if index < len(labels) else "no such class"
    first = f"class {index} is called {wrong[index]!r}, in the bundle {right}"
    more = f" ({len(wrong)} of {len(names)} names differ)" if len(names) > 1 else ""
    return (f"labels: {first}{more}",), _causes(names, labels)


def _words(label: str) -> str:
    return " ".join(label.split())


def _causes(names: Mapping[int, str], labels: Sequence[str]) -> tuple[str, ...]:
    ordered = sorted(labels)
    if all(index < len(labels) and ordered[index] == name for index, name in names.items()):
        return ("the server's labels are sorted by name, the bundle's are in the model's order",)
    for step in (-1, 1):
        moved = {index: labels[index + step] for index in names if 0 <= index + step < len(labels)}
        if moved and all(names[index] == name for index, name in moved.items()):
            side = "one class too late" if step == -1 else "one class too early"
            return (f"the server's labels begin {side} (a background class?)",)
    if set(names.values()) <= set(labels):
        return ("the server's labels are in another order than the model's classes",)
    if not set(names.values()) & set(labels):
        return ("the server's labels are those of another model",)
    return ()
