"""Measured values as text, and the tables that the terminal, CSV, Markdown and HTML show of them.

A table says what stands in which row, not how it looks: a view is a writer of any of them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from vitdeploy.benchmark.compare import ComparedCell
from vitdeploy.benchmark.ranking import (
    CellGroup,
    batches,
    best_by_batch,
    eager,
    groups,
    members,
    ranked,
    speedup,
)
from vitdeploy.benchmark.results import (
    Cell,
    CellAccuracy,
    Environment,
    MeasuredBundle,
    Parity,
    Results,
    Startup,
)
from vitdeploy.config import size_name

NONE = "–"
"""Shown where nothing was measured."""


def number_text(value: float | None) -> str:
    """Three significant digits, thousands separated, exponents only where they must be."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded if decimals else value:,.{decimals}f}"


def error_text(value: float | None) -> str:
    """An error as a power of ten."""
    return NONE if value is None else f"{value:.1e}"


def percent_text(value: float | None, *, signed: bool = False) -> str:
    """A share between 0 and 1 in percent."""
    return NONE if value is None else f"{100 * value:{'+' if signed else ''}.2f} %".replace("-", "−")


def bytes_text(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number_text(count / scale)} {unit}"
    return f"{count} B"


def speedup_text(factor: float | None) -> str:
    """A speed-up: ``1.62×``."""
    return NONE if factor is None else f"{factor:,.2f}×"


def plain_text(text: str) -> str:
    """One line without control characters: names come from strangers' files."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join("".join(kept).split())


def series_name(results: Results, cell: Cell) -> str:
    """A cell's name across batch sizes: its label, with threads and callers where they vary."""
    words = [cell.label]
    if len({c.threads for c in results.cells}) > 1:
        words.append(_counted(cell.threads, "thread") if cell.threads else "default threads")
    if len({c.concurrency for c in results.cells}) > 1:
        words.append(_counted(cell.concurrency, "caller"))
    words += ["spinning"] if cell.spin else []
    return plain_text(", ".join(words))


def machine_facts(environment: Environment) -> list[tuple[str, str]]:
    """Names and values of what was measured on, the most telling first."""
    cpu, git = environment.cpu, environment.git
    lines = [("CPU", f"{cpu.name}, {_counted(cpu.threads, 'thread')}")]
    lines += [("GPU", ", ".join(gpu.values())) for gpu in environment.gpus]
    lines.append(("Memory", bytes_text(cpu.memory)))
    if cpu.governor:
        lines.append(("Governor", cpu.governor))
    if cpu.affinity:
        lines.append(("Affinity", ", ".join(map(str, cpu.affinity))))
    lines += [("Platform", environment.platform), ("Python", environment.python)]
    lines.append(("vitdeploy", environment.vitdeploy))
    if git:
        lines.append(("Revision", f"{git.revision[:12]}{' with local changes' if git.dirty else ''}"))
    lines.append(("CPU flags", " ".join(cpu.flags)))
    return [(name, plain_text(value)) for name, value in lines if value not in ("", NONE)]


def library_versions(environment: Environment) -> list[tuple[str, str]]:
    """The installed libraries and their versions."""
    return [
        (plain_text(name), plain_text(version)) for name, version in environment.libraries.items() if version
    ]


def machine_line(environment: Environment) -> str:
    """What was measured on, in one line."""
    cpu, git = environment.cpu, environment.git
    words = [f"{cpu.name}, {_counted(cpu.threads, 'thread')}"]
    words += [", ".join(gpu.values()) for gpu in environment.gpus]
    words += [environment.platform, f"Python {environment.python}", f"vitdeploy {environment.vitdeploy}"]
    words += [f"{name} {version}" for name, version in library_versions(environment)]
    if git:
        words.append(f"git {git.revision[:12]}{' with local changes' if git.dirty else ''}")
    return plain_text("; ".join(words))


RowKind = Literal["", "best", "wrong", "failed", "faster", "slower"]
"""What is to be seen of a row or an entry at first sight: ``wrong`` is struck through."""
Entry = str | int | float | bool | None


class TableColumn(NamedTuple):
    header: str
    unit: str = ""
    words: bool = False
    """Text, not a number: aligned left."""

    @property
    def title(self) -> str:
        """Header and unit."""
        return f"{self.header} {self.unit}".rstrip()


class TableRow(NamedTuple):
    entries: tuple[Entry, ...]
    """One for each column."""
    kind: RowKind = ""
    marks: tuple[RowKind, ...] = ()
    """Kinds of the entries, where they differ from the row's."""
    note: str = ""
    """A sentence about the row."""
    starts: bool = False
    """Whether a new batch size begins here."""


