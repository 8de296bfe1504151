"""What is recorded of long checks holds for the very files that they were run on, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.evidence import FOLDER, Evidence, digest, kernel_sources, table_sources


def test_any_change_of_a_file_is_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text("a = 1\n")
    before = digest([file], tmp_path)
    assert digest([file], tmp_path) == before
    file.write_text("a = 2\n")
    assert digest([file], tmp_path) != before
    file.write_text("a = 1\n")
    renamed = file.rename(tmp_path / "other.py")
    assert digest([renamed], tmp_path) != before


@pytest.mark.parametrize("mode, recorded, skips", [
    ("recorded", "1", True), ("recorded", "2", False), ("run", "1", False), ("record", "1", False),
])  # fmt: skip
def test_only_what_passed_with_these_files_is_skipped(
    tmp_path: Path, mode: str, recorded: str, skips: bool
) -> None:
    Evidence("check", "record", tmp_path).passed(recorded)
    try:
        Evidence("check", mode, tmp_path).skip_if_recorded("1")
    except pytest.skip.Exception:
        assert skips
    else:
        assert not skips


def test_nothing_is_recorded_unasked(tmp_path: Path) -> None:
    for mode in ("recorded", "run"):
        Evidence("check", mode, tmp_path).passed("1")
    assert list(tmp_path.iterdir()) == []


def test_the_sources_are_the_package() -> None:
    names = {file.name for file in kernel_sources()}
    assert {"attention.py", "planner.py"} <= names
    assert all(file.is_file() for file in table_sources())
    assert FOLDER.is_dir()
