"""Parts of documents that are made from committed records, between two markers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from vitdeploy.benchmark.results import write_whole


class Part:
    """A part of a document.

    Args:
        path: the document.
        maker: what makes the part, for whoever reads the source.
    """

    def __init__(self, path: Path, maker: str) -> None:
        self.path = path
        self._begin, self._end = f"<!-- {maker}: begin -->", f"<!-- {maker}: end -->"

    def read(self) -> str:
        """What stands there."""
        return self._split(self.path.read_text(encoding="utf-8"))[1].strip()

    def write(self, text: str) -> None:
        """Replace what stands there."""
        before, _, after = self._split(self.path.read_text(encoding="utf-8"))
        write_whole(self.path, f"{before}{self._begin}\n{text}\n{self._end}{after}")

    def publish(self, text: str, broken: Iterable[str], *, write: bool) -> None:
        """Print the text or write it into the document, and say what does not hold of what we claim."""
        if write:
            self.write(text)
        else:
            print(text)
        for claim in broken:
            print(f"does not hold: {claim}", file=sys.stderr)

    def _split(self, document: str) -> tuple[str, str, str]:
        before, begin, rest = document.partition(self._begin)
        part, end, after = rest.partition(self._end)
        if not begin or not end:
            raise ValueError(f"{self.path} has no part {self._begin} ... {self._end}")
        return before, part, after