class Table(NamedTuple):
    title: str
    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    """Sentences about the whole."""


class _Field(NamedTuple):
    """A column of a table of cells."""

    column: TableColumn
    text: Callable[[Cell], str]


def group_title(results: Results, group: CellGroup) -> str:
    """A group's name: the model, the bundle where another one has the same model, and the image size."""
    height, width = group.image_size
    models = {subject.name: subject.model for subject in results.subjects}
    model = models.get(group.subject, group.subject)
    alone = list(models.values()).count(model) < 2
    return plain_text(f"{model if alone else group.subject}, {height}×{width}")


def _backend(cell: Cell) -> str:
    words = [cell.label.removesuffix(f" {cell.artifact}")]
    words += [_counted(cell.threads, "thread")] if cell.threads else []
    words += [f"{cell.concurrency} callers"] if cell.concurrency > 1 else []
    words += ["spinning"] if cell.spin else []
    return ", ".join(words)


def _failure(cell: Cell) -> str:
    """What is wrong with a cell, so that nobody overlooks it."""
    if cell.status == "failed":
        return f"FAILED: {cell.reason}"
    wrong = cell.parity is not None and not cell.parity.passed
    return f"WRONG: {'; '.join(cell.parity.failures)}" if wrong and cell.parity else ""


def side_by_side(results: Results) -> Table:
    """The cells of several bundles or image sizes in one table, with what each model costs on paper."""

    def model(cell: Cell) -> str:
        subject = results.subject(cell)
        names = {s.name for s in results.subjects if subject and s.model == subject.model}
        return plain_text(subject.model if subject and len(names) == 1 else cell.subject)

    def of_subject(text: Callable[[MeasuredBundle], str]) -> Callable[[Cell], str]:
        return lambda cell: text(subject) if (subject := results.subject(cell)) else NONE

    fields = (
        _Field(TableColumn("model", words=True), model),
        _Field(TableColumn("size"), lambda c: size_name(c.image_size)),
        _Field(TableColumn("GFLOPs"), of_subject(lambda s: number_text(s.flops and s.flops / 1e9))),
        _Field(TableColumn("M params"), of_subject(lambda s: number_text(s.parameters / 1e6))),
        _Field(TableColumn("backend", words=True), _backend),
        _Field(TableColumn("artifact", words=True), lambda c: c.artifact),
        _Field(TableColumn("batch"), lambda c: str(c.batch)),
        _Field(TableColumn("p50", "ms"), lambda c: _fixed(c.p50_ms, 2)),
        _Field(TableColumn("p99", "ms"), lambda c: _fixed(c.p99_ms, 2)),
        _Field(TableColumn("images/s"), lambda c: _fixed(c.images_per_s, 1)),
        _Field(TableColumn("error"), lambda c: error_text(c.parity.relative if c.parity else None)),
        _Field(TableColumn("top-1"), lambda c: f"{c.accuracy.top1:.1%}" if c.accuracy else NONE),
    )
    return _table("Side by side", results.cells, fields, note=_failure)


def summary(results: Results) -> Table:
    """The cells in the order of their measurement, for a terminal."""
    fields = (
        _Field(TableColumn("backend", words=True), _backend),
        _Field(TableColumn("artifact", words=True), lambda c: c.artifact),
        _Field(TableColumn("batch"), lambda c: str(c.batch)),
        _Field(TableColumn("p50", "ms"), lambda c: _fixed(c.p50_ms, 2)),
        _Field(TableColumn("p90", "ms"), lambda c: _fixed(c.p90_ms, 2)),
        _Field(TableColumn("p99", "ms"), lambda c: _fixed(c.p99_ms, 2)),
        _Field(TableColumn("images/s"), lambda c: _fixed(c.images_per_s, 1)),
        _Field(TableColumn("error"), lambda c: error_text(c.parity.relative if c.parity else None)),
        _Field(TableColumn("top-1"), lambda c: f"{c.accuracy.top1:.1%}" if c.accuracy else NONE),
    )
    return _table("", results.cells, fields, note=_failure)


