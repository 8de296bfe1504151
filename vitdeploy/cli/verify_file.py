"""``vitdeploy verify FILE -m CHECKPOINT``: somebody else's artifact, held against its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitdeploy.cli import output, summary

if TYPE_CHECKING:
    from vitdeploy.verification.foreign.report import ForeignReport


def verify_file(
    path: Path,
    model: str | None,
    checkpoint: Path | None,
    *,
    batches: tuple[int, ...] | None,
    data: Path | None,
    max_drop: float | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Verify a file and print what came out."""
    import vitdeploy

    with output.Stages() as stages, output.stdout_is_ours():
        report = vitdeploy.verify(
            path,
            model=model,
            checkpoint=checkpoint,
            batches=batches,
            data=data,
            max_drop=max_drop,
            threads=threads,
            progress=stages,
        )
    if as_json:
        return summary.json_verdict(report)
    _print(report)
    report.check()
    return 0


def _print(report: ForeignReport) -> None:
    if report.parity:
        summary.print_parity(report.parity)
    if report.accuracy:
        summary.print_accuracy(report.accuracy)
    made = [finding for finding in report.findings if finding.state != "not checked"]
    if made:
        output.heading(f"held against {report.checkpoint}")
        several = len(report.files) > 1
        rows = [(f.file, f.check, "ok" if f.state == "held" else "FAILED", f.detail) for f in made]
        columns = ("file", "check", "", "what")
        output.table(columns[not several :], [row[not several :] for row in rows])
    output.line()
    for finding in report.unchecked:
        output.line(f"not checked: {finding.file}: {finding.check}: {finding.detail}")
    for text in report.notes:
        output.line(f"note: {text}")
    if report.passed:
        held = output.count(len(made), "check")
        left = f", {len(report.unchecked)} not made" if report.unchecked else ""
        unproven = f"; quantised, so not proven: {', '.join(report.unproven)}" if report.unproven else ""
        output.line(f"{report.path}: against {report.checkpoint}: {held} held{left}{unproven}")
