"""``vitdeploy engine``: TensorRT engines for a bundle that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitdeploy.cli import output, parse, summary

SUMMARY = "Add TensorRT engines to a bundle, proven."
EXAMPLES = (
    "vitdeploy engine vit.bundle --format tensorrt-rtx --arch sm_89,sm_120",
    "vitdeploy engine vit.bundle --format tensorrt-rtx --arch sm_80+sm_89 --precision fp16",
    "vitdeploy engine vit.bundle --format tensorrt --profile 1,1,1 --profile 2,8,64",
    "vitdeploy engine vit.bundle --format tensorrt --opt-level 5 --workspace 4G --force",
    "vitdeploy engine vit.bundle --format tensorrt --hardware-compat ampere_plus --weights stripped",
)


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle with ONNX artifacts.", show_default=False)
    ],
    format: Annotated[
        str,
        typer.Option(
            metavar="F,...",
            help="tensorrt, for the GPU of this machine; tensorrt-rtx, for the GPUs of --arch; auto, each "
            "that can be built here.",
        ),
    ] = "auto",
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="A,...",
            help="GPUs that tensorrt-rtx builds for: sm_89,sm_120; sm_80+sm_89 is one engine for both.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P,...", help="Precisions of the ONNX artifacts to build from.  [default: all of them]"
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Batch sizes of an optimization profile; may be repeated.  [default: the artifact's]",
        ),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="BYTES", help="GPU memory that one kernel may use: 512M, 4G.")
    ] = None,
    opt_level: Annotated[
        int | None,
        typer.Option(metavar="0..5", help="How long the builder searches for faster kernels."),
    ] = None,
    timing_cache: Annotated[
        bool,
        typer.Option(
            "--timing-cache/--no-timing-cache",
            help="Keep the timings of kernels for the next build (tensorrt).",
        ),
    ] = True,
    hardware_compat: Annotated[
        str,
        typer.Option(
            metavar="none|ampere_plus|same_compute_capability",
            help="Other GPUs that the engine runs on, at some cost in speed (tensorrt).",
        ),
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions load the engine (tensorrt).")
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            metavar="full|refit|stripped",
            help="full; refit, weights that can be replaced; stripped, weights taken from the ONNX file "
            "when the engine is loaded.",
        ),
    ] = "full",
    force: Annotated[bool, typer.Option("--force", help="Replace engines of the same name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Build TensorRT engines from a bundle's ONNX artifacts, prove them, and add them to the bundle.

    The dtype of every GEMM is read back from what TensorRT has parsed, and engines that run on this
    machine are held against the float64 reference. Anything that fails, or is interrupted, leaves the
    bundle as it was. Needs no PyTorch.
    """
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.exporter.request import EngineRequest
    from vitdeploy.exporter.tensorrt import add_engines
    from vitdeploy.tensorrt.records import BuildSettings

    request = EngineRequest(
        formats=parse.names(format) or (),
        architectures=parse.names(arch) or (),
        profiles=parse.profiles(profile),
        settings=BuildSettings.of(
            workspace=parse.byte_count(workspace, "--workspace"),
            level=opt_level,
            timing_cache=timing_cache,
            hardware=hardware_compat,
            version_compatible=version_compatible,
            weights=weights,
        ),
        precisions=parse.names(precision) or (),
    )
    with output.Stages() as stages, output.stdout_is_ours():
        extended = add_engines(Bundle.open(bundle), request, force=force, progress=stages)
    summary.show_bundle(extended, bundle, stages, as_json)