def by_batch(results: Results, group: CellGroup) -> Table:
    """A row for each series and columns for each batch size: the shortest table that has it all."""
    cells = members(results, group)
    sizes, best = batches(cells), [answer.cell for answer in best_by_batch(cells, results)]
    rows: dict[tuple[str, str, int], dict[int, Cell]] = {}
    for cell in cells:
        # Cells that nothing tells apart, as other programs' results may have, get a row each.
        name, number = (series_name(results, cell), cell.precision), 0
        while cell.batch in rows.get((*name, number), {}):
            number += 1
        rows.setdefault((*name, number), {})[cell.batch] = cell
    columns = [TableColumn("backend, artifact", words=True), TableColumn("precision", words=True)]
    for size in sizes:
        columns += [TableColumn(f"batch {size}: p50", "ms"), TableColumn("images/s"), TableColumn("error")]
    return Table(
        group_title(results, group),
        tuple(columns),
        tuple(
            TableRow(
                (name, precision, *(entry for size in sizes for entry in _at_batch(row.get(size)))),
                marks=("", "", *(mark for size in sizes for mark in _marks(row.get(size), best))),
            )
            for (name, precision, _), row in rows.items()
        ),
    )


def _at_batch(cell: Cell | None) -> tuple[str, str, str]:
    """Latency, throughput and error."""
    if cell is None:
        return "", "", ""
    warning = " ⚠" if cell.warnings else ""
    if cell.status == "failed":
        return f"failed{warning}", "", ""
    relative = error_text(cell.parity.relative if cell.parity else None)
    return number_text(cell.p50_ms) + warning, number_text(cell.images_per_s), relative


def _marks(cell: Cell | None, best: Sequence[Cell | None]) -> tuple[RowKind, RowKind, RowKind]:
    kind = "" if cell is None else _kind(cell, best)
    return ("wrong", "wrong", "wrong") if kind == "wrong" else (kind, "", "")


def measurements(results: Results, group: CellGroup) -> Table:
    """Every cell of a group: by batch, the fastest right one first, those that are not ranked last."""
    cells = members(results, group)
    order: list[Cell] = []
    best: list[Cell] = []
    for batch in batches(cells):
        fast = ranked(cell for cell in cells if cell.batch == batch)
        best += fast[:1]
        rest = [c for c in cells if c.batch == batch and not any(c is other for other in fast)]
        order += [*fast, *rest]

    def gain(cell: Cell) -> str:
        return speedup_text(speedup(cell, eager(results, cell))) if cell.valid else NONE

    fields = (
        _series(results),
        _Field(TableColumn("batch"), lambda c: str(c.batch)),
        _Field(TableColumn("p50", "ms"), lambda c: number_text(c.p50_ms)),
        _Field(TableColumn("over eager"), gain),
        _Field(TableColumn("images/s"), lambda c: number_text(c.images_per_s)),
        _Field(TableColumn("p90", "ms"), lambda c: number_text(c.p90_ms)),
        _Field(TableColumn("p99", "ms"), lambda c: number_text(c.p99_ms)),
        _Field(TableColumn("mean", "ms"), lambda c: number_text(c.mean_ms)),
        _Field(TableColumn("spread"), lambda c: NONE if c.spread is None else f"±{100 * c.spread:.1f} %"),
        _Field(TableColumn("device p50", "ms"), lambda c: number_text(c.device_p50_ms)),
        _Field(TableColumn("computes in", words=True), lambda c: plain_text(c.executes or c.precision)),
    )
    return _table(group_title(results, group), order, fields, best=best, note=_remarks)


def parity_table(results: Results) -> Table:
    """Outputs against the float64 reference."""

    def of(text: Callable[[Parity], str]) -> Callable[[Cell], str]:
        return lambda cell: text(cell.parity) if cell.parity else NONE

    fields = (
        *_place(results),
        _Field(TableColumn("relative error"), of(lambda p: error_text(p.relative))),
        _Field(TableColumn("allowed"), of(lambda p: error_text(p.tolerance))),
        _Field(TableColumn("verdict", words=True), of(lambda p: "passed" if p.passed else "FAILED")),
        _Field(TableColumn("largest absolute"), of(lambda p: error_text(p.max_abs))),
    )
    explained = (
        "Outputs held against the model in float64, at the cell's own batch size. Relative error: "
        "‖output − reference‖ / ‖reference‖ of the worst row."
    )
    failures = of(lambda p: plain_text("; ".join(p.failures)))
    cells = [c for c in results.cells if c.parity]
    return _table("Parity", cells, fields, note=failures, notes=(explained,))


