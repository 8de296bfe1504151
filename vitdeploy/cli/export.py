"""``vitdeploy export``: a model becomes a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vitdeploy.cli import output, parse, summary
from vitdeploy.errors import UsageError

if TYPE_CHECKING:
    from vitdeploy.config import Scores
    from vitdeploy.exporter.plan import ExportPlan
    from vitdeploy.exporter.request import ExportRequest

SUMMARY = "A model becomes a bundle, every artifact proven."
EXAMPLES = (
    "vitdeploy export -m ./my-finetuned-vit -o vit.bundle --fp32 --fp16",
    "vitdeploy export -m B/16 --checkpoint weights.safetensors --image-size 384",
    "vitdeploy export -m B/16 --fp16 --image-size 224,384,518x336",
    "vitdeploy export -m ./my-finetuned-vit --int8 --calibration images/",
    "vitdeploy export -m ./my-finetuned-vit --fp8 --calibration images/ --for tensorrt",
    "vitdeploy export -m digits --batch 8 --input uint8",
    "vitdeploy export -m B/16 --output logits,embedding,layers:3,7,11",
    "vitdeploy export -m B/16 --fp16 --format onnx,triton-aot --arch sm_89,sm_90",
    "vitdeploy export -m B/16 --fp16 --format tensorrt-rtx --arch sm_89,sm_120",
    "vitdeploy export -m my_models:build --image-size 224x320 --dry-run",
    "vitdeploy export -m my_models:build --preprocess imagenet --labels classes.txt",
    'vitdeploy export -m ./clip-vit-base-patch32 --zero-shot labels.txt --template "a photo of a {}"',
    "vitdeploy export -m timm:vit_small_patch16_224 --checkpoint best.pth.tar --mean 0.5 --std 0.5",
    "vitdeploy export -m torchvision:resnet50 --fp16",
)


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A named variant (vit_base_patch16_224, CLIP-B/32, digits), a transformers folder or hub id, "
        "timm:NAME, torchvision:NAME, or module:function.  [default: vit_base_patch16_224]",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="Weights of a named variant, timm:NAME or torchvision:NAME: a file or folder."
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output-dir", metavar="DIR", help="The folder of the bundle.  [default: ./MODEL.bundle]"
    ),
]
Format = Annotated[
    str,
    typer.Option(
        metavar="F,...",
        help="What to build: onnx; engines for tensorrt or tensorrt-rtx; triton-aot, the fused kernels; "
        "auto, ONNX and the engines that can be built here.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="A,...",
        help="GPUs that tensorrt-rtx and triton-aot build for: sm_89,sm_120; sm_80+sm_89 is one engine for "
        "both.",
    ),
]
Fp32 = Annotated[bool, typer.Option("--fp32", help="Add an fp32 artifact; the default.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Add an fp16 artifact.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Add a bf16 artifact.")]
Int8 = Annotated[
    bool,
    typer.Option("--int8", help="Add one whose GEMMs are in int8, beside fp32; takes --calibration."),
]
Fp8 = Annotated[bool, typer.Option("--fp8", help="The same in fp8 (E4M3), for TensorRT from sm_89 on.")]
Precisions = Annotated[
    str | None, typer.Option(metavar="P,...", help="The same as a list: fp32,fp16,bf16,int8,fp8.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR|BUNDLE",
        help="Images for --int8 and --fp8: a folder with 48 or more typical ones, at least 8, no labels; or "
        "a quantised bundle of the same model.",
    ),
]
WeightBits = Annotated[
    int,
    typer.Option(metavar="7|8", help="Bits of int8 weights: 8 are for processors with VNNI, and for GPUs."),
]
Fp8Attention = Annotated[
    bool, typer.Option("--fp8-attention", help="With --fp8, the products inside of attention, too.")
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="tensorrt",
        help="Add int8 and fp8 artifacts in the form that TensorRT builds from, in fp16 where they are not "
        "quantised.  [default: where an engine is built]",
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="N|HxW,...",
        help="Height and width in pixels; of several, the first is the default, and each image goes where it "
        "fits.  [default: the checkpoint's own]",
    ),
]
Batch = Annotated[
    str, typer.Option(metavar="MIN,OPT,MAX|N", help="Batch sizes to serve; one number fixes the batch size.")
]
Opset = Annotated[int, typer.Option(metavar="N", help="The ONNX operator set, 17 to 23.")]
Input = Annotated[
    str,
    typer.Option(
        metavar="float|uint8|patches",
        help="What the artifacts read: float, (N,C,H,W) pixel values; uint8, (N,H,W,C) images, with the "
        "normalisation folded in; patches, what Qwen's image processor gives.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="O,...",
        help="What the artifacts return: logits, features, embedding, tokens, codes; layers:3,7, the tokens "
        "behind blocks 3 and 7.  [default: logits where there is a head]",
    ),
]
ScoresKind = Annotated[
    str | None,
    typer.Option(
        "--scores",
        metavar="softmax|sigmoid|none",
        help="What becomes of logits where classes are named.  [default: as the checkpoint says]",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="The classes' names: one per line, or JSON.  [default: the checkpoint's]"
    ),
]
ZeroShotFile = Annotated[
    str | None,
    typer.Option(
        "--zero-shot",
        metavar="FILE",
        help="Make CLIP or SigLIP a classifier: of labels in a file as --labels takes it, which the "
        "checkpoint's text tower embeds; or of vectors, label to vector in .safetensors.",
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help='What is embedded for a label of --zero-shot: "a photo of a {}". Again for several, which are '
        "averaged.  [default: the label itself]",
    ),
]
PreprocessKind = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="FILE|PRESET",
        help="How images become pixel values: imagenet, inception, clip, siglip, deit or dinov2; or a "
        "preprocessor_config.json, timm's config.json, or a manifest.  [default: the checkpoint's]",
    ),
]
Mean = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="The mean to subtract, of pixels from 0 to 1.")
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="The deviation to divide by.")]
Resize = Annotated[
    str | None,
    typer.Option(
        metavar="N|HxW|exact|none",
        help="How to resize before the crop: the shorter side to N; to HxW; exactly to the model's; not.",
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(metavar="SHARE|N", help="The share of the shorter side that the crop keeps, or its pixels."),
]
ResampleKind = Annotated[
    str | None,
    typer.Option("--resample", metavar="FILTER", help="How to resize: bilinear, bicubic, lanczos, box, ..."),
]
Heads = Annotated[int | None, typer.Option(metavar="N", help="Attention heads, which no tensor tells.")]
ActivationKind = Annotated[
    str | None,
    typer.Option("--activation", metavar="NAME", help="gelu, gelu_tanh, quick_gelu, relu or silu."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Labelled images (LABEL/*.png or LABEL_*.png), on which int8 and fp8 may not lose more than a "
        "point of top-1 against fp32.",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(metavar="P", help="Leave out what is more than P points of top-1 below fp32 on --data."),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="The branch, tag or commit of a model on the hub.")
]
CacheDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where downloads are kept.")]
Atol = Annotated[
    float | None, typer.Option(metavar="X", help="An absolute tolerance on top of the built-in ones.")
]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="Fail where a precision needs fp32 islands, or does not pass.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="The seed of random weights.")]
Random = Annotated[
    bool, typer.Option("--random", help="Random weights of timm:NAME or torchvision:NAME: no download.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be built, and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def command(
    model: Model = None,
    checkpoint: Checkpoint = None,
    output_dir: OutputDir = None,
    format: Format = "auto",
    arch: Arch = None,
    fp32: Fp32 = False,
    fp16: Fp16 = False,
    bf16: Bf16 = False,
    int8: Int8 = False,
    fp8: Fp8 = False,
    precision: Precisions = None,
    calibration: Calibration = None,
    weight_bits: WeightBits = 7,
    fp8_attention: Fp8Attention = False,
    for_: For = None,
    data: Data = None,
    max_drop: MaxDrop = None,
    image_size: ImageSize = None,
    batch: Batch = "1,8,32",
    opset: Opset = 20,
    input: Input = "float",
    output_kind: Output = None,
    labels: Labels = None,
    zero_shot: ZeroShotFile = None,
    template: Template = None,
    scores: ScoresKind = None,
    preprocess: PreprocessKind = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    resample: ResampleKind = None,
    heads: Heads = None,
    activation: ActivationKind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    atol: Atol = None,
    no_fallback: NoFallback = False,
    seed: Seed = 0,
    random: Random = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Export a model into a bundle and prove every artifact against its float64 reference.

    Without a checkpoint a named variant has seeded random weights. Precisions add up: --fp32 --fp16
    builds both. Anything that fails, or is interrupted, leaves nothing behind. Engines are built with
    TensorRT's own defaults; `vitdeploy engine` adds others to a bundle.

    What --labels, --scores, --preprocess and its single settings, --heads and --activation say beats what the
    checkpoint says; `vitdeploy inspect` shows where each fact is from. A token for the hub is read from
    HF_TOKEN.
    """
    refuse_bundle(model, "`vitdeploy engine {bundle}` adds engines to it")
    named = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    flags = [name for name, given in named.items() if given]
    from vitdeploy.checkpoint.stated import Stated
    from vitdeploy.checkpoint.texts.prompts import zero_shot_of
    from vitdeploy.exporter.request import ExportRequest

    sizes = parse.image_sizes(image_size)
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        precisions=tuple(dict.fromkeys((*flags, *(parse.names(precision) or ())))) or ("fp32",),
        formats=parse.names(format) or (),
        architectures=parse.names(arch) or (),
        image_size=next(iter(sizes), None),
        further_sizes=sizes[1:],
        batch=parse.batch_range(batch),
        opset=opset,
        input=input,
        output=output_kind,
        stated=Stated(
            labels=labels,
            preprocess=preprocess,
            mean=parse.numbers(mean, "--mean"),
            std=parse.numbers(std, "--std"),
            resize=parse.resize(resize),
            crop=parse.crop(crop),
            resample=resample,
            scores=cast("Scores | None", scores),  # which Stated checks
            heads=heads,
            activation=activation,
        ),
        zero_shot=zero_shot_of(zero_shot, template or ()),
        revision=revision,
        cache_dir=cache_dir,
        atol=atol,
        calibration=calibration,
        weight_bits=weight_bits,
        fp8_attention=fp8_attention,
        target=for_,
        data=data,
        max_drop=max_drop,
        fallback=not no_fallback,
        seed=seed,
        random=random,
        command=parse.command_line(),
    )
    return (_dry_run if dry_run else _export)(request, output_dir, force, as_json)


def refuse_bundle(model: str | None, hint: str) -> None:
    """Refuse a bundle where a model is asked for.

    Args:
        hint: what may have been meant; ``{bundle}`` in it is the bundle.

    Raises:
        UsageError: ``--model`` names one.
    """
    from vitdeploy.bundle.manifest import MANIFEST

    if model is not None and Path(model, MANIFEST).is_file():
        message = f"{model} is a bundle, and no model to export"
        raise UsageError(message, hint=hint.format(bundle=shlex.quote(model)))


def _export(request: ExportRequest, folder: Path | None, force: bool, as_json: bool) -> None:
    from vitdeploy.exporter import exporting

    with exporting():
        from vitdeploy.exporter.run import run_export

    with output.Stages() as stages, output.stdout_is_ours():
        bundle = run_export(request, folder, force=force, progress=stages)
    summary.show_bundle(bundle, folder or Path(bundle.root.name), stages, as_json)


def _dry_run(request: ExportRequest, folder: Path | None, force: bool, as_json: bool) -> None:
    from vitdeploy.exporter import exporting

    with exporting():
        from vitdeploy.exporter.plan import plan_export

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
