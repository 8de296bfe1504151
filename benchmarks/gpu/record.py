"""The record of a run on a GPU: a line of JSON for each result, on the disk before the next one is measured.

What reads it at the end is one document (:func:`document`). A step that is killed loses the result it was at,
and none before.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "ON_GPU_STEP"
"""The environment variable that tells a script which step of the run it is."""


@dataclass(frozen=True)
class Recorder:
    """Appends results to a file of JSON lines.

    Attributes:
        path: of the file.
        stand_in: whether a rehearsal made the numbers up; it is said in every line.
    """

    path: Path
    stand_in: bool = False

    def add(self, kind: str, **facts: Any) -> None:
        """Append a result; it is on the disk afterwards."""
        line: dict[str, Any] = {"kind": kind, "step": os.environ.get(STEP)}
        if self.stand_in:
            line["stand_in"] = True
        append(self.path, {**line, **facts})


def append(path: Path, line: dict[str, Any]) -> None:
    """One write at the end of the file, so that lines of several processes do not mix."""
    text = json.dumps(line) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lines(path: Path) -> list[dict[str, Any]]:
    """The results so far; a last line that a killed process did not finish is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def last(path: Path, kind: str) -> dict[str, Any]:
    """The latest result of a kind.

    Raises:
        LookupError: there is none.
    """
    found = [line for line in lines(path) if line["kind"] == kind]
    if not found:
        raise LookupError(f"{path} has no line of the kind {kind!r}")
    return found[-1]


def document(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Results by kind, in the order in which they came."""
    found: dict[str, Any] = {"schema_version": 2}
    for line in results:
        facts = {name: value for name, value in line.items() if name not in ("kind", "stand_in")}
        found.setdefault(line["kind"], []).append(facts)
        if line.get("stand_in"):
            found["stand_in"] = True
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a document; a reader sees the file before or after, never in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def update(path: Path, **parts: Any) -> None:
    """Set parts of a document."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, {**before, **parts})


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every script of a run takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--record", type=Path, required=True, help="a line of JSON for each result goes there")
    made.add_argument("--seconds", type=float, default=60.0, help="nothing is begun after these")
    made.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU, in the interpreter")
    return made
