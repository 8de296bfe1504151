"""A measurement as one HTML file to show counters: no network, no scripts, light and dark, on a phone too.

Names in a measurement are other people's text: everything is escaped, and the page's own policy forbids
scripts and loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitdeploy.benchmark import tables
from vitdeploy.benchmark.compare import ResultsComparison
from vitdeploy.benchmark.plots import Plot, plots, require_matplotlib, size_plots, styles, swatch
from vitdeploy.benchmark.ranking import BestCell, best_by_batch, groups, members
from vitdeploy.benchmark.results import Cell, MeasuredBundle, Results
from vitdeploy.benchmark.tables import (
    NONE,
    Table,
    error_text,
    library_versions,
    machine_facts,
    number_text,
    plain_text,
    series_name,
    speedup_text,
)
from vitdeploy.config import size_name
from vitdeploy.errors import MissingDependency

if TYPE_CHECKING:
    import jinja2


class Card(NamedTuple):
    """The answer for one batch size, in the report's words."""

    batch: int
    series: str
    time: str
    factor: str
    """The speed-up; empty where there is none to tell."""
    gain: str
    images: str
    error: str
    runner_up: str
    disturbed: bool


class Section(NamedTuple):
    """What the report says of one model and image size."""

    title: str
    lead: str
    cards: tuple[Card, ...]
    plots: tuple[Plot, ...]
    measurements: Table


def require_libraries(purpose: str = "the HTML report") -> None:
    """Find out before a measurement whether its report can be made.

    Raises:
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    require_matplotlib(purpose)
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependency("jinja2", extra="report", purpose=purpose) from error


def html_text(results: Results, comparison: ResultsComparison | None = None) -> str:
    """The whole page; the same measurement gives the same text.

    Raises:
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    require_libraries()
    looks = styles(results)
    return page_template(Path(__file__).parent, "report.html").render(
        results=results,
        title=_title(results),
        sections=[_section(results, number) for number in range(len(groups(results)))],
        counts=_counts(results.cells),
        side_by_side=tables.side_by_side(results) if len(groups(results)) > 1 else None,
        size_plots=size_plots(results),
        legend={name: swatch(look) for name, look in looks.items()},
        facts=(
            tables.parity_table(results),
            tables.accuracy_table(results),
            tables.footprint(results),
            tables.skipped_table(results),
        ),
        comparison=comparison,
        compared=tables.compared_table(comparison.rows) if comparison else None,
        method=_method(results),
        machine=machine_facts(results.environment),
        libraries=library_versions(results.environment),
    )


def page_template(folder: Path, name: str) -> jinja2.Template:
    """The template of a page; whatever folder it lies in, it can include ``report.css``, which is here."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain_text
    return environment.get_template(name)


def _title(results: Results) -> str:
    models = list(dict.fromkeys(plain_text(subject.model) for subject in results.subjects))
    if not models:
        return "vitdeploy bench"
    named = models[0] if len(models) == 1 else f"{', '.join(models[:-1])} and {models[-1]}"
    return f"How fast {named} run{'s' if len(models) == 1 else ''}"


def _section(results: Results, number: int) -> Section:
    group = groups(results)[number]
    cells = members(results, group)
    found = best_by_batch(cells, results)
    return Section(
        tables.group_title(results, group),
        _lead(results, found),
        tuple(card for answer in found if (card := _card(results, answer))),
        tuple(plots(results, cells, f"plot-{number}")),
        tables.measurements(results, group),
    )


def _lead(results: Results, found: Sequence[BestCell]) -> str:
    """The answer in a sentence or two."""
    chosen = [answer for answer in found if answer.cell is not None]
    if not chosen:
        return "Nothing to choose: no cell was measured and right."
    names = list(dict.fromkeys(series_name(results, a.cell) for a in chosen if a.cell))
    missing = [str(a.batch) for a in found if a.cell is None]
    if len(names) == 1:
        where = "at every batch size" if len(found) > 1 else f"at batch {found[0].batch}"
        words = f"{names[0]} is the fastest verified choice {where}"
    else:
        words = "The fastest verified choices: " + "; ".join(
            f"at batch {a.batch} {series_name(results, a.cell)}" for a in chosen if a.cell
        )
    if missing:
        words = words.replace("every batch size", "every batch size that has one")
        words += f" (none at batch {', '.join(missing)})"
    factors = [a.factor for a in chosen if a.factor is not None and a.over is not a.cell]
    if factors:
        low, high = f"{min(factors):,.2f}", f"{max(factors):,.2f}"
        words += f", {low if low == high else f'{low} to {high}'} times as fast as PyTorch eager in fp32"
    if not any(a.over for a in chosen):
        words += ". PyTorch eager in fp32 was not measured, so there is no speed-up to tell"
    return words + "."


def _card(results: Results, answer: BestCell) -> Card | None:
    cell, after = answer.cell, answer.runner_up
    if cell is None or cell.parity is None:
        return None
    own = answer.over is cell
    factor = "" if own else speedup_text(answer.factor) if answer.factor else ""
    gain = "PyTorch eager itself" if own else "as fast as PyTorch eager" if factor else ""
    next_best = f"next: {series_name(results, after)}, {number_text(after.p50_ms)} ms" if after else ""
    return Card(
        cell.batch,
        series_name(results, cell),
        number_text(cell.p50_ms),
        factor,
        gain,
        f"{number_text(cell.images_per_s)} images/s",
        f"error {error_text(cell.parity.relative)}, {error_text(cell.parity.tolerance)} allowed",
        next_best,
        bool(cell.warnings),
    )


def _counts(cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """How many cells there are of each kind; kinds without one are left out, but for the verified."""
    wrong = sum(c.parity is not None and not c.parity.passed for c in cells)
    counts = [
        ("verified", sum(c.valid for c in cells)),
        ("with wrong outputs", wrong),
        ("failed", sum(c.status == "failed" for c in cells)),
        ("not held against the reference", sum(c.status == "ok" and c.parity is None for c in cells)),
        ("disturbed", sum(bool(c.warnings) for c in cells)),
    ]
    return [(name, count) for name, count in counts if count or name == "verified"]


def _method(results: Results) -> list[tuple[str, str]]:
    settings = results.settings

    def listed(values: Sequence[Any]) -> str:
        return ", ".join("the runtime's own" if v is None else str(v) for v in values) or NONE

    return [
        ("Command", plain_text(results.command)),
        ("Measured", results.created.replace("T", " ").replace("Z", " UTC")),
        (
            "Rounds",
            f"{results.rounds}, each through every cell, in an order shuffled with seed {settings.seed}",
        ),
        ("Budget", f"{number_text(settings.budget_s)} s"),
        ("Batches", listed(settings.batches)),
        ("Threads", listed(settings.threads)),
        ("Callers at the same time", listed(settings.concurrency)),
        *((f"Bundle {plain_text(s.name)}", _bundle(s)) for s in results.subjects),
    ]


def _bundle(subject: MeasuredBundle) -> str:
    size, digest = size_name(subject.image_size), subject.digest
    return plain_text(f"{subject.model}, {size}, {subject.parameters:,} parameters, {digest}")
