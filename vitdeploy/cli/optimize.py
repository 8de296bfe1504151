"""``vitdeploy optimize``: what is fastest and right on this machine, built, proven, measured and chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vitdeploy.cli import export, output, parse, summary
from vitdeploy.cli.interruption import Interrupted

if TYPE_CHECKING:
    from vitdeploy.benchmark.ranking import Goal
    from vitdeploy.optimiser.run import Optimised

SUMMARY = "Build, prove and measure what could win on this machine; keep the winner."
EXAMPLES = (
    "vitdeploy optimize -m ./my-finetuned-vit -o vit.bundle",
    "vitdeploy optimize -m B/16 --checkpoint weights.safetensors --goal throughput --batch 16",
    "vitdeploy optimize -m ./my-finetuned-vit --calibration images/",
    "vitdeploy optimize -m ./my-finetuned-vit --data photos/ --max-drop 0.5 --budget 5m",
    "vitdeploy optimize -m digits --explain-choice",
)


def command(
    model: export.Model = None,
    checkpoint: export.Checkpoint = None,
    output_dir: export.OutputDir = None,
    goal: Annotated[
        str,
        typer.Option(
            metavar="latency|throughput",
            help="What to be best at: the time of a batch, or images per second with all processors at work.",
        ),
    ] = "latency",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images that are computed together.  [default: 1 for latency, 8 for throughput]",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|BUNDLE",
            help="Images for int8, which else does not take part: a folder with 48 or more typical ones, at "
            "least 8, no labels; or a quantised bundle of the same model.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images to measure accuracy on: DIR/<label>/*.jpg."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="P", help="Refuse what loses more than P points of top-1 on --data."),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(metavar="TIME", help="Time for measuring: 90s, 5m. Building and proving come on top."),
    ] = "2m",
    backend: Annotated[
        str | None,
        typer.Option(metavar="B,...", help="Backends to try.  [default: those that could win here]"),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="N|HxW", help="Height and width in pixels.  [default: the checkpoint's own]"),
    ] = None,
    input: export.Input = "float",
    output_kind: export.Output = None,
    labels: export.Labels = None,
    preprocess: export.PreprocessKind = None,
    heads: export.Heads = None,
    revision: export.Revision = None,
    cache_dir: export.CacheDir = None,
    seed: export.Seed = 0,
    random: export.Random = False,
    force: export.Force = False,
    explain: Annotated[
        bool, typer.Option("--explain-choice", help="Show everything that was tried, and why it lost.")
    ] = False,
    as_json: export.Json = False,
) -> None:
    """Make a bundle that holds the fp32 artifact, and what is fastest and right on this machine.

    Builds every precision that this machine computes in, and measures it on each runtime that is installed,
    with several numbers of threads and sessions: a first look at each, then the best of them in interleaved
    rounds. Wrong outputs never win. `predict` and `serve` run what was chosen. What was tried, and why it
    lost, stays in the bundle: `vitdeploy inspect BUNDLE --explain-choice`.
    """
    from vitdeploy.exporter import exporting

    with exporting("optimize"):
        from vitdeploy.checkpoint.stated import Stated
        from vitdeploy.exporter.request import ExportRequest
        from vitdeploy.optimiser.run import Aim, run_optimise

    export.refuse_bundle(model, "`vitdeploy bench {bundle} --pick latency` chooses among what it holds")
    sizes = parse.image_sizes(image_size)
    aim = Aim(
        goal=cast("Goal", goal),  # which Aim checks
        batch=batch,
        data=data,
        max_drop=max_drop,
        budget=parse.duration(budget),
        backends=parse.names(backend),
        seed=seed,
    )
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        image_size=next(iter(sizes), None),
        further_sizes=sizes[1:],
        input=input,
        output=output_kind,
        stated=Stated(labels=labels, preprocess=preprocess, heads=heads),
        revision=revision,
        cache_dir=cache_dir,
        calibration=calibration,
        precisions=("fp32",) if calibration is None else ("fp32", "int8"),
        seed=seed,
        random=random,
        command=parse.command_line(),
    )
    with output.Stages() as stages, output.stdout_is_ours():
        try:
            found = run_optimise(request, aim, output_dir, force=force, progress=stages)
        except KeyboardInterrupt as error:  # what was measured until then says nothing
            raise Interrupted from error
    where = output_dir or Path(found.bundle.root.name)
    if as_json:
        document = summary.bundle_dict(found.bundle, where, stages)
        choice, record = (part.model_dump(mode="json") for part in (found.choice, found.record))
        return output.json_document({**document, "choice": choice, "optimisation": record})
    return _print(found, where, explain)


def _print(found: Optimised, where: Path, explain: bool) -> None:
    output.heading(f"{where}")
    summary.print_artifacts(found.bundle.manifest)
    output.heading("chosen")
    output.line(f"  {summary.choice_line(found.choice)}")
    summary.print_optimisation(found.record, whole=explain)
    if not explain:
        output.line("  --explain-choice, of this command and of inspect, shows everything that was tried")
