"""The tables of the HTML report, as text: what stands in which row, not how it looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vitdeploy.benchmark import wording
from vitdeploy.benchmark.ranking import Group, batches, eager, groups, members, ranked, speedup
from vitdeploy.benchmark.results import Accuracy, Cell, Results

WRONG: Final = "wrong"
"""The kind of a row whose cell has wrong outputs: struck through."""
FAILED: Final = "failed"
BEST: Final = "best"


class Column(NamedTuple):
    """``text`` gives a cell's entry; a column that would be empty is left out."""

    title: str
    text: Callable[[Cell], str]
    words: bool = False
    """Text, not a number: aligned left."""


class Row(NamedTuple):
    name: str
    """Of the series, which has a colour and a marker."""
    kind: str
    entries: tuple[str, ...]
    note: str = ""
    """A sentence below the row."""
    starts: bool = False
    """Whether a new batch size begins here."""


class Table(NamedTuple):
    title: str
    head: tuple[tuple[str, bool], ...]
    """Title, and whether the column is text; the rows' names are not among them."""
    rows: tuple[Row, ...]


def title(results: Results, group: Group) -> str:
    """A group's name: the model, the bundle where another one has the same model, and the image size."""
    height, width = group.image_size
    models = {subject.name: subject.model for subject in results.subjects}
    model = models.get(group.subject, group.subject)
    alone = list(models.values()).count(model) < 2
    return wording.plain(f"{model if alone else group.subject}, {height}×{width}")


def measurements(results: Results, group: Group) -> Table:
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
        return wording.times(speedup(cell, eager(results, cell))) if cell.valid else wording.NONE

    columns = (
        Column("batch", lambda c: str(c.batch)),
        Column("p50 ms", lambda c: wording.number(c.p50_ms)),
        Column("over eager", gain),
        Column("images/s", lambda c: wording.number(c.images_per_s)),
        Column("p90 ms", lambda c: wording.number(c.p90_ms)),
        Column("p99 ms", lambda c: wording.number(c.p99_ms)),
        Column("mean ms", lambda c: wording.number(c.mean_ms)),
        Column("spread", lambda c: wording.NONE if c.spread is None else f"±{100 * c.spread:.1f} %"),
        Column("device p50 ms", lambda c: wording.number(c.device_p50_ms)),
        Column("computes in", lambda c: wording.plain(c.executes or c.precision), words=True),
    )
    return _table(results, title(results, group), order, columns, best, _remarks)


def parity(results: Results) -> Table:
    """Outputs against the float64 reference."""
    columns = (
        *_place(results),
        Column("relative error", lambda c: wording.error(c.parity.relative if c.parity else None)),
        Column("allowed", lambda c: wording.error(c.parity.tolerance if c.parity else None)),
        Column("verdict", lambda c: "passed" if c.parity and c.parity.passed else "FAILED", words=True),
        Column("largest absolute", lambda c: wording.error(c.parity.max_abs if c.parity else None)),
    )
    return _table(results, "Parity", [c for c in results.cells if c.parity], columns, note=_failures)


def accuracy(results: Results) -> Table:
    """Right answers on labelled images; cells of one series with equal ones share a row."""
    found: dict[tuple[object, ...], list[Cell]] = {}
    for cell in results.cells:
        if cell.accuracy is not None:
            name = (cell.subject, cell.image_size, wording.series(results, cell), cell.accuracy, cell.valid)
            found.setdefault(name, []).append(cell)
    together = {id(cells[0]): cells for cells in found.values()}

    def of(text: Callable[[Accuracy], str]) -> Callable[[Cell], str]:
        return lambda cell: text(cell.accuracy) if cell.accuracy else wording.NONE

    columns = (
        *_place(results)[:-1],
        Column("batch", lambda c: ", ".join(str(one.batch) for one in together[id(c)])),
        Column("images", of(lambda a: f"{a.images:,}")),
        Column("top-1", of(lambda a: wording.share(a.top1))),
        Column("reference", of(lambda a: wording.share(a.reference_top1))),
        Column("difference", of(lambda a: wording.share(a.top1_difference, signed=True))),
        Column("95 % interval", of(_interval)),
        Column("top-5", of(lambda a: wording.share(a.top5))),
        Column("reference top-5", of(lambda a: wording.share(a.reference_top5))),
    )
    return _table(results, "Accuracy", [cells[0] for cells in found.values()], columns)


def footprint(results: Results) -> Table:
    """Cold start, memory and size."""

    def second(name: str) -> Callable[[Cell], str]:
        return lambda c: wording.number(getattr(c.startup, name)) if c.startup else wording.NONE

    columns = (
        *_place(results),
        Column("import s", second("import_s")),
        Column("load s", second("load_s")),
        Column("first answer s", second("first_s")),
        Column("from nothing s", second("total_s")),
        Column("peak memory", lambda c: wording.size(c.peak_memory_bytes)),
        Column("peak GPU memory", lambda c: wording.size(c.peak_device_bytes)),
        Column("artifact", lambda c: wording.size(c.size_bytes)),
    )
    known = [
        c
        for c in results.cells
        if (c.startup, c.peak_memory_bytes, c.peak_device_bytes, c.size_bytes) != (None, None, None, None)
    ]
    return _table(results, "Cold start, memory and size", known, columns)


def _place(results: Results) -> tuple[Column, ...]:
    """What tells a series' cells apart; the batch is last."""
    batch = Column("batch", lambda c: str(c.batch))
    if len(groups(results)) < 2:
        return (batch,)
    where = Column("model", lambda c: title(results, Group(c.subject, c.image_size)), words=True)
    return (where, batch)


def _table(
    results: Results,
    name: str,
    cells: Sequence[Cell],
    columns: Sequence[Column],
    best: Sequence[Cell] = (),
    note: Callable[[Cell], str] = lambda cell: "",
) -> Table:
    entries = [[column.text(cell) for column in columns] for cell in cells]
    kept = [k for k in range(len(columns)) if any(row[k] not in ("", wording.NONE) for row in entries)]
    rows = []
    for cell, row, before in zip(cells, entries, (None, *cells), strict=False):
        starts = bool(best) and before is not None and before.batch != cell.batch
        shown = tuple(row[k] for k in kept)
        rows.append(Row(wording.series(results, cell), _kind(cell, best), shown, note(cell), starts))
    return Table(name, tuple((columns[k].title, columns[k].words) for k in kept), tuple(rows))


def _kind(cell: Cell, best: Sequence[Cell]) -> str:
    if cell.status == "failed":
        return FAILED
    if cell.parity is not None and not cell.parity.passed:
        return WRONG
    return BEST if any(cell is other for other in best) else ""


def _interval(accuracy: Accuracy) -> str:
    low, high = (wording.share(end, signed=True) for end in accuracy.top1_interval)
    return f"{low} to {high}"


def _failures(cell: Cell) -> str:
    return wording.plain("; ".join(cell.parity.failures if cell.parity else ()))


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
    return wording.plain("; ".join(words))
