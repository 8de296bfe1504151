"""Whether a live server gives the classes the bundle's names, in the bundle's order.

Asked through the protocol's classification extension: the likeliest classes as text, "score:index:label".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitdeploy.bundle.folder import Bundle
from vitdeploy.verification.live.client import AnswerError, Array, Client
from vitdeploy.verification.live.signature import Signature
from vitdeploy.verification.live.target import Target


@dataclass(frozen=True)
class LabelCheck:
    """Class names held against the bundle's."""

    compared: int = 0
    failures: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_labels(
    client: Client, target: Target, signature: Signature, bundle: Bundle, inputs: Array
) -> LabelCheck:
    """Ask for every class of one batch of golden images (n, ...), and compare the names.

    Raises:
        ServerError: the server cannot be asked.
    """
    labels = bundle.manifest.labels
    if labels is None or bundle.manifest.output != "logits":
        return LabelCheck()
    if "classification" not in target.server.extensions:
        return LabelCheck(notes=("the server names no classes for tensors, so their order was not compared",))
    name, output = signature.input.name, signature.output.name
    try:
        answer = client.infer(target.name, target.asked, {name: inputs}, output, classes=len(labels))
        found = read_classes(answer.outputs.get(output))
    except AnswerError as error:
        return LabelCheck(notes=(f"the server names no classes for tensors: {error.message}",))
    if not found:
        note = "the server has no labels beside this model, so their order was not compared"
        return LabelCheck(notes=(note,))
    failures, causes = compare_labels(found, labels)
    return LabelCheck(len(found), failures, causes)


def read_classes(array: Array | None) -> dict[int, str]:
    """The names of classes by index, from texts of "score:index:label"; without labels, none.

    Raises:
        AnswerError: these are no such texts.
    """
    if array is None or array.dtype.kind != "O":
        raise AnswerError("the answer has numbers, not classes")
    found: dict[int, str] = {}
    for text in array.reshape(-1):
        parts = bytes(text).decode(errors="replace").split(":", 2)
        if len(parts) < 2 or not parts[1].isdecimal():
            raise AnswerError(f"{':'.join(parts)!r} is not of the form score:index:label")
        if len(parts) == 3:
            found[int(parts[1])] = parts[2]
    return found


def compare_labels(
    found: Mapping[int, str], labels: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Failures and their likely cause; both empty where every name found is the bundle's.

    Args:
        found: the server's names by index.
        labels: the bundle's.
    """
    labels = [_words(label) for label in labels]  # a file with a label per line has room for no more
    found = {index: _words(name) for index, name in sorted(found.items())}
    wrong = {i: name for i, name in found.items() if i >= len(labels) or labels[i] != name}
    if not wrong:
        return (), ()
    index = next(iter(wrong))
    own = repr(labels[index]) if index < len(labels) else "no such class"
    first = f"class {index} is called {wrong[index]!r}, in the bundle {own}"
    more = f" ({len(wrong)} of {len(found)} names differ)" if len(found) > 1 else ""
    return (f"labels: {first}{more}",), _causes(found, labels)


def _words(label: str) -> str:
    return " ".join(label.split())


def _causes(found: Mapping[int, str], labels: Sequence[str]) -> tuple[str, ...]:
    ordered = sorted(labels)
    if all(index < len(labels) and ordered[index] == name for index, name in found.items()):
        return ("the server's labels are sorted by name, the bundle's are in the model's order",)
    for step in (-1, 1):
        moved = {index: labels[index + step] for index in found if 0 <= index + step < len(labels)}
        if moved and all(found[index] == name for index, name in moved.items()):
            side = "one class too late" if step == -1 else "one class too early"
            return (f"the server's labels begin {side} (a background class?)",)
    if set(found.values()) <= set(labels):
        return ("the server's labels are in another order than the model's classes",)
    if not set(found.values()) & set(labels):
        return ("the server's labels are those of another model",)
    return ()
