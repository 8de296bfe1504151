"""vitdeploy carries a Vision Transformer checkpoint to production, and proves each step.

``export`` writes a bundle, ``add_engines`` adds TensorRT engines to it, ``load`` runs it, ``verify`` verifies
it on this machine, ``bench`` measures it, ``explain`` draws what it looks at.
Every error raised on purpose is a ``vitdeploy.errors.VitdeployError``.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from vitdeploy._version import __version__

if TYPE_CHECKING:
    from torch import nn

    from vitdeploy.benchmark.results import Results
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.config import BatchRange, Preprocess, Size
    from vitdeploy.explanation.figures import Explanation
    from vitdeploy.images.decode import ImageSource
    from vitdeploy.predictor import Predictor
    from vitdeploy.progress import Progress
    from vitdeploy.verification.foreign.report import ForeignReport
    from vitdeploy.verification.local import VerifyReport

    Path = str | os.PathLike[str]

__all__ = ["__version__", "add_engines", "bench", "explain", "export", "load", "verify"]


def export(
    model: str | Path | nn.Module | None = None,
    output_dir: Path | None = None,
    *,
    checkpoint: Path | None = None,
    precision: str | Sequence[str] = "fp32",
    format: str | Sequence[str] = "auto",
    arch: str | Sequence[str] = (),
    image_size: int | Size | list[int | Size] | None = None,
    batch: int | tuple[int, int, int] | BatchRange = (1, 8, 32),
    opset: int = 20,
    input: Literal["float", "uint8", "patches"] = "float",
    output: str | Sequence[str] | None = None,
    labels: Sequence[str] | Path | None = None,
    zero_shot: Sequence[str] | Path | None = None,
    templates: str | Sequence[str] = (),
    scores: Literal["softmax", "sigmoid", "none"] | None = None,
    preprocess: Preprocess | Mapping[str, Any] | Path | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    resize: int | Size | Literal["exact", "none"] | None = None,
    crop: float | int | Size | None = None,
    resample: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    atol: float | None = None,
    calibration: Path | None = None,
    weight_bits: Literal[7, 8] = 7,
    fp8_attention: bool = False,
    target: Literal["tensorrt"] | None = None,
    data: Path | None = None,
    max_drop: float | None = None,
    fallback: bool = True,
    seed: int = 0,
    random: bool = False,
    force: bool = False,
    engine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model into a new bundle, with the parity of every artifact with its float64 reference.

    Args:
        model: a named variant (``"vit_base_patch16_224"``, ``"CLIP-B/32"``, ``"digits"``), a folder or hub id
            of transformers, ``"timm:<name>"``, ``"torchvision:<name>"``, ``"module:function"``, or a module
            of your own that takes one (N, C, H, W) tensor. ViT-B/16 when neither it nor ``checkpoint`` is
            given; a named variant without a checkpoint has seeded random weights.
        output_dir: the bundle's folder; named after the model, in the working directory, when omitted.
        checkpoint: a file or folder with the weights of a named variant, or of what a library builds.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"fp8"``, or several of them: one artifact
            each. With ``"int8"`` and ``"fp8"`` always goes fp32.
        format: ``"onnx"``; ``"tensorrt"``, engines for the GPU that is here; ``"tensorrt-rtx"``, engines for
            ``arch``; ``"triton-aot"``, fused kernels for ``arch``; ``"auto"``: ONNX and what engines it can.
        arch: GPUs to build for, ``"sm_89"``; ``"sm_80+sm_89"`` is one engine for both.
        image_size: (height, width), or one number for both; the checkpoint's own when omitted. A list of such
            makes one bundle for all: the first is the default, and each image goes where it fits.
        batch: (min, opt, max) batch sizes that the artifacts serve; one number for a fixed batch.
        opset: the ONNX operator set, 17 to 23.
        input: ``"float"`` reads (N, C, H, W) float32 pixel values; ``"uint8"`` reads (N, H, W, C) uint8
            images, with the normalisation folded into the first projection; ``"patches"`` reads (N, T,
            columns) float32, what the image processor of a Qwen tower gives for images of ``image_size``.
        output: ``"logits"`` (N, classes), ``"features"`` (N, D), ``"embedding"`` (N, D), projected where the
            model projects and of length 1, ``"tokens"`` (N, T, D), ``"codes"`` (N, patches, vocabulary),
            ``"image_features"`` (N, T, E), ``"deepstack_features"`` (N, taps, T, E), or
            ``"layers:3,7"`` (N, T, D each); float32. Several, as a list or with commas, come from one graph.
            The logits where the model has a head when omitted.
        labels: one for each class, or a file with them; the checkpoint's own when omitted.
        zero_shot: labels, or a file with them, of which the text tower of CLIP or SigLIP makes a head; or a
            ``.safetensors`` file, label to vector.
        templates: what is embedded for a label, ``"a photo of a {}"``; several are averaged. The label itself
            when omitted.
        scores: what becomes of logits where classes are named: shares of one answer, an answer for each
            class, or the values themselves; as the checkpoint says when omitted, else a softmax, or a sigmoid
            of a single output.
        preprocess: ``"imagenet"``, ``"inception"``, ``"clip"``, ``"siglip"``, ``"deit"``, ``"dinov2"``; a
            file of transformers, timm or a manifest, or its content; the checkpoint's own when omitted.
        mean, std: of each channel, for pixels from 0 to 1; one number stands for all.
        resize: before the crop: the shorter side in pixels; (height, width); ``"exact"``, to the model's
            size; or ``"none"``.
        crop: the share of the shorter side that the crop keeps (0.875); or its size in pixels, the model's.
        resample: Pillow's filter: ``"bilinear"``, ``"bicubic"``, ...
        heads: attention heads, where the checkpoint does not tell them.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"silu"``.
        revision: a branch, tag or commit, of a model on the hub.
        cache_dir: where downloads are kept.
        atol: an absolute tolerance on top of the table in ``vitdeploy.verification.parity``.
        calibration: for int8 and fp8: a folder with 48 or more typical images, at least 8; or a quantised
            bundle of the same model, whose images are taken.
        weight_bits: of int8: with 7 no processor saturates, 8 are for those with VNNI and for GPUs.
        fp8_attention: whether the products inside of attention are fp8, too.
        target: ``"tensorrt"`` adds int8 and fp8 artifacts in the form that it builds from, in fp16 where
            they are not quantised; a format that builds engines does so, too.
        data: labelled images (a sub-folder per label, or files named ``<label>_*.png``), on which int8 and
            fp8 may not lose more than a point of top-1 against fp32, as far as the images can tell.
        max_drop: points of top-1 on ``data`` that they may lose, whatever the images can tell.
        fallback: when a reduced precision fails, keep a few operations in fp32, or take bf16, or leave a
            quantised artifact out; else raise.
        seed: of random weights.
        random: random weights of ``"timm:<name>"`` or ``"torchvision:<name>"``, without a download.
        force: replace an existing bundle.
        engine: of engines: ``profiles``, a list of (min, opt, max) batch sizes; and the fields of
            ``vitdeploy.tensorrt.records.BuildSettings``.
        progress: receives the stages as they begin and finish.

    Raises:
        UsageError, CheckpointError, BundleError: bad input, or a folder that cannot be written.
        MissingDependency: PyTorch, or a library that this model or format needs, is not installed.
        DeviceUnavailable: a format that needs a GPU, and there is none.
        ExportError: an artifact could not be built.
        ParityError: an artifact does not compute what the checkpoint computes, and no fallback helps.
    """
    from vitdeploy.exporter import exporting

    with exporting():
        from vitdeploy.checkpoint.stated import Stated
        from vitdeploy.checkpoint.texts.prompts import zero_shot_of
        from vitdeploy.exporter.request import ExportRequest
        from vitdeploy.exporter.run import run_export

    wanted = image_size if isinstance(image_size, list) else [] if image_size is None else [image_size]
    sizes = [(size, size) if isinstance(size, int) else size for size in wanted]
    request = ExportRequest(
        model=pathlib.Path(model) if isinstance(model, os.PathLike) else model,
        checkpoint=None if checkpoint is None else pathlib.Path(checkpoint),
        precisions=_names(precision),
        formats=_names(format),
        architectures=_names(arch),
        image_size=next(iter(sizes), None),
        further_sizes=tuple(sizes[1:]),
        batch=_batch_range(batch),
        opset=opset,
        input=input,
        output=output,
        stated=Stated(
            labels=labels,
            preprocess=preprocess,
            mean=mean,
            std=std,
            resize=resize,
            crop=crop,
            resample=resample,
            scores=scores,
            heads=heads,
            activation=activation,
        ),
        zero_shot=zero_shot_of(zero_shot, templates),
        revision=revision,
        cache_dir=None if cache_dir is None else pathlib.Path(cache_dir),
        atol=atol,
        calibration=None if calibration is None else pathlib.Path(calibration),
        weight_bits=weight_bits,
        fp8_attention=fp8_attention,
        target=target,
        data=None if data is None else pathlib.Path(data),
        max_drop=max_drop,
        fallback=fallback,
        seed=seed,
        random=random,
        **_engine_fields(engine or {}),
        command="vitdeploy.export",
    )
    folder = None if output_dir is None else pathlib.Path(output_dir)
    return run_export(request, folder, force=force, progress=progress)


