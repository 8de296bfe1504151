"""``vitdeploy bench``: speed, parity and accuracy of everything a bundle can run here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vitdeploy.cli import output, parse, summary
from vitdeploy.cli.interruption import Interrupted
from vitdeploy.config import size_name
from vitdeploy.errors import ParityError, RegressionError, UsageError, VitdeployError

if TYPE_CHECKING:
    from vitdeploy.benchmark.compare import ResultsComparison
    from vitdeploy.benchmark.ranking import Goal
    from vitdeploy.benchmark.results import Results
    from vitdeploy.benchmark.tables import Table
    from vitdeploy.bundle.manifest import Choice

SUMMARY = "Measure a bundle's speed, parity and accuracy on this machine."
EXAMPLES = (
    "vitdeploy bench vit.bundle",
    "vitdeploy bench vit.bundle --backend onnxruntime,openvino --batch 1,8 --threads 2",
    "vitdeploy bench vit.bundle --budget 5m -o results.json --html report.html",
    "vitdeploy bench vit.bundle --pick throughput --max-latency-ms 100",
    "vitdeploy bench vit.bundle --compare results.json --tolerance 5%",
    "vitdeploy bench vit.bundle resnet50.bundle --concurrency 1,4 --data photos/",
    "vitdeploy bench sizes.bundle --image-size 224,384 --artifact fp32 --batch 1",
)


@dataclass(frozen=True)
class _Files:
    """Where the results go besides the terminal."""

    results: Path | None
    csv: Path | None
    markdown: Path | None
    html: Path | None

    def require_writable(self) -> None:
        """Find out before the measurement what would fail after it."""
        from vitdeploy.benchmark.results import require_writable

        require_writable(self._named)
        if self.html is not None:
            from vitdeploy.benchmark.report import require_libraries

            require_libraries()

    def write(self, results: Results, comparison: ResultsComparison | None) -> None:
        from vitdeploy.benchmark.results import write_whole
        from vitdeploy.benchmark.views import comparison_markdown, csv_text, markdown_text

        if self.results is not None:
            write_whole(self.results, json.dumps(results.as_dict(), indent=2, allow_nan=False) + "\n")
        if self.csv is not None:
            write_whole(self.csv, csv_text(results))
        if self.markdown is not None:
            before = f"{comparison_markdown(comparison)}\n" if comparison else ""
            write_whole(self.markdown, before + markdown_text(results))
        if self.html is not None:
            from vitdeploy.benchmark.report import html_text

            write_whole(self.html, html_text(results, comparison))
        for path in self._named:
            output.note(f"  wrote {path}")

    @property
    def _named(self) -> list[Path]:
        return [path for path in (self.results, self.csv, self.markdown, self.html) if path is not None]


def command(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE...", help="Bundles to measure in the same rounds.", show_default=False
        ),
    ],
    backend: Annotated[
        str | None, typer.Option(metavar="B,...", help="Backends to measure.  [default: all that run here]")
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(metavar="A,...", help="Artifacts to measure, by name or by precision.  [default: all]"),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW,...", help="Image sizes to measure, of bundles with several.  [default: all]"
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Batch sizes to measure.  [default: 1,8,32, as far as served]"),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Numbers of CPU threads to compare.  [default: each runtime's own; for --pick throughput "
            "what shares out the processors]",
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Numbers of callers at the same time to compare.  [default: 1; for --pick throughput what "
            "shares out the processors]",
        ),
    ] = None,
    spin: Annotated[
        str,
        typer.Option(
            metavar="off,on",
            help="Whether ONNX Runtime's threads keep cores busy while they wait; both to compare.",
        ),
    ] = "off",
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="ONNX Runtime's execution provider: cpu, cuda, tensorrt, tensorrt-rtx."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="D", help="Device of backends that have the choice: cpu, cuda, cuda:N."),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for warming up and measuring: 90s, 5m.")
    ] = "60s",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images to measure accuracy on: DIR/<label>/*.jpg."),
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            metavar="latency|throughput",
            help="Goal by which to choose what this machine runs; the bundle keeps the choice.",
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Longest 99th percentile that --pick accepts.", min=0.0)
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.json", help="Earlier results to compare with; the exit code is 6 if slower."
        ),
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="P%", help="Change that --compare still calls the same.")
    ] = "5%",
    results: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write the results to, as JSON."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write a row per cell to, as CSV.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write the tables to, as Markdown.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write a report for people to, as HTML.")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the order of cells within rounds.", min=0)
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ] = False,
) -> int:
    """Measure in interleaved rounds, with parity and accuracy beside every speed.

    A cell whose outputs are not the reference's is shown struck through, takes part in no ranking, and
    makes the exit code 5. Ctrl-C keeps what was measured.
    """
    from vitdeploy.benchmark.cases import Choices
    from vitdeploy.benchmark.compare import compare_results
    from vitdeploy.benchmark.results import read_results
    from vitdeploy.benchmark.run import run_bench
    from vitdeploy.machine.processors import cores, processors, shares

    sweeps = pick == "throughput" and threads is None and concurrency is None
    choices = Choices(
        backends=parse.backends(backend, provider),
        artifacts=parse.names(artifact),
        image_sizes=parse.image_sizes(image_size) or None,
        batches=None if batch is None else parse.integers(batch, "--batch"),
        threads=(None,) if threads is None else parse.integers(threads, "--threads"),
        concurrency=(1,) if concurrency is None else parse.integers(concurrency, "--concurrency"),
        shares=shares(processors(), cores()) if sweeps else (),
        provider=provider,
        device=device,
        spin=_spin(spin),
    )
    seconds, goal = parse.duration(budget), _goal(pick, max_latency_ms)
    old = None if compare is None else read_results(compare)
    share = parse.percentage(tolerance, "--tolerance")
    files = _Files(results, csv, markdown, html)
    files.require_writable()
    with output.Stages() as stages, output.stdout_is_ours():
        measured = run_bench(
            bundles,
            choices,
            data=data,
            budget=seconds,
            seed=seed,
            command=parse.command_line(),
            progress=stages,
        )
    comparison = None if old is None else compare_results(measured, old, share)
    files.write(measured, comparison)
    problem, picked = _problem(measured, comparison), list[tuple[Path, "Choice"]]()
    if goal is not None and not measured.partial:
        try:
            picked = _pick(measured, bundles, goal, max_latency_ms)
        except VitdeployError as error:
            problem = problem or error
    if as_json:
        output.json_document(_document(measured, comparison, picked, problem))
    else:
        _print(measured)
        _print_verdicts(comparison, picked)
    if measured.partial:
        raise Interrupted
    if problem is None:
        return 0
    output.error(problem.message, problem.hint)
    return problem.exit_code


def _spin(text: str) -> tuple[bool, ...]:
    words = dict.fromkeys(parse.names(text) or ())
    if wrong := [word for word in words if word not in ("off", "on")]:
        raise UsageError(f"--spin {wrong[0]}: neither off nor on", hint="--spin off,on compares both")
    return tuple(word == "on" for word in words)


def _goal(pick: str | None, max_latency_ms: float | None) -> Goal | None:
    if pick not in (None, "latency", "throughput"):
        raise UsageError(f"--pick {pick}: not a goal", hint="--pick latency, or --pick throughput")
    if max_latency_ms is not None and pick is None:
        raise UsageError("--max-latency-ms goes with --pick", hint="add --pick throughput")
    return cast("Goal | None", pick)


def _pick(
    results: Results, bundles: list[Path], goal: Goal, limit: float | None
) -> list[tuple[Path, Choice]]:
    """Choose for every bundle, at each of its image sizes that was measured, then write the choices."""
    from vitdeploy.benchmark.ranking import choice_of, pick
    from vitdeploy.bundle.choices import write_choices
    from vitdeploy.bundle.folder import Bundle

    chosen = []
    names = list(dict.fromkeys(subject.name for subject in results.subjects))
    for path, name in zip(bundles, names, strict=True):
        first = Bundle.open(path).sizes[:1]
        for size in (subject.image_size for subject in results.subjects if subject.name == name):
            cell = pick(results, name, goal, limit, size)
            place = None if first in ((), (size,)) else size
            chosen.append((path, choice_of(cell, results, goal, limit, place)))
    for path in bundles:
        write_choices(Bundle.open(path), *(choice for place, choice in chosen if place == path))
    return chosen


def _problem(results: Results, comparison: ResultsComparison | None) -> VitdeployError | None:
    """Wrong outputs come before slow ones."""
    wrong = [cell for cell in results.cells if cell.parity is not None and not cell.parity.passed]
    if wrong:
        first = wrong[0]
        why = first.parity.failures[0] if first.parity and first.parity.failures else "wrong outputs"
        return ParityError(
            f"{len(wrong)} of {len(results.cells)} cells failed parity: "
            f"{first.label} at batch {first.batch}: {why}"
        )
    if comparison is not None and comparison.slower:
        row = comparison.slower[0]
        return RegressionError(
            f"{len(comparison.slower)} cells are slower: {row.label} at batch {row.batch}: "
            f"{row.ratio:.2f} x the old time"
        )
    return None


def _document(
    results: Results,
    comparison: ResultsComparison | None,
    picked: list[tuple[Path, Choice]],
    problem: VitdeployError | None,
) -> dict[str, Any]:
    document: dict[str, Any] = {"ok": problem is None and not results.partial, **results.as_dict()}
    if comparison is not None:
        document["comparison"] = comparison.model_dump(mode="json")
    if problem is not None:
        document["error"] = problem.as_dict()
    if picked:
        document["picked"] = [{"bundle": str(path), **c.model_dump(mode="json")} for path, c in picked]
    return document


def _print(results: Results) -> None:
    from vitdeploy.benchmark import tables

    several = len(results.subjects) > 1
    _print_table(tables.side_by_side(results) if several else tables.summary(results))
    output.line(f"{results.rounds} interleaved rounds; error: relative to the float64 reference")
    for cell in results.cells:
        if cell.warnings:
            where = f"{cell.subject} at {size_name(cell.image_size)}: " if several else ""
            output.line(f"disturbed: {where}{cell.label}, batch {cell.batch}: {'; '.join(cell.warnings)}")
    for text in results.notes:
        output.line(f"note: {text}")
    for skipped in results.skipped:
        output.line(f"not run: {skipped.artifact} on {skipped.backend}: {skipped.reason}")
    if results.partial:
        output.line("PARTIAL: interrupted before the budget was spent")


def _print_table(table: Table) -> None:
    """A table on the terminal, with what is said of its rows in a last column."""
    noted = any(row.note for row in table.rows)
    columns = [f"{'' if column.words else '>'}{column.title}" for column in table.columns]
    rows = [[*map(str, row.entries), *([row.note] if noted else [])] for row in table.rows]
    styles = ["strike red" if row.kind in ("wrong", "failed") else "" for row in table.rows]
    output.table([*columns, *([""] if noted else [])], rows, styles)


def _print_verdicts(comparison: ResultsComparison | None, picked: list[tuple[Path, Choice]]) -> None:
    if comparison is not None:
        from vitdeploy.benchmark.tables import compared_table

        output.heading(f"Compared, tolerance {comparison.tolerance:.0%}: {comparison.summary}")
        _print_table(compared_table(comparison.rows))
    for path, choice in picked:
        output.line(f"picked {summary.choice_line(choice)}; in {path}")
