"""``vitdeploy bench``: latency of everything a bundle can run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output, parse
from vitdeploy.errors import UsageError

if TYPE_CHECKING:
    from vitdeploy.bench.measure import BenchReport

SUMMARY = "Measure a bundle's latency on this machine."
EXAMPLES = (
    "vitdeploy bench vit.bundle",
    "vitdeploy bench vit.bundle --backend onnxruntime,openvino --batch 1,8 --threads 2",
    "vitdeploy bench vit.bundle --budget 5m -o results.json",
)


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.", show_default=False)],
    backend: Annotated[
        str | None, typer.Option(metavar="B,...", help="Backends.  [default: all that run here]")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,8,32",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    provider: Annotated[
        str | None, typer.Option(metavar="P", help="ONNX Runtime's: cpu, cuda, tensorrt, tensorrt-rtx.")
    ] = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="For the whole measurement: 90s, 5m.")] = "60s",
    results: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write results.json here too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure latency in interleaved rounds, with the error against the reference beside it."""
    from vitdeploy.backends.base import Options
    from vitdeploy.bench.measure import run_bench

    named = parse.backends(backend, provider)
    sizes, seconds = parse.integers(batch, "--batch"), parse.duration(budget)
    options = Options(threads=threads, provider=provider)
    if results is not None and not results.parent.is_dir():
        raise UsageError(f"-o {results}: the folder {results.parent} does not exist")
    with output.Stages() as stages, output.stdout_is_ours():
        report = run_bench(
            bundle, backends=named, batches=sizes, options=options, budget=seconds, progress=stages
        )
    document = {"ok": True, **report.as_dict()}
    if results is not None:
        _write(results, document)
    if as_json:
        output.json_document(document)
    else:
        _print(report)


def _write(path: Path, document: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written: {error.strerror}") from error


def _print(report: BenchReport) -> None:
    rows = [
        (
            cell.backend,
            cell.artifact,
            str(cell.batch),
            f"{cell.p50_ms:.2f}",
            f"{cell.p90_ms:.2f}",
            f"{cell.p99_ms:.2f}",
            f"{cell.mean_ms:.2f}",
            f"{cell.images_per_s:.1f}",
            output.small(cell.parity["relative"]),
        )
        for cell in report.cells
    ]
    columns = ("backend", "artifact", ">batch", ">p50 ms", ">p90 ms", ">p99 ms", ">mean ms", ">images/s")
    output.table((*columns, ">error"), rows)
    output.line(f"{report.rounds} interleaved rounds; error: relative to the float64 reference")
    for text in report.skipped:
        output.line(f"not run: {text}")
