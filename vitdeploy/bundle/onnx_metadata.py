"""What an ONNX file says of itself in its ``metadata_props``: written for ours, read from anybody's.

Ours have ``vitdeploy.*`` keys, which docs/bundle.md lists. Two other tools' are understood: ultralytics',
whose values are in Python's notation (``names``, ``imgsz``, ``task``), and lightly-train's, in JSON
(``classes`` in the order of the head's rows, ``image_normalize``). Nothing that is read is trusted or run.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_args

from pydantic import TypeAdapter, ValidationError

from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.manifest import first_problem
from vitdeploy.config import OUTPUTS, InputKind, Output, Preprocess, Scores, is_output
from vitdeploy.errors import ConfigError

PREFIX = "vitdeploy."
_MAX_VALUE = 8 * 2**20
"""Characters of a value that are looked at; 21,841 labels of ImageNet-21k are half a million."""
_MAX_LABELS, _MAX_LABEL, _MAX_CHANNELS = 100_000, 2000, 1000
_WORDS: Mapping[str, tuple[str, ...]] = {
    "precision": get_args(ArtifactPrecision),
    "input": get_args(InputKind),
    "output": OUTPUTS,
    "scores": get_args(Scores),
}
_FIELDS = {field.name: field.default for field in dataclasses.fields(Preprocess)}
_NAME = re.compile(r"""\s*(?:(\d{1,7})\s*:\s*)?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?:,|\Z)""", re.DOTALL)
_NUMBERS = re.compile(r"\s*[\[(]?\s*(\d{1,6})\s*(?:,\s*(\d{1,6})\s*)?,?\s*[\])]?\s*")


@dataclass(frozen=True)
class SelfDescription:
    """What a file says of itself; None, and a field missing in ``preprocess``, is what it does not say."""

    source: str | None = None
    """Whose keys these are: ``vitdeploy``, ``ultralytics`` or ``lightly-train``."""
    precision: ArtifactPrecision | None = None
    input: InputKind | None = None
    output: Output | None = None
    labels: tuple[str, ...] | None = None
    scores: Scores | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``vitdeploy.config.Preprocess`` that the file states."""
    notes: tuple[str, ...] = ()
    """What is there and cannot be read."""
    keys: tuple[str, ...] = ()
    """That were looked at."""

    @property
    def whole_preprocess(self) -> Preprocess | None:
        """The preprocessing, where the file states all of it."""
        return Preprocess(**self.preprocess) if self.preprocess.keys() == _FIELDS.keys() else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys themselves stand beside it."""
        fields = dataclasses.asdict(self)
        del fields["keys"]
        return fields


def properties(
    *,
    precision: str,
    input: InputKind,
    outputs: Sequence[Output],
    scores: Scores | None,
    labels: Sequence[str] | None,
    preprocess: Preprocess | None,
) -> dict[str, str]:
    """The ``metadata_props`` of one of our files: words as they are, everything else as JSON."""
    said: dict[str, Any] = {"precision": precision, "input": input, "output": outputs[0]}
    if "logits" in outputs:
        said |= {"scores": scores, "labels": labels}
    if preprocess is not None:
        said |= dataclasses.asdict(preprocess)
    return {
        f"{PREFIX}{key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in said.items()
        if value is not None
    }


def read_properties(entries: Mapping[str, str]) -> SelfDescription:
    """Read the ``metadata_props`` of any ONNX file; what is malformed becomes a note."""
    if any(key.startswith(PREFIX) for key in entries):
        return _ours(entries)
    if "lightly_train_version" in entries or "image_normalize" in entries:
        return _lightly(entries)
    if "names" in entries and not entries.keys().isdisjoint(("task", "stride", "imgsz")):
        return _ultralytics(entries)
    return SelfDescription()


def _ours(entries: Mapping[str, str]) -> SelfDescription:
    found: dict[str, Any] = {}
    notes = []
    for key, words in _WORDS.items():
        value = entries.get(PREFIX + key)
        if value in words or (key == "output" and value is not None and is_output(value)):
            found[key] = value
        elif value is not None:
            notes.append(_unreadable(PREFIX + key, f"is none of {', '.join(words)}"))
    key = f"{PREFIX}labels"
    if key in entries:
        labels = _labels(_json(entries[key]))
        if labels is None:
            notes.append(_unreadable(key, "is no JSON list of labels"))
        found["labels"] = labels
    stated = {
        name: value if isinstance(default, str) else _json(value)
        for name, default in _FIELDS.items()
        if (value := entries.get(PREFIX + name)) is not None
    }
    if stated:
        try:
            read = dataclasses.asdict(TypeAdapter(Preprocess).validate_python(stated))
            # What is None where it is not needed is left out of the file.
            whole = all(name in stated for name, default in _FIELDS.items() if default is not None)
            found["preprocess"] = {name: value for name, value in read.items() if whole or name in stated}
        except ValidationError as error:
            notes.append(f"the preprocessing in its metadata cannot be read: {first_problem(error)}")
        except ConfigError as error:
            notes.append(f"the preprocessing in its metadata is wrong: {error.message}")
    known = tuple(key for key in entries if key.removeprefix(PREFIX) in (*_WORDS, "labels", *_FIELDS))
    return SelfDescription(source="vitdeploy", **found, notes=tuple(notes), keys=known)


def _lightly(entries: Mapping[str, str]) -> SelfDescription:
    notes, labels, preprocess = [], None, {}
    if "classes" in entries:
        classes = _json(entries["classes"])
        # Rows of the head are in the order of the object, whatever the numbers of the classes.
        labels = _labels(list(classes.values()) if isinstance(classes, dict) else classes)
        if labels is None:
            notes.append(_unreadable("classes", "does not name classes in JSON"))
    if "image_normalize" in entries:
        normalize = _json(entries["image_normalize"])
        for key in ("mean", "std"):
            values = _numbers(normalize.get(key)) if isinstance(normalize, dict) else None
            if values is None or (key == "std" and min(values) <= 0):
                notes.append(_unreadable("image_normalize", f"has no {key} with a number for each channel"))
            else:
                preprocess[key] = values
    return SelfDescription(
        "lightly-train",
        labels=labels,
        preprocess=preprocess,
        notes=tuple(notes),
        keys=("classes", "image_normalize"),
    )


def _ultralytics(entries: Mapping[str, str]) -> SelfDescription:
    notes, preprocess = [], {}
    labels = _python_names(entries["names"])
    if labels is None:
        notes.append(_unreadable("names", "does not name classes from 0"))
    if "imgsz" in entries:
        match = _NUMBERS.fullmatch(entries["imgsz"][:64])
        if match and int(match[1]) and int(match[2] or 1):
            preprocess["size"] = (int(match[1]), int(match[2] or match[1]))
        else:
            notes.append(_unreadable("imgsz", "is no height and width"))
    return SelfDescription(
        "ultralytics", labels=labels, preprocess=preprocess, notes=tuple(notes), keys=("names", "imgsz")
    )


def _unreadable(key: str, problem: str) -> str:
    return f"{key} in its metadata {problem}"


def _json(text: str) -> Any:
    """The value; None where it is none, or too long."""
    try:
        return json.loads(text, parse_constant=_no_constant) if len(text) <= _MAX_VALUE else None
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _labels(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_LABELS:
        return None
    fits = all(isinstance(label, str) and len(label) <= _MAX_LABEL for label in value)
    return tuple(value) if fits else None


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Finite numbers, one for each channel."""
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_CHANNELS:
        return None
    fits = all(
        isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) for item in value
    )
    return tuple(map(float, value)) if fits else None


def _python_names(text: str) -> tuple[str, ...] | None:
    """``{0: 'cat', 1: 'dog'}`` or ``['cat', 'dog']``; each name alone is read as Python reads a string."""
    text = text.strip()
    if len(text) > _MAX_VALUE or text[:1] + text[-1:] not in ("{}", "[]"):
        return None
    inner, end = text[1:-1].rstrip(), 0
    names: list[str] = []
    while end < len(inner):
        match = _NAME.match(inner, end)
        if match is None or (text[0] == "{") != (match[1] is not None):
            return None
        if match[1] is not None and int(match[1]) != len(names):
            return None
        try:
            names.append(ast.literal_eval(match[2]))
        except (ValueError, SyntaxError):
            return None
        end = match.end()
    return _labels(names)
