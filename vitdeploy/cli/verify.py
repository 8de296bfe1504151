"""``vitdeploy verify``: prove a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output, parse, summary
from vitdeploy.errors import ParityError

if TYPE_CHECKING:
    from vitdeploy.verification import VerifyReport

SUMMARY = "Prove a bundle on this machine."
EXAMPLES = (
    "vitdeploy verify vit.bundle",
    "vitdeploy verify vit.bundle --backend onnxruntime,openvino --batch 1,8",
    "vitdeploy verify vit.bundle --backend triton",
    "vitdeploy verify vit.bundle --data held_out/ --json",
)


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.", show_default=False)],
    backend: Annotated[
        str | None, typer.Option(metavar="B,...", help="Backends.  [default: all here that run artifacts]")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,...", help="Batch sizes.  [default: each artifact's MIN,OPT,MAX]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images: LABEL/*.png or LABEL_*.png; adds accuracy."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    provider: Annotated[
        str | None, typer.Option(metavar="P", help="ONNX Runtime's: cpu, cuda, tensorrt, tensorrt-rtx.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> int:
    """Prove a bundle on this machine; exit with 5 if anything does not hold.

    Checks every byte, the preprocessing, and every artifact on every backend against the float64
    reference. An artifact that no backend here can run is not proven, and fails too; with --backend,
    what the named ones cannot run is only listed.
    """
    from vitdeploy.backends.base import Options
    from vitdeploy.verification import verify_bundle

    named = parse.backends(backend, provider)
    sizes = parse.integers(batch, "--batch") if batch is not None else None
    options = Options(threads=threads, provider=provider)
    with output.Stages() as stages, output.stdout_is_ours():
        report = verify_bundle(
            bundle, backends=named, batches=sizes, data=data, options=options, progress=stages
        )
    if not as_json:
        _print(report)
        report.check()
        return 0
    document = report.as_dict()
    try:
        report.check()
    except ParityError as error:
        document["error"] = error.as_dict()
        output.error(error.message, error.hint)
    output.json_document(document)
    return 0 if report.passed else ParityError.exit_code


def _print(report: VerifyReport) -> None:
    summary.print_parity(report.parity)
    for skipped in report.skipped:
        output.line(f"not run: {skipped.artifact} on {skipped.backend}: {skipped.reason}")
    if report.accuracy:
        output.heading(f"accuracy on {report.accuracy[0].images} images")
        rows = [
            (a.model, a.backend, f"{100 * a.correct / a.images:.2f} %", f"{a.agree}/{a.images}")
            for a in report.accuracy
        ]
        output.table(("model", "backend", ">accuracy", ">as the reference"), rows)
    for fusion in report.fusion:
        output.heading(f"fusion of {fusion.artifact} on {fusion.backend}")
        for text in fusion.lines:
            output.line(text)
    for text in report.notes:
        output.line(f"note: {text}")
    if report.passed:
        compared = f"{len(report.parity)} comparisons"
        output.line()
        if report.unproven:
            output.line(f"not proven, as no named backend runs it: {', '.join(report.unproven)}")
        output.line(
            f"{report.bundle}: proven: {report.files} files intact, preprocessing equal, {compared} passed"
        )
