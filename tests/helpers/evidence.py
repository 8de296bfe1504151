"""Checks of minutes whose outcome is decided by files: run when these change, and recorded when they pass.

A record is a file in ``tests/kernels/evidence/`` that holds the digest of everything its check depends on.
While the digest is today's, the check is skipped by name; ``pytest --evidence run`` runs it all the same, and
``--evidence record`` writes down that it has passed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT, TESTS

FOLDER = TESTS / "kernels" / "evidence"
KERNELS = ROOT / "kernels" / "vitdeploy_kernels"
TOOLS = ROOT / "kernels" / "kernel_tools"


def digest(files: Iterable[Path], root: Path = ROOT) -> str:
    """Of the names and contents of files, and of the compiler's version."""
    sum_ = hashlib.sha256(version("triton").encode())
    for file in sorted(files):
        content = file.read_bytes()
        sum_.update(f"\n{file.relative_to(root)} {len(content)}\n".encode() + content)
    return sum_.hexdigest()


def kernel_sources() -> list[Path]:
    return [file for file in KERNELS.rglob("*") if file.is_file() and file.suffix in (".py", ".json")]


def table_sources() -> list[Path]:
    """What makes the tables of resources, and the kernels."""
    return [*kernel_sources(), TOOLS / "resources.py", TOOLS / "sass.py"]


@dataclass(frozen=True)
class Evidence:
    """The record of one check."""

    name: str
    mode: str
    folder: Path = FOLDER

    def skip_if_recorded(self, digest: str) -> None:
        record = self.folder / self.name
        if self.mode == "recorded" and record.is_file() and record.read_text().strip() == digest:
            pytest.skip(f"passed with these very files ({record.name}); --evidence run runs it again")

    def passed(self, digest: str) -> None:
        """Write it down where that is asked for."""
        if self.mode == "record":
            self.folder.mkdir(exist_ok=True)
            (self.folder / self.name).write_text(digest + "\n")
