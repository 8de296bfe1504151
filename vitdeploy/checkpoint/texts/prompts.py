"""What the user says of a zero-shot head: labels in words, or vectors. Needs no PyTorch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdeploy.checkpoint.stated import read_labels
from vitdeploy.errors import UsageError

SLOT = "{}"
"""Where a template has the label."""


@dataclass(frozen=True)
class ZeroShot:
    """The classes of a zero-shot head.

    Raises:
        UsageError: no label, one that stands twice, or a template without a place for it.
    """

    classes: Sequence[str] | str | os.PathLike[str]
    """Labels; or a file with them; or a ``.safetensors`` file, label to vector."""
    templates: tuple[str, ...] = ()
    """What is embedded for a label, ``"a photo of a {}"``; the label itself when empty."""

    def __post_init__(self) -> None:
        for template in self.templates:
            if SLOT not in template:
                raise UsageError(
                    f"--template {template!r} has no {SLOT}", hint=f"{SLOT} is where the label goes"
                )
        if self.templates and self.vectors is not None:
            raise UsageError("a template goes with labels, not with vectors", hint="leave out --template")
        if not isinstance(self.classes, (str, os.PathLike)):
            check_names(self.classes, "--zero-shot")

    @property
    def file(self) -> Path | None:
        """The user's file, where it is one."""
        return Path(self.classes) if isinstance(self.classes, (str, os.PathLike)) else None

    @property
    def vectors(self) -> Path | None:
        """The file with the vectors, where it is one."""
        return self.file if self.file is not None and self.file.suffix.lower() == ".safetensors" else None

    def labels(self) -> tuple[str, ...]:
        """The labels in words.

        Raises:
            UsageError: the file is not readable, has no label, or one of them twice.
        """
        if not isinstance(self.classes, (str, os.PathLike)):
            return tuple(self.classes)
        labels = read_labels(Path(self.classes), "--zero-shot")
        check_names(labels, f"--zero-shot {self.classes}")
        return labels

    def prompts(self, label: str) -> tuple[str, ...]:
        """The texts whose embeddings are averaged."""
        return tuple(template.replace(SLOT, label) for template in self.templates or (SLOT,))


def zero_shot_of(
    classes: Sequence[str] | str | os.PathLike[str] | None, templates: str | Sequence[str]
) -> ZeroShot | None:
    """What a caller says, if anything.

    Raises:
        UsageError: templates without labels, or what ``ZeroShot`` refuses.
    """
    several = (templates,) if isinstance(templates, str) else tuple(templates)
    if classes is None:
        if several:
            raise UsageError("a template goes with the labels of --zero-shot", hint="--zero-shot labels.txt")
        return None
    return ZeroShot(classes, several)


def check_names(labels: Sequence[str], where: str) -> None:
    """Raise a UsageError where there is no label, an empty one, or one that stands twice."""
    if not labels:
        raise UsageError(f"{where}: there is no label in it", hint="one label for each class")
    if not all(label.strip() for label in labels):
        raise UsageError(f"{where}: a label is empty", hint="one label for each class, none of them empty")
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise UsageError(
            f"{where}: the label {label!r} stands there {count} times", hint="leave the others out"
        )
