"""A measurement as CSV, for spreadsheets and scripts, and as Markdown, for a README or a pull request."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydantic import BaseModel

from vitdeploy.benchmark import wording
from vitdeploy.benchmark.ranking import Answer, Group, answers, batches, groups, members
from vitdeploy.benchmark.results import Accuracy, Cell, Parity, Results, Startup

_PAIRS: Final = {"image_size": ("height", "width"), "top1_interval": ("low", "high")}
_PARTS: Final[dict[str, type[BaseModel]]] = {"parity": Parity, "accuracy": Accuracy, "startup": Startup}
_SAMPLES: Final = ("samples_ms", "device_samples_ms")
_FORMULA: Final = re.compile(r"\s*[=+\-@＝＋－＠\t\r\n]")
_MARKDOWN: Final = re.compile(r"([\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_]))")


def csv_text(results: Results) -> str:
    """One row per cell and one column per value, after RFC 4180, for ``results.json`` without its samples.

    Columns are named after the schema's fields, those of a cell's records with the record before them
    (``parity_relative``). Null is empty. Text that a spreadsheet would run gets a ``'`` before it.
    """
    models = {subject.name: subject.model for subject in results.subjects}
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["model", *_columns(Cell), "samples", "valid"])
    for cell in results.cells:
        row = [models.get(cell.subject, ""), *_values(Cell, cell), len(cell.samples_ms), cell.valid]
        writer.writerow([_field(value) for value in row])
    return out.getvalue()


def _columns(record: type[BaseModel], before: str = "") -> Iterator[str]:
    for name in record.model_fields:
        if name in _PARTS:
            yield from _columns(_PARTS[name], f"{name}_")
        elif name in _PAIRS:
            yield from (f"{before}{name}_{end}" for end in _PAIRS[name])
        elif name not in _SAMPLES:
            yield before + name


def _values(record: type[BaseModel], value: BaseModel | None) -> Iterator[Any]:
    """As many as there are columns, also where the record is null."""
    for name in record.model_fields:
        found = getattr(value, name) if value is not None else None
        if name in _PARTS:
            yield from _values(_PARTS[name], found)
        elif name in _PAIRS:
            yield from (None, None) if found is None else found
        elif name not in _SAMPLES:
            yield found


def _field(value: Any) -> Any:
    if isinstance(value, tuple):
        value = "; ".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value if isinstance(value, str) and _FORMULA.match(value) else value


def markdown_text(results: Results) -> str:
    """The answer first, then a table per model and image size, then what went wrong, and the machine.

    Cells with wrong outputs are struck through and take part in no ranking.
    """
    blocks = []
    if results.partial:
        blocks.append("> **Partial:** the measurement was interrupted; its cells have fewer rounds, or none.")
    if not results.cells:
        blocks.append("**Nothing was measured:** there are no cells.")
    for group in groups(results):
        cells = members(results, group)
        found = answers(cells, results)
        blocks.append(f"### {_md(_title(results, group))}")
        blocks.append("\n".join(_answer(results, answer) for answer in found))
        blocks.append("\n".join(_table(results, cells, found)))
    blocks += _remarks(results)
    blocks.append(_measured_on(results))
    return "\n\n".join(blocks) + "\n"


def _md(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(wording.plain(text), quote=False))


def _title(results: Results, group: Group) -> str:
    height, width = group.image_size
    model = next((s.model for s in results.subjects if s.name == group.subject), group.subject)
    name = group.subject if model == group.subject else f"{group.subject} ({model})"
    return f"{name}, {height}×{width}"


def _answer(results: Results, answer: Answer) -> str:
    start = f"- Batch {answer.batch}: "
    cell = answer.cell
    if cell is None:
        return start + "nothing to choose: no cell was measured and right"
    words = f"**{_md(wording.series(results, cell))}**, {wording.number(cell.p50_ms)} ms"
    words += f" ({wording.number(cell.images_per_s)} images/s)"
    if answer.over is cell:
        words += ", which is PyTorch eager itself"
    elif answer.factor is not None:
        words += f", **{wording.times(answer.factor)}** PyTorch eager in fp32"
    return start + words + (" ⚠" if cell.warnings else "")


def _table(results: Results, cells: Sequence[Cell], found: Sequence[Answer]) -> list[str]:
    winners = [answer.cell for answer in found]
    sizes = batches(cells)
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((wording.series(results, cell), cell.precision), []).append(cell)
    head = [
        "backend, artifact",
        "precision",
        *(t for b in sizes for t in (f"batch {b}: p50 ms", "images/s", "error")),
    ]
    lines = [_line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
    for (name, precision), row in rows.items():
        entries = [_md(name), precision]
        for batch in sizes:
            entries += _entries([cell for cell in row if cell.batch == batch], winners)
        lines.append(_line(entries))
    return lines


def _entries(cells: Sequence[Cell], winners: Sequence[Cell | None]) -> list[str]:
    """Latency, throughput and error of a row at one batch size."""
    columns: list[list[str]] = [[], [], []]
    for cell in cells:
        if cell.status == "failed":
            shown = ["failed", "", ""]
        else:
            relative = wording.error(cell.parity.relative if cell.parity else None)
            shown = [wording.number(cell.p50_ms), wording.number(cell.images_per_s), relative]
            if cell.parity is not None and not cell.parity.passed:
                shown = [f"~~{text}~~" for text in shown]
            elif any(cell is winner for winner in winners):
                shown = [f"**{shown[0]}**", *shown[1:]]
        if cell.warnings:
            shown[0] += " ⚠"
        for column, text in zip(columns, shown, strict=True):
            column.append(text)
    return ["<br>".join(column) for column in columns]


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _remarks(results: Results) -> list[str]:
    """What the tables only mark, each with its reason."""
    cells = results.cells
    failed = [(c, c.reason) for c in cells if c.status == "failed"]
    wrong = [(c, "; ".join(c.parity.failures)) for c in cells if c.parity and not c.parity.passed]
    unproven = [(c, "") for c in cells if c.status == "ok" and c.parity is None]
    disturbed = [(c, "; ".join(c.warnings)) for c in cells if c.warnings]
    titled = (
        ("Failed", failed),
        ("Wrong outputs, struck through and not ranked", wrong),
        ("Not held against the reference, not ranked", unproven),
        ("⚠ Disturbed", disturbed),
    )
    blocks = [
        "\n".join([f"{title}:", "", *(_remark(results, cell, why) for cell, why in listed)])
        for title, listed in titled
        if listed
    ]
    if results.skipped:
        lines = [f"- {_md(s.backend)} {_md(s.artifact)}: {_md(s.reason)}" for s in results.skipped]
        blocks.append("\n".join(["Skipped:", "", *lines]))
    if results.notes:
        blocks.append("\n".join(["Notes:", "", *(f"- {_md(note)}" for note in results.notes)]))
    return blocks


def _remark(results: Results, cell: Cell, why: str) -> str:
    where = f"- {_md(wording.series(results, cell))}, batch {cell.batch}"
    if len(groups(results)) > 1:
        where += f", {_md(_title(results, Group(cell.subject, cell.image_size)))}"
    return f"{where}: {_md(why)}" if why else where


def _measured_on(results: Results) -> str:
    machine = wording.machine_line(results.environment)
    how = f"p50 over {results.rounds} interleaved rounds, host to host; error is relative to float64"
    return f"<sub>{_md(machine)}. {how}. {results.created[:10]}</sub>"
