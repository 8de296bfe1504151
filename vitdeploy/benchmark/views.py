"""A measurement as CSV, for spreadsheets and scripts, and as Markdown, for a README or a pull request."""

from __future__ import annotations

import csv
import html
import io
import re
from typing import Final

from vitdeploy.benchmark.compare import ResultsComparison
from vitdeploy.benchmark.ranking import BestCell, CellGroup, best_by_batch, groups, members
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.benchmark.tables import (
    Entry,
    Table,
    by_batch,
    compared_table,
    every_value,
    machine_line,
    number_text,
    plain_text,
    series_name,
    side_by_side,
    speedup_text,
)

_FORMULA: Final = re.compile(r"\s*[=+\-@＝＋－＠\t\r\n]")
_MARKDOWN: Final = re.compile(r"([\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_]))")
_MARKUP: Final = {"best": "**", "wrong": "~~"}


def csv_table(table: Table) -> str:
    """A table after RFC 4180. Null is empty; text that a spreadsheet would run gets a ``'`` before it."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([column.title for column in table.columns])
    writer.writerows([_csv_entry(entry) for entry in row.entries] for row in table.rows)
    return out.getvalue()


def _csv_entry(entry: Entry) -> Entry:
    if isinstance(entry, bool):
        return str(entry).lower()
    return f"'{entry}" if isinstance(entry, str) and _FORMULA.match(entry) else entry


def markdown_table(table: Table) -> list[str]:
    """A table in lines; what is best is bold, what is wrong is struck through."""
    lines = [
        _markdown_row([column.title for column in table.columns]),
        _markdown_row(["---" if column.words else "---:" for column in table.columns]),
    ]
    for row in table.rows:
        marks = row.marks or (row.kind,) * len(row.entries)
        texts = [_md(str(entry)) for entry in row.entries]
        ends = [_MARKUP.get(mark, "") if text else "" for mark, text in zip(marks, texts, strict=True)]
        lines.append(_markdown_row([end + text + end for end, text in zip(ends, texts, strict=True)]))
    return lines


def _markdown_row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


def csv_text(results: Results) -> str:
    """One row per cell and one column per value of ``results.json``, without its samples."""
    return csv_table(every_value(results))


def comparison_markdown(comparison: ResultsComparison) -> str:
    """For a comment on a pull request: the verdict, what changed, and the rest folded away."""
    icon = "❌" if comparison.slower else "✅"
    lines = [f"{icon} **{comparison.summary}** Tolerance {comparison.tolerance:.0%}.", ""]
    changed = [row for row in comparison.rows if row.verdict in ("slower", "faster")]
    rest = [row for row in comparison.rows if row not in changed]
    if changed:
        lines += [*markdown_table(compared_table(changed)), ""]
    if rest:
        lines += ["<details><summary>The other cells</summary>", ""]
        lines += [*markdown_table(compared_table(rest)), "", "</details>", ""]
    return "\n".join(lines)


def markdown_text(results: Results) -> str:
    """The answer first, then a table per model and image size, then what went wrong, and the machine.

    Cells with wrong outputs are struck through and take part in no ranking.
    """
    blocks = []
    if results.partial:
        blocks.append("> **Partial:** the measurement was interrupted; its cells have fewer rounds, or none.")
    if not results.cells:
        blocks.append("**Nothing was measured:** there are no cells.")
    if len(groups(results)) > 1:
        table = side_by_side(results)
        blocks += [f"### {table.title}", "\n".join(markdown_table(table))]
    for group in groups(results):
        cells = members(results, group)
        blocks.append(f"### {_md(_title(results, group))}")
        blocks.append("\n".join(_answer(results, best) for best in best_by_batch(cells, results)))
        blocks.append("\n".join(markdown_table(by_batch(results, group))))
    blocks += _remarks(results)
    blocks.append(_measured_on(results))
    return "\n\n".join(blocks) + "\n"


def _md(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(plain_text(text), quote=False))


def _title(results: Results, group: CellGroup) -> str:
    height, width = group.image_size
    model = next((s.model for s in results.subjects if s.name == group.subject), group.subject)
    name = group.subject if model == group.subject else f"{group.subject} ({model})"
    return f"{name}, {height}×{width}"


def _answer(results: Results, best: BestCell) -> str:
    start = f"- Batch {best.batch}: "
    cell = best.cell
    if cell is None:
        return start + "nothing to choose: no cell was measured and right"
    words = f"**{_md(series_name(results, cell))}**, {number_text(cell.p50_ms)} ms"
    words += f" ({number_text(cell.images_per_s)} images/s)"
    if best.over is cell:
        words += ", which is PyTorch eager itself"
    elif best.factor is not None:
        words += f", **{speedup_text(best.factor)}** PyTorch eager in fp32"
    return start + words + (" ⚠" if cell.warnings else "")


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
    where = f"- {_md(series_name(results, cell))}, batch {cell.batch}"
    if len(groups(results)) > 1:
        where += f", {_md(_title(results, CellGroup(cell.subject, cell.image_size)))}"
    return f"{where}: {_md(why)}" if why else where


def _measured_on(results: Results) -> str:
    machine = machine_line(results.environment)
    how = f"p50 over {results.rounds} interleaved rounds, host to host; error is relative to float64"
    return f"<sub>{_md(machine)}. {how}. {results.created[:10]}</sub>"