def add_engines(
    bundle: Path | Bundle,
    *,
    format: str | Sequence[str] = "auto",
    arch: str | Sequence[str] = (),
    precision: str | Sequence[str] = (),
    engine: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build TensorRT engines from a bundle's ONNX artifacts, prove them, and add them; needs no PyTorch.

    Args:
        bundle: its folder, or an opened one; it stays as it was when anything fails.
        format: ``"tensorrt"``, for the GPU that is here; ``"tensorrt-rtx"``, for ``arch``; ``"auto"``: each
            that can be built here.
        arch: GPUs to build for, ``"sm_89"``; ``"sm_80+sm_89"`` is one engine for both.
        precision: of the artifacts to build from; all of them when omitted.
        engine: ``profiles``, a list of (min, opt, max) batch sizes; and the fields of
            ``vitdeploy.tensorrt.records.BuildSettings``.
        force: replace engines of the same name.
        progress: receives the stages as they begin and finish.

    Returns:
        The bundle with its new engines.

    Raises:
        UsageError: nothing to build, or nothing to build it from.
        BundleError: there is no bundle, it is damaged, or it has such an engine already.
        MissingDependency, DeviceUnavailable: the library, or the GPU that it needs, is not there.
        ExportError: an engine could not be built, or not in the declared precision.
        ParityError: an engine that runs here does not compute what the reference computes.
    """
    from vitdeploy.bundle.folder import Bundle as BundleFolder
    from vitdeploy.exporter.request import EngineRequest
    from vitdeploy.exporter.tensorrt import add_engines as add

    request = EngineRequest(
        formats=_names(format),
        architectures=_names(arch),
        precisions=_names(precision),
        **_engine_fields(engine or {}),
    )
    opened = bundle if isinstance(bundle, BundleFolder) else BundleFolder.open(pathlib.Path(bundle))
    return add(opened, request, force=force, progress=progress)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _batch_range(batch: int | tuple[int, int, int] | BatchRange) -> BatchRange:
    from vitdeploy.config import BatchRange

    if isinstance(batch, BatchRange):
        return batch
    return BatchRange(*((batch, batch, batch) if isinstance(batch, int) else batch))


def _engine_fields(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller says of engines, as the fields of a request."""
    from vitdeploy.tensorrt.records import BuildSettings

    settings = dict(engine)
    profiles = tuple(map(_batch_range, settings.pop("profiles", ())))
    return {"profiles": profiles, "settings": BuildSettings.of(**settings)}


def load(
    bundle: Path | Bundle,
    *,
    backend: str | None = None,
    artifact: str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    device: str | None = None,
    size: int | Size | None = None,
    fit: Literal["aspect", "area"] = "aspect",
) -> Predictor:
    """Open a bundle for predictions on images; a context manager.

    Args:
        bundle: its folder, or an opened one.
        backend: the runtime; ``vitdeploy doctor`` lists them. When nothing but ``threads`` is said of how to
            run: what ``vitdeploy bench --pick`` chose for this machine; else ONNX Runtime. The predictor's
            ``note`` says which choice was taken.
        artifact: its name or precision (``"onnx-fp16"``, ``"fp16"``). When omitted: the most precise that
            the backend runs on this machine (fp32, mixed, fp16, bf16); int8 or fp8 where it runs no other,
            and ``note`` says so.
        threads: CPU threads; the runtime's own choice when omitted.
        provider: ONNX Runtime's execution provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, for backends that have the choice.
        size: of a bundle of several image sizes, (height, width) of the only one to run, or one number for
            both; when omitted, each image goes where it fits, and a tensor to the size of its shape.
        fit: how that is judged: ``"aspect"``, the nearest aspect ratio and of several such the nearest area;
            or ``"area"`` alone.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        UsageError: an unknown backend, artifact or size, or a combination that cannot run.
        MissingDependency, DeviceUnavailable: the runtime or the device is not there.
    """
    from vitdeploy.backends.base import Options
    from vitdeploy.predictor import Predictor

    options = Options(threads=threads, provider=provider, device=device)
    pinned = (size, size) if isinstance(size, int) else size
    return Predictor.open(bundle, backend=backend, artifact=artifact, options=options, size=pinned, fit=fit)


@overload
def verify(
    bundle: Path | Bundle,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    data: Path | None = None,
    max_drop: float | None = None,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport: ...


@overload
def verify(
    bundle: Path,
    *,
    model: str | Path | nn.Module | None = None,
    checkpoint: Path | None = None,
    batches: Sequence[int] | None = None,
    data: Path | None = None,
    max_drop: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ForeignReport: ...


def verify(
    bundle: Path | Bundle,
    *,
    model: str | Path | nn.Module | None = None,
    checkpoint: Path | None = None,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    data: Path | None = None,
    max_drop: float | None = None,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport | ForeignReport:
    """Verify a bundle on this machine: every byte, the preprocessing, every artifact on every backend.

    With ``model`` or ``checkpoint``, hold anybody's ONNX file, or a folder of them, against it: parity in
    ONNX Runtime on the CPU, the dtype of every GEMM, the weights, labels and preprocessing.

    Args:
        bundle: its folder, or an opened one; or the file or folder to hold against the checkpoint.
        model: the checkpoint that a file was made from, as ``export`` takes it.
        checkpoint: a file or folder with the weights of a named variant, as ``export`` takes it.
        backends: names; every one here that runs exported artifacts when omitted. Then an artifact that
            none of them can run is not verified, and fails; of named ones, what they cannot run is skipped.
        batches: batch sizes; each artifact's least, optimal and largest when omitted.
        data: a folder of labelled images (a sub-folder per label, or files named ``<label>_*.png``), for
            the accuracy of every artifact.
        max_drop: points of top-1 on ``data`` that an artifact may be below the reference; more is a failure.
        threads: CPU threads; the runtime's own choice when omitted.
        provider: ONNX Runtime's execution provider; goes with ``backends=["onnxruntime"]``.
        progress: receives the stages as they begin and finish.

    Returns:
        What was compared; ``report.passed`` says whether all of it held, ``report.check()`` raises a
        ParityError if not.

    Raises:
        BundleError: there is no bundle, or a byte of it changed.
        UsageError: an unknown backend, a batch size that no artifact serves; a file that is no image model.
        CheckpointError: the checkpoint cannot be opened.
        MissingDependency, DeviceUnavailable: a backend asked for by name does not work here.
    """
    from vitdeploy.backends.base import Options

    options = Options(threads=threads, provider=provider)
    if model is None and checkpoint is None:
        from vitdeploy.verification.local import verify_bundle

        return verify_bundle(
            bundle,
            backends=backends,
            batches=batches,
            data=data,
            max_drop=max_drop,
            options=options,
            progress=progress,
        )
    from vitdeploy.bundle.folder import Bundle as BundleFolder
    from vitdeploy.errors import UsageError
    from vitdeploy.exporter import exporting

    if backends is not None or provider is not None:
        raise UsageError("a file of no bundle is run by ONNX Runtime on the CPU: no backends, no provider")
    with exporting("holding a file against its checkpoint"):
        from vitdeploy.verification.foreign.run import verify_foreign

    return verify_foreign(
        bundle.root if isinstance(bundle, BundleFolder) else pathlib.Path(bundle),
        pathlib.Path(model) if isinstance(model, os.PathLike) else model,
        None if checkpoint is None else pathlib.Path(checkpoint),
        batches=batches,
        data=None if data is None else pathlib.Path(data),
        max_drop=max_drop,
        options=options,
        progress=progress,
    )


def bench(
    bundle: Path | Bundle | Sequence[Path | Bundle],
    *,
    backends: Sequence[str] | None = None,
    artifacts: Sequence[str] | None = None,
    image_sizes: Sequence[int | Size] | None = None,
    batches: Sequence[int] | None = None,
    threads: int | Sequence[int | None] | None = None,
    concurrency: int | Sequence[int] = 1,
    spin: bool | Sequence[bool] = False,
    provider: str | None = None,
    device: str | None = None,
    data: Path | None = None,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Results:
    """Measure latency, throughput and parity of every backend, artifact and batch size, interleaved.

    Each runs in a process of its own. Ctrl-C ends the measurement early; what was measured is returned.

    Args:
        bundle: its folder, or an opened one; several are measured in the same rounds.
        backends: names; every one here that can run this bundle when omitted, torch's included.
        artifacts: names or precisions; all when omitted.
        image_sizes: (height, width), or one number for both, of bundles with several; all when omitted.
        batches: batch sizes; 1, 8 and 32, as far as they are served, when omitted.
        threads: CPU threads, one number or several to compare; the runtime's own choice when omitted.
        concurrency: callers at the same time, each with a session of its own; one number or several.
        spin: whether ONNX Runtime's threads keep cores busy while they wait; ``(False, True)`` compares.
        provider: ONNX Runtime's execution provider; goes with ``backends=["onnxruntime"]``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, for backends that have the choice.
        data: a folder of labelled images, for the accuracy; the digits' own when omitted, for their bundle.
        budget: seconds of warming up and measuring; loading and proving come on top.
        seed: of the order of cells within rounds.
        progress: receives the stages as they begin and finish.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        UsageError: an unknown backend, artifact or class, or nothing to measure.
        MissingDependency, DeviceUnavailable: a backend asked for by name does not work here.
    """
    from vitdeploy.benchmark.cases import Choices
    from vitdeploy.benchmark.run import run_bench

    choices = Choices(
        backends=None if backends is None else tuple(backends),
        artifacts=None if artifacts is None else tuple(artifacts),
        image_sizes=None
        if image_sizes is None
        else tuple((s, s) if isinstance(s, int) else s for s in image_sizes),
        batches=None if batches is None else tuple(batches),
        threads=tuple(threads) if isinstance(threads, Sequence) else (threads,),
        concurrency=(concurrency,) if isinstance(concurrency, int) else tuple(concurrency),
        spin=(spin,) if isinstance(spin, bool) else tuple(spin),
        provider=provider,
        device=device,
    )
    return run_bench(bundle, choices, data=data, budget=budget, seed=seed, progress=progress)


def explain(
    bundle: Path | Bundle,
    images: ImageSource | Sequence[ImageSource],
    output_dir: Path | None = None,
    *,
    html: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Explanation:
    """Draw what a model looks at in images, computed from the bundle's weights by the reference model.

    Args:
        bundle: its folder, or an opened one.
        images: paths, bytes, binary file objects or Pillow images; one, or up to 64.
        output_dir: a folder for the page, its pictures and the numbers; it appears whole. When neither it nor
            ``html`` is given: ``NAME.explained`` in the working directory.
        html: a file for the page alone.
        force: replace an earlier explanation in ``output_dir``.
        progress: receives the stages as they begin and finish.

    Returns:
        All figures as arrays, what was left out and why, and where it was written.

    Raises:
        ImageError: an image cannot be read; nothing is written.
        UsageError: more than 64 images, a bundle without weights, or a place that cannot be written to.
        BundleError: there is no bundle, or it is damaged.
        MissingDependency: PyTorch (``export``), or matplotlib or jinja2 (``report``), is not installed.
    """
    from vitdeploy.exporter import exporting

    with exporting("explain"):
        from vitdeploy.explanation.run import run_explain

    some = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
    return run_explain(
        pathlib.Path(bundle) if isinstance(bundle, str | os.PathLike) else bundle,
        some,
        None if output_dir is None else pathlib.Path(output_dir),
        html=None if html is None else pathlib.Path(html),
        force=force,
        progress=progress,
    )
