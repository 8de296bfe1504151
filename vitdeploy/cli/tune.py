"""``vitdeploy tune``: the fastest kernel configurations for this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitdeploy.cli import output, parse

SUMMARY = "Find the fused kernels' fastest configurations for this GPU."
EXAMPLES = (
    "vitdeploy tune vit.bundle",
    "vitdeploy tune vit.bundle --batch 1,32 --budget 2m",
    "vitdeploy tune vit.bundle --precision bf16 -o tables/",
)


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The bundle to tune for.", show_default=False)
    ],
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Batch sizes to tune for.  [default: the artifacts' buckets]"),
    ] = None,
    precision: Annotated[str, typer.Option(metavar="P", help="Precision to tune in: fp16 or bf16.")] = "fp16",
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for the whole search, as 90s or 5m.")
    ] = "4m",
    folder: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output-dir", metavar="DIR", help="Folder to write the table into.  [default: the bundle]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Search the configurations of every kernel at the bundle's shapes, on this machine's GPU.

    Each candidate is compared with float64 before it is timed. The table goes into the bundle, and the
    triton backend uses it on GPUs of the same name; what the time does not suffice for keeps its default.
    """
    from vitdeploy.backends.triton_tuning import tune_bundle

    sizes = parse.integers(batch, "--batch") if batch is not None else None
    seconds = parse.duration(budget)
    with output.Stages() as stages, output.stdout_is_ours():
        report = tune_bundle(
            bundle, batches=sizes, precision=precision, budget=seconds, folder=folder, progress=stages
        )
    if as_json:
        output.json_document(report.as_dict())
        return
    for text in report.lines:
        output.line(text)
    output.line(f"{report.table}: {report.tuned} of {report.shapes} shapes tuned on {report.gpu}")
