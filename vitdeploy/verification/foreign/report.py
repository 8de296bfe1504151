"""What was held against what, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.errors import ParityError
from vitdeploy.verification.accuracy import AccuracyRecord

State = Literal["held", "failed", "not checked"]
_LONGEST = 340
"""Characters of the error that names what failed."""


@dataclass(frozen=True)
class Finding:
    """One thing about one file, held against the checkpoint; or why it was not."""

    file: str
    check: str
    """``parity``, ``batch invariance``, ``precision``, ``weights``, ``labels``, ``preprocessing``, ..."""
    state: State
    detail: str


@dataclass(frozen=True)
class ForeignReport:
    """What a stranger's artifact was found to be."""

    path: Path
    checkpoint: str
    files: tuple[str, ...]
    parity: tuple[ParityRecord, ...]
    findings: tuple[Finding, ...]
    accuracy: tuple[AccuracyRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """What did not hold, once for all files that have it; nothing compared is a failure, too."""
        files: dict[tuple[str, str], list[str]] = {}
        for finding in self.findings:
            if finding.state == "failed":
                files.setdefault((finding.check, finding.detail), []).append(finding.file)
        failed = tuple(f"{_first(names)}: {check}: {detail}" for (check, detail), names in files.items())
        return failed if failed or self.parity else ("nothing was compared",)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def unproven(self) -> tuple[str, ...]:
        """Files that no table of tolerances judges."""
        return tuple(f.file for f in self.findings if (f.check, f.state) == ("tolerance", "not checked"))

    @property
    def unchecked(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == "not checked")

    def check(self) -> None:
        """Raise what did not hold.

        Raises:
            ParityError: names the first failures.
        """
        if self.failures:
            raise ParityError(f"{self.path} is not {self.checkpoint}: {shortened(self.failures)}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.passed,
            "path": str(self.path),
            "checkpoint": self.checkpoint,
            "files": list(self.files),
            "parity": [record.model_dump(mode="json") for record in self.parity],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "accuracy": [dataclasses.asdict(accuracy) for accuracy in self.accuracy],
            "unproven": list(self.unproven),
            "failures": list(self.failures),
            "notes": list(self.notes),
        }


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shortened(failures: Iterable[str]) -> str:
    """As many as an error line holds."""
    first, *others = failures
    text, left = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}...", 0
    for failure in others:
        if left or len(text) + len(failure) + 2 > _LONGEST:
            left += 1
        else:
            text += f"; {failure}"
    return f"{text} (and {left} more)" if left else text
