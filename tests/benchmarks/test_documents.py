"""Parts of documents that are made from records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.documents import Part


def test_only_the_part_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# Title\n\n<!-- maker: begin -->\nold\n<!-- maker: end -->\n\nrest\n")
    part = Part(path, "maker")
    assert part.read() == "old"
    part.write("| new |")
    assert path.read_text() == "# Title\n\n<!-- maker: begin -->\n| new |\n<!-- maker: end -->\n\nrest\n"
    assert part.read() == "| new |"


@pytest.mark.parametrize(
    "text", ["", "<!-- maker: begin -->", "<!-- maker: end -->", "<!-- other: begin -->"]
)
def test_a_document_without_the_part_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="has no part"):
        Part(path, "maker").write("new")
    assert path.read_text() == text
