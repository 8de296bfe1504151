"""How the commands print: results on stdout, progress and errors on stderr, tables, and units."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import typer

from vitdeploy.progress import Progress, Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_WIDE = 400
"""Columns of a table that goes into a file or a pipe, at most."""

_GAP = 2
"""Blanks between two columns."""
_FOLDED = 16
"""Columns that folded text keeps."""
_ERROR = 400
"""Characters of an error and its hint together; ``--json`` has all of them."""


def line(text: str = "") -> None:
    """One line of a result."""
    sys.stdout.write(f"{printable(text)}\n")


def note(text: str) -> None:
    """One line beside the result."""
    sys.stderr.write(f"{printable(text)}\n")


def error(message: str, hint: str | None = None) -> None:
    """What went wrong, and what to do about it: a line each, together no longer than anybody reads."""
    hint = _shortened(hint or "", max(_ERROR // 2, _ERROR - len(message)))
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    note(_shortened(message, _ERROR - len(hint)))
    if hint:
        typer.secho("hint: ", fg="cyan", nl=False, err=True)
        note(hint)


def _shortened(text: str, most: int) -> str:
    """One line of at most so many characters; what a long one is about stands at its ends."""
    text = printable(text).replace("\n", "\\n").replace("\t", " ")
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 3]} … {text[-tail:]}"


def heading(text: str) -> None:
    """A line that begins a section of the result."""
    line()
    typer.secho(printable(text), bold=True)


def facts(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values, one line each."""
    for name, value in rows:
        line(f"{name:<12} {value}")


def json_document(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None) -> None:
    """A table; a column whose name begins with ``>`` is aligned to the right, and never broken.

    On a terminal that is too narrow its other columns are folded; where that is not enough, each row becomes
    a list of its own.

    Args:
        styles: how each row looks on a terminal, in rich's words: ``"strike red"``; empty is plain.
    """
    from rich import box
    from rich.table import Table

    width = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else _WIDE
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = _fitted(columns, shown, width)
    if widths is None:
        return _lists(columns, shown, styles)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, header_style="")
    for column, wide in zip(columns, widths, strict=True):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, width=wide)
    for row, style in zip(shown, styles or [""] * len(rows), strict=True):
        made.add_row(*row, style=style or None)
    console = _console(width=width)
    with console.capture() as drawn:
        console.print(made)
    sys.stdout.write("\n".join(row.rstrip() for row in drawn.get().splitlines()) + "\n")
    return None


def _fitted(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """The columns' widths for a table of this width, long text folded; None where that is not enough."""
    from rich.cells import cell_len

    widths, least = [], []
    for column, *cells in zip(columns, *rows, strict=True):
        texts = [column.removeprefix(">"), *cells]
        widths.append(max(map(cell_len, texts)))
        words = max(cell_len(word) for text in texts for word in (text.split() or [""]))
        least.append(widths[-1] if column.startswith(">") else max(words, min(widths[-1], _FOLDED)))
    while sum(widths) + _GAP * (len(widths) - 1) > width:
        place = max(range(len(widths)), key=lambda place: widths[place] - least[place])
        if widths[place] == least[place]:
            return None
        widths[place] -= 1
    return widths


def _lists(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None) -> None:
    """A table's rows one below the other: the first entry, then the others with their columns' names."""
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        if style:
            typer.secho(row[0], fg="red", strikethrough=True)
        else:
            line(row[0])
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                line(f"  {column.removeprefix('>')} {cell}" if column else f"  {cell}")


def _console(*, stderr: bool = False, width: int = _WIDE) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def stdout_is_ours() -> Iterator[None]:
    """What libraries and the user's own modules print goes to stderr, so that a result stays a result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class Stages(Progress):
    """Prints stages on stderr as they finish, with a spinner meanwhile on a terminal; remembers them."""

    def __init__(self) -> None:
        self.done: list[Stage] = []
        self.notes: list[str] = []
        self._status: Status | None = None

    def started(self, stage: Stage) -> None:
        if sys.stderr.isatty():
            self._status = _console(stderr=True).status(stage.name)
            self._status.start()

    def updated(self, stage: Stage) -> None:
        if self._status is not None:
            self._status.update(printable(f"{stage.name}  {stage.detail}"))

    def finished(self, stage: Stage) -> None:
        self._stop()
        self.done.append(stage)
        written = "" if stage.size is None else size(stage.size)
        detail = "  ".join(part for part in (stage.detail, written) if part)
        note(f"  {stage.name:<16} {stage.seconds:6.1f} s  {detail}".rstrip())

    def note(self, text: str) -> None:
        self._stop()
        self.notes.append(text)
        note(f"  note: {text}")

    def as_list(self) -> list[dict[str, Any]]:
        return [
            {"name": s.name, "seconds": round(s.seconds, 3), "detail": s.detail, "size": s.size}
            for s in self.done
        ]

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: labels and file names come from strangers."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def size(count: float) -> str:
    """Bytes, in a unit that a reader has a feeling for."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def flops(count: float) -> str:
    """Floating-point operations."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}FLOPs"
        count /= 1000
    return f"{count:.3g} TFLOPs"


def count(number: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def small(value: float | None) -> str:
    """An error or a difference."""
    return "-" if value is None else f"{value:.1e}"
