"""``vitdeploy export``: a model becomes a bundle."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output, parse, summary

if TYPE_CHECKING:
    from vitdeploy.bundle import Bundle
    from vitdeploy.export.plan import ExportPlan
    from vitdeploy.export.request import ExportRequest

SUMMARY = "A model becomes a bundle, every artifact proven."
EXAMPLES = (
    "vitdeploy export -m ./my-finetuned-vit -o vit.bundle --fp32 --fp16",
    "vitdeploy export -m B/16 --checkpoint weights.safetensors --image-size 384",
    "vitdeploy export -m digits --batch 8 --input uint8",
    "vitdeploy export -m B/16 --fp16 --format onnx,triton-aot --arch sm_89,sm_90",
    "vitdeploy export -m my_models:build --image-size 224x320 --dry-run",
)


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A named variant (vit_base_patch16_224, B/16, digits), a transformers folder or hub id, "
        "timm:NAME, or module:function.  [default: vit_base_patch16_224]",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Weights of a named variant: a file or folder.")
]
OutputDir = Annotated[
    Path | None,
    typer.Option("-o", "--output-dir", metavar="DIR", help="The bundle.  [default: ./MODEL.bundle]"),
]
Format = Annotated[
    str,
    typer.Option(
        metavar="F,...",
        help="onnx; triton-aot: the fused kernels, compiled for --arch; auto: all that needs no choice.",
    ),
]
Arch = Annotated[
    str | None, typer.Option(metavar="A,...", help="GPUs to compile triton-aot for: sm_80, sm_89, sm_90, ...")
]
Fp32 = Annotated[bool, typer.Option("--fp32", help="Add an fp32 artifact; the default.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Add an fp16 artifact.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Add a bf16 artifact.")]
Precisions = Annotated[str | None, typer.Option(metavar="P,...", help="The same, as a list: fp32,fp16,bf16.")]
ImageSize = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Pixels; the checkpoint's own when omitted.")
]
Batch = Annotated[
    str, typer.Option(metavar="MIN,OPT,MAX|N", help="Batch sizes to serve; one number fixes it.")
]
Opset = Annotated[int, typer.Option(metavar="N", help="ONNX operator set, 17 to 23.")]
Input = Annotated[
    str,
    typer.Option(
        metavar="float|uint8",
        help="float: (N,3,H,W) pixel values; uint8: (N,H,W,3) images, normalisation folded in.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="logits|features|tokens",
        help="What the artifacts return.  [default: logits where there is a head]",
    ),
]
Atol = Annotated[
    float | None, typer.Option(metavar="X", help="An absolute tolerance on top of the built-in ones.")
]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="Fail where a precision needs fp32 islands to pass.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of random weights.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be built; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def command(
    model: Model = None,
    checkpoint: Checkpoint = None,
    output_dir: OutputDir = None,
    format: Format = "auto",
    arch: Arch = None,
    fp32: Fp32 = False,
    fp16: Fp16 = False,
    bf16: Bf16 = False,
    precision: Precisions = None,
    image_size: ImageSize = None,
    batch: Batch = "1,8,32",
    opset: Opset = 20,
    input: Input = "float",
    output_kind: Output = None,
    atol: Atol = None,
    no_fallback: NoFallback = False,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Export a model into a bundle and prove every artifact against its float64 reference.

    Without a checkpoint a named variant has seeded random weights. Precisions add up: --fp32 --fp16
    builds both. Anything that fails, or is interrupted, leaves nothing behind.
    """
    flags = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("bf16", bf16)) if given]
    precisions = (*flags, *(parse.names(precision) or ())) or ("fp32",)
    sizes, pixels = parse.batch_range(batch), parse.image_size(image_size)
    formats = parse.names(format) or ()
    from vitdeploy.export import exporting

    with exporting():
        from vitdeploy.export.request import ExportRequest

    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        precisions=tuple(dict.fromkeys(precisions)),
        formats=formats,
        architectures=tuple(dict.fromkeys(parse.names(arch) or ())),
        image_size=pixels,
        batch=sizes,
        opset=opset,
        input=input,
        output=output_kind,
        atol=atol,
        fallback=not no_fallback,
        seed=seed,
        command=_command_line(),
    )
    if dry_run:
        _dry_run(request, output_dir, force, as_json)
    else:
        _export(request, output_dir, force, as_json)


def _command_line() -> str:
    return shlex.join(["vitdeploy", *sys.argv[1:]])


def _export(request: ExportRequest, folder: Path | None, force: bool, as_json: bool) -> None:
    from vitdeploy.export.run import run_export

    with output.Stages() as stages, output.stdout_is_ours():
        bundle = run_export(request, folder, force=force, progress=stages)
    where = folder or Path(bundle.root.name)
    if as_json:
        manifest = bundle.manifest
        output.json_document(
            {
                "ok": True,
                "bundle": str(where),
                "artifacts": [summary.artifact_dict(manifest, artifact) for artifact in manifest.artifacts],
                "rewrites": [rewrite.model_dump(mode="json") for rewrite in manifest.rewrites],
                "parity": [record.model_dump(mode="json") for record in manifest.parity],
                "stages": stages.as_list(),
                "notes": stages.notes,
            }
        )
    else:
        _print_bundle(bundle, where)


def _print_bundle(bundle: Bundle, where: Path) -> None:
    output.heading(f"{where}")
    summary.print_artifacts(bundle.manifest)
    summary.print_rewrites(bundle.manifest.rewrites, bundle.manifest.flops)
    summary.print_proofs(bundle.manifest)
    output.heading("next")
    folder = shlex.quote(str(where))
    output.line(f"  vitdeploy verify {folder}")
    if bundle.manifest.output == "logits":
        output.line(f"  vitdeploy predict {folder} IMAGE")
    output.line(f"  vitdeploy bench {folder}")


def _dry_run(request: ExportRequest, folder: Path | None, force: bool, as_json: bool) -> None:
    from vitdeploy.export.plan import plan_export

    with output.stdout_is_ours():
        plan = plan_export(request, folder, force=force)
    if as_json:
        output.json_document({"ok": True, "dry_run": True, **plan.as_dict()})
    else:
        _print_plan(plan)


def _print_plan(plan: ExportPlan) -> None:
    for text in plan.notes:
        output.note(f"  note: {text}")
    output.facts(
        [
            ("model", plan.source),
            ("parameters", f"{plan.parameters / 1e6:.1f} M"),
            ("compute", "-" if plan.flops is None else f"{output.flops(plan.flops)} per image"),
            ("input", plan.input),
            ("output", plan.output),
            ("bundle", plan.folder),
        ]
    )
    for name, value in plan.config.items():
        output.line(f"  {name:<22} {value}")
    summary.print_rewrites(plan.rewrites, plan.flops)
    output.heading("would write")
    output.table(("file", ">size, about"), [(name, output.size(count)) for name, count in plan.files.items()])