def accuracy_table(results: Results) -> Table:
    """Right answers on labelled images; cells of one series with equal ones share a row."""
    alike: dict[tuple[object, ...], list[Cell]] = {}
    for cell in results.cells:
        if cell.accuracy is not None:
            name = (cell.subject, cell.image_size, series_name(results, cell), cell.accuracy, cell.valid)
            alike.setdefault(name, []).append(cell)
    together = {id(cells[0]): cells for cells in alike.values()}

    def of(text: Callable[[CellAccuracy], str]) -> Callable[[Cell], str]:
        return lambda cell: text(cell.accuracy) if cell.accuracy else NONE

    def interval(accuracy: CellAccuracy) -> str:
        return " to ".join(percent_text(end, signed=True) for end in accuracy.top1_interval)

    fields = (
        *_place(results)[:-1],
        _Field(TableColumn("batch"), lambda c: ", ".join(str(one.batch) for one in together[id(c)])),
        _Field(TableColumn("images"), of(lambda a: f"{a.images:,}")),
        _Field(TableColumn("top-1"), of(lambda a: percent_text(a.top1))),
        _Field(TableColumn("reference"), of(lambda a: percent_text(a.reference_top1))),
        _Field(TableColumn("difference"), of(lambda a: percent_text(a.top1_difference, signed=True))),
        _Field(TableColumn("95 % interval"), of(interval)),
        _Field(TableColumn("top-5"), of(lambda a: percent_text(a.top5))),
        _Field(TableColumn("reference top-5"), of(lambda a: percent_text(a.reference_top5))),
    )
    explained = (
        "Right answers on labelled images, beside those of the model in float64 on the same images, with the "
        "95 % confidence interval of the difference."
    )
    return _table("Accuracy", [cells[0] for cells in alike.values()], fields, notes=(explained,))


def footprint(results: Results) -> Table:
    """Cold start, memory and size."""

    def second(name: str) -> Callable[[Cell], str]:
        return lambda c: number_text(getattr(c.startup, name)) if c.startup else NONE

    fields = (
        *_place(results),
        _Field(TableColumn("import", "s"), second("import_s")),
        _Field(TableColumn("load", "s"), second("load_s")),
        _Field(TableColumn("first answer", "s"), second("first_s")),
        _Field(TableColumn("from nothing", "s"), second("total_s")),
        _Field(TableColumn("peak memory"), lambda c: bytes_text(c.peak_memory_bytes)),
        _Field(TableColumn("peak GPU memory"), lambda c: bytes_text(c.peak_device_bytes)),
        _Field(TableColumn("artifact"), lambda c: bytes_text(c.size_bytes)),
    )
    known = [
        c
        for c in results.cells
        if (c.startup, c.peak_memory_bytes, c.peak_device_bytes, c.size_bytes) != (None, None, None, None)
    ]
    explained = (
        "A fresh process from nothing to its first answer, with its files in the system's cache; resident "
        "memory at its highest."
    )
    return _table("Cold start, memory and size", known, fields, notes=(explained,))


def skipped_table(results: Results) -> Table:
    """What this machine or a bundle has no cell for."""
    columns = tuple(TableColumn(header, words=True) for header in ("backend, artifact", "bundle", "why"))
    rows = [(f"{s.backend} {s.artifact}", s.subject, s.reason) for s in results.skipped]
    return Table(
        "Not measured here", columns, tuple(TableRow(tuple(plain_text(text) for text in row)) for row in rows)
    )


def compared_table(rows: Sequence[ComparedCell]) -> Table:
    """Cells then and now."""
    several = len({row.subject for row in rows}) > 1

    def name(row: ComparedCell) -> str:
        words = [f"{row.subject}: {row.label}" if several else row.label]
        words += [_counted(row.threads, "thread")] if row.threads else []
        words += [f"{row.concurrency} callers"] if row.concurrency > 1 else []
        words += ["spinning"] if row.spin else []
        return plain_text(", ".join(words))

    columns = (
        TableColumn("backend, artifact", words=True),
        TableColumn("batch"),
        TableColumn("then", "ms"),
        TableColumn("now", "ms"),
        TableColumn("ratio"),
        TableColumn("95 % interval"),
        TableColumn("verdict", words=True),
        TableColumn("why", words=True),
    )
    made = []
    for row in rows:
        kind: RowKind = row.verdict if row.verdict in ("faster", "slower") else ""
        interval = NONE if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        times = _fixed(row.old_ms, 2), _fixed(row.new_ms, 2), _fixed(row.ratio, 3)
        entries = (name(row), str(row.batch), *times, interval, row.verdict, plain_text(row.reason))
        made.append(TableRow(entries, marks=("",) * 6 + (kind, "")))
    return _filled(Table("Compared with before", columns, tuple(made)))


