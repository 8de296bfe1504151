"""Tables of the documents."""

from __future__ import annotations

from itertools import takewhile

from tests.helpers.paths import ROOT


def rows_after(document: str, header: str) -> list[str]:
    """The rows of the table that begins with this line."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("|"), lines[lines.index(header) + 2 :]))