_PAIRS: Final = {"image_size": ("height", "width"), "top1_interval": ("low", "high")}
_PARTS: Final[dict[str, type[BaseModel]]] = {"parity": Parity, "accuracy": CellAccuracy, "startup": Startup}
_SAMPLES: Final = ("samples_ms", "device_samples_ms")


def every_value(results: Results) -> Table:
    """A row for each cell and a column for each value of ``results.json``, but for its samples.

    Columns are named after the schema's fields, those of a cell's records with the record before them
    (``parity_relative``).
    """
    models = {subject.name: subject.model for subject in results.subjects}
    names = ["model", *_names(Cell), "samples", "valid"]
    return Table(
        "",
        tuple(TableColumn(name) for name in names),
        tuple(
            TableRow((models.get(c.subject, ""), *_values(Cell, c), len(c.samples_ms), c.valid))
            for c in results.cells
        ),
    )


def _names(record: type[BaseModel], before: str = "") -> Iterator[str]:
    for name in record.model_fields:
        if name in _PARTS:
            yield from _names(_PARTS[name], f"{name}_")
        elif name in _PAIRS:
            yield from (f"{before}{name}_{end}" for end in _PAIRS[name])
        elif name not in _SAMPLES:
            yield before + name


def _values(record: type[BaseModel], value: BaseModel | None) -> Iterator[Any]:
    """As many as there are names, also where the record is null."""
    for name in record.model_fields:
        found = getattr(value, name) if value is not None else None
        if name in _PARTS:
            yield from _values(_PARTS[name], found)
        elif name in _PAIRS:
            yield from (None, None) if found is None else found
        elif name not in _SAMPLES:
            yield "; ".join(found) if isinstance(found, tuple) else found


def _series(results: Results) -> _Field:
    return _Field(TableColumn("backend, artifact", words=True), lambda c: series_name(results, c))


def _place(results: Results) -> tuple[_Field, ...]:
    """The series, and what tells its cells apart; the batch is last."""
    where = _Field(
        TableColumn("model", words=True), lambda c: group_title(results, CellGroup(c.subject, c.image_size))
    )
    several = (where,) if len(groups(results)) > 1 else ()
    return (_series(results), *several, _Field(TableColumn("batch"), lambda c: str(c.batch)))


def _table(
    title: str,
    cells: Sequence[Cell],
    fields: Sequence[_Field],
    *,
    best: Sequence[Cell] = (),
    note: Callable[[Cell], str] = lambda cell: "",
    notes: tuple[str, ...] = (),
) -> Table:
    rows = []
    for cell, before in zip(cells, (None, *cells), strict=False):
        starts = bool(best) and before is not None and before.batch != cell.batch
        entries = tuple(field.text(cell) for field in fields)
        rows.append(TableRow(entries, _kind(cell, best), note=note(cell), starts=starts))
    return _filled(Table(title, tuple(field.column for field in fields), tuple(rows), notes))


def _filled(table: Table) -> Table:
    """The table without the columns that have no entry; the first one stays."""
    empty = ("", NONE)
    count = range(len(table.columns))
    kept = [k for k in count if k == 0 or any(row.entries[k] not in empty for row in table.rows)]
    rows = [
        row._replace(
            entries=tuple(row.entries[k] for k in kept),
            marks=tuple(row.marks[k] for k in kept) if row.marks else (),
        )
        for row in table.rows
    ]
    return table._replace(columns=tuple(table.columns[k] for k in kept), rows=tuple(rows))


def _kind(cell: Cell, best: Sequence[Cell | None]) -> RowKind:
    if cell.status == "failed":
        return "failed"
    if cell.parity is not None and not cell.parity.passed:
        return "wrong"
    return "best" if any(cell is other for other in best) else ""


def _remarks(cell: Cell) -> str:
    words = []
    if cell.status == "failed":
        words.append(f"failed: {cell.reason}" if cell.reason else "failed")
    elif cell.parity is None:
        words.append("not held against the reference: not ranked")
    elif not cell.parity.passed:
        words.append("wrong outputs: not ranked")
    if cell.warnings:
        words.append(f"⚠ disturbed: {'; '.join(cell.warnings)}")
    if cell.repeats:
        words.append(f"measured again {cell.repeats}×")
    return plain_text("; ".join(words))


def _fixed(value: float | None, decimals: int) -> str:
    return NONE if value is None else f"{value:.{decimals}f}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
