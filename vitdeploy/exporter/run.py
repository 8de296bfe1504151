"""From a model to a bundle on disk: reference, artifacts, parity, manifest, in that order, all or nothing."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vitdeploy._version import __version__
from vitdeploy.bundle import golden
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.files import names_below
from vitdeploy.bundle.folder import CALIBRATION, GOLDEN, HELD_OUT, WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import (
    AOT,
    Artifact,
    Manifest,
    ParityRecord,
    Provenance,
    SizeRecord,
    Tolerance,
)
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.checkpoint.opening import Checkpoint, UserModule
from vitdeploy.checkpoint.stated import check_labels
from vitdeploy.config import Precision, Size, size_name
from vitdeploy.errors import ExportError, ParityError, PrecisionError, UsageError
from vitdeploy.exporter import triton_aot
from vitdeploy.exporter.artifact_parity import (
    engines_parity,
    first_failure,
    gemms_failure,
    onnx_answers,
    onnx_parity,
    worst,
)
from vitdeploy.exporter.fallback import Proposal, smallest_islands
from vitdeploy.exporter.onnx import FILES, INPUT, write_onnx
from vitdeploy.exporter.plan import engines_note
from vitdeploy.exporter.quantised import (
    QuantisedForm,
    form_of,
    held_out_arrays,
    kept_ranges,
    open_calibration,
    quantise_subject,
    require_same_model,
    shortage,
)
from vitdeploy.exporter.request import ExportRequest, Order, orders_of
from vitdeploy.exporter.shared_weights import SharedWeights
from vitdeploy.exporter.subject import Subject, further_subjects, open_subject
from vitdeploy.exporter.tensorrt import builds_engines, write_engines
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.machine.memory import give_back
from vitdeploy.machine.temporary import temporary_folder
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.progress import Progress
from vitdeploy.quantisation.calibration import CalibrationImages
from vitdeploy.scores import usual_scores
from vitdeploy.verification import parity
from vitdeploy.verification.accuracy import (
    LabelledImages,
    TopClasses,
    find_labelled,
    judge_drop,
    judge_quantised,
    score,
)

_MODE = 0o644
"""safetensors gives files to their owner alone, but a server that runs as somebody else reads them too."""
_GEMM_IMAGES = 2
"""Images whose activations are held in memory, all at once."""
EMULATION = "emulation"
"""The name of the rehearsal among the backends of parity records."""
Golden = dict[str, np.ndarray[Any, Any]]


def run_export(
    request: ExportRequest,
    folder: Path | None = None,
    *,
    force: bool = False,
    failures: dict[ArtifactPrecision, str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model into a new bundle and prove every artifact; nothing is left behind when it fails.

    Args:
        failures: receives the precisions beside the first that cannot be built or are not right, and why; the
            bundle is then made without them. When omitted, one that fails is the end of the export.

    Raises:
        UsageError, CheckpointError, BundleError: bad input (exit code 2).
        MissingDependency: a library this export needs is not installed.
        DeviceUnavailable: no temporary file can be written.
        ExportError: an artifact could not be built.
        ParityError: an artifact does not compute what the reference computes, and no fallback helps.
    """
    progress = progress or Progress()
    target = folder or request.default_folder
    temporary_folder()  # PyTorch's tracer needs one, and says something else where there is none
    orders, impossible = orders_of(request.engines)
    with BundleWriter(target, force=force) as writer:
        with progress.stage("load") as stage:
            opened, subject = open_subject(request, failures)
            if failures:
                request = replace(request, precisions=request.floats, calibration=None)
            subjects = (subject, *further_subjects(opened, request))
            stage.detail = f"{opened.source}, {subject.parameters / 1e6:.1f} M parameters"
            images = open_calibration(request, subject) if request.quantised else None
            if images is not None:
                counts = f"{len(images.images)} images to calibrate with, {len(images.held_out)} held out"
                stage.detail = f"{stage.detail}, {counts}"
        for note in (*opened.notes, *subject.notes, *([images.note] if images and images.note else [])):
            progress.note(note)
        provenance = _provenance(request, opened)
        del opened  # and its weights, once they are in the bundle
        whole = _Whole(request, provenance, writer, progress, subjects, images, failures)
        for job in whole.jobs:
            with progress.stage(job.titled("reference")) as stage:
                job.golden = golden_arrays(job.subject, None if job.place is None else golden.FEWER_NAMES)
                noun = "images" if len(job.golden[INPUT]) > 1 else "image"
                stage.detail = f"{len(job.golden[INPUT])} golden {noun} in float64"
        if subject.labels is not None:
            check_labels(subject.labels, whole.classes)
        with progress.stage("weights") as stage:
            stage.size = sum(job.write_tensors() for job in whole.jobs)
        if request.calibration is not None:
            require_same_model(request.calibration, writer.directory / WEIGHTS)
        if request.data is not None:
            whole.labelled = find_labelled(request.data, whole.manifest())
        del subjects, subject
        for job in whole.jobs:
            job.reload()
        whole.build(orders, engines_note(orders, impossible))
        return writer.commit()


def golden_arrays(subject: Subject, names: Sequence[str] | None = None) -> Golden:
    """Golden inputs with float64 outputs, and raw images with their preprocessed form where images go in.

    Args:
        names: of golden images, all when omitted.
    """
    inputs = subject.golden_inputs(names)
    arrays: Golden = {INPUT: inputs.numpy()}
    for output, reference in subject.reference(inputs).items():
        # Two outputs may be one tensor, and no file of tensors holds one memory twice.
        arrays[golden.reference_key(subject.outputs, output)] = reference.numpy().copy()
    for i, raw in enumerate(golden.raw_images() if subject.takes_images else ()):
        arrays[f"image.{i}"] = raw
        arrays[f"image.{i}.{INPUT}"] = _preprocessed(raw, subject)
    return arrays


def _preprocessed(raw: np.ndarray[Any, Any], subject: Subject) -> np.ndarray[Any, Any]:
    from PIL import Image

    image = Image.fromarray(raw)
    return pixel_values(image, subject.preprocess, subject.input)


class _Whole:
    """One export: what all of its image sizes have in common, and a job for each."""

    def __init__(
        self,
        request: ExportRequest,
        provenance: Provenance,
        writer: BundleWriter,
        progress: Progress,
        subjects: Sequence[Subject],
        images: CalibrationImages | None = None,
        failures: dict[ArtifactPrecision, str] | None = None,
    ) -> None:
        self.request, self.provenance = request, provenance
        self.writer, self.progress = writer, progress
        self.images, self.failures = images, failures
        self.labelled: LabelledImages | None = None
        """What quantised artifacts are judged on, too."""
        self.jobs = [
            _Job(self, subject, subject.image_size if index else None)
            for index, subject in enumerate(subjects)
        ]
        self.artifacts: list[Artifact] = []
        self.parity: list[ParityRecord] = []
        self.shared: dict[str, SharedWeights] = {}
        """Of every precision with a file of weights that sizes share."""

    @property
    def classes(self) -> int:
        """Columns of the logits, or of what stands first."""
        return int(golden.reference_of(self.jobs[0].golden, "logits").shape[-1])

    def build(self, orders: Sequence[Order], impossible: Sequence[str]) -> None:
        """Build everything.

        Args:
            orders: engines to build of each ONNX artifact.
            impossible: what cannot be built here, and why.
        """
        for precision in self.request.floats if self.request.wants_onnx else ():
            self._try_precision(precision)
        if self.images is not None:
            self._build_quantised(self.images, self.request.rests(orders))
        self._build_engines(orders)
        for note in impossible:
            self.progress.note(note)
        for job in self.jobs:
            for precision in self.request.kernel_precisions:
                job.build_kernels(precision)
        self.writer.seal(self.manifest())

    def _try_precision(self, precision: Precision) -> None:
        """One precision at every size; where it may be missing and fails, none of it stays."""
        if self.failures is None or not self.artifacts:
            return self._build_precision(precision)
        artifacts, parity = len(self.artifacts), len(self.parity)
        files = set(names_below(self.writer.directory))
        try:
            return self._build_precision(precision)
        except (ExportError, ParityError) as error:
            self.failures[precision] = error.message
            self.progress.note(f"without {precision}: {error.message}")
        del self.artifacts[artifacts:], self.parity[parity:]
        for name in set(names_below(self.writer.directory)) - files:
            (self.writer.directory / name).unlink()
        self.shared = {key: shared for key, shared in self.shared.items() if shared.path.exists()}
        return None

    def _build_precision(self, precision: Precision) -> None:
        """One precision at every size, one after the other, so that they can share what they are made of."""
        several = len(self.jobs) > 1
        for job in self.jobs if several else ():
            job.subject.share_deployed(self.jobs[0].subject)
        for job in self.jobs:
            job.build(precision)
        for job in self.jobs if several else ():
            job.subject.share_deployed(None)

    def _build_quantised(self, images: CalibrationImages, rests: Sequence[Precision]) -> None:
        """What is asked for in 8 bits, with the images that it is made with and proven on.

        A quantised artifact has one image size, the only one.
        """
        job, outcome = self.jobs[0], []
        if self.labelled is not None:
            job.exact = self._exact(self.labelled)
        with self.progress.stage("held out") as stage:
            golden = held_out_arrays(job.subject, images)
            stage.detail = f"{len(golden[INPUT])} held-out images in float64"
        ranges = kept_ranges(self.request, job.subject)
        for kind in self.request.quantised:
            model = quantise_subject(job.subject, images, kind, self.request, rests, ranges, self.progress)
            ranges = model.ranges
            forms = [form_of(model, kind, rest, images, self.request) for rest in rests]
            outcome += job.build_quantised(forms, golden)
        if outcome and ranges is not None:
            tensors = {name: tensor.numpy() for name, tensor in ranges.tensors().items()}
            for file, arrays in ((HELD_OUT, golden), (CALIBRATION, {**images.tensors(), **tensors})):
                _save_arrays(arrays, self.writer.file(file))

    def _exact(self, images: LabelledImages) -> TopClasses:
        """What fp32 says of labelled images."""
        with self.progress.stage("accuracy fp32") as stage:
            bundle = self.writer.seal(self.manifest())
            answers = onnx_answers(bundle, bundle.artifact("onnx-fp32"), images)
            right = int((answers[:, 0] == images.labels).sum())
            stage.detail = f"top-1 {100 * right / len(images.labels):.2f} % of {len(images.labels)} images"
        return answers

    def _build_engines(self, orders: Sequence[Order]) -> None:
        """Engines of every ONNX artifact; held against the reference where they run here."""
        onnx = [artifact for artifact in self.artifacts if builds_engines(artifact)]
        built = [
            engine
            for order in orders
            for source in onnx
            for engine in write_engines(order, source, self.writer, self.progress)
        ]
        if built:
            bundle = self.writer.seal(self.manifest(built))
            records = engines_parity(bundle, built, self.request.atol, self.progress)
            self.accept(built, records)

    def _is_quantised(self, more: Sequence[Artifact]) -> bool:
        return any(artifact.is_quantised for artifact in (*self.artifacts, *more))

    def has(self, name: str) -> bool:
        """Whether there is an artifact of this name."""
        return any(artifact.name == name for artifact in self.artifacts)

    def accept(self, artifacts: Sequence[Artifact], records: Sequence[ParityRecord]) -> None:
        self.artifacts.extend(artifacts)
        self.parity.extend(records)

    def give_up(self, failure: str) -> None:
        """Say what was asked for and is not there, in the bundle, too."""
        self.progress.note(failure)
        notes = (*self.provenance.notes, failure)
        self.provenance = self.provenance.model_copy(update={"notes": notes})

    def drop(self, artifact: Artifact) -> None:
        """Remove the files of an artifact that was not accepted, but for those that others use."""
        used = {name for other in self.artifacts for name in other.files}
        for name in set(artifact.files) - used:
            (self.writer.directory / name).unlink()
        self.shared = {key: shared for key, shared in self.shared.items() if shared.path.exists()}

    def shared_weights(self, precision: str, requested: str) -> SharedWeights | None:
        """Where an artifact's weights go that other sizes have, too; None where there are no others.

        Where islands are needed at some sizes only, the rest is what the requested precision has.
        """
        if len(self.jobs) == 1:
            return None
        if precision == "mixed" and precision not in self.shared and requested in self.shared:
            precision = requested
        if precision not in self.shared:
            self.shared[precision] = SharedWeights(self.writer.file(f"{FILES[precision]}.data"))
        return self.shared[precision]

    def manifest(self, more: Sequence[Artifact] = ()) -> Manifest:
        """What the bundle holds so far, and ``more``."""
        subject, places = self.jobs[0].subject, [job.place for job in self.jobs]
        return Manifest(
            name=self.request.default_folder.stem,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            generator=f"vitdeploy {__version__}",
            model=subject.config,
            output=subject.outputs[0],
            outputs=subject.outputs,
            input=subject.input,
            preprocess=subject.preprocess,
            labels=subject.labels,
            scores=subject.scores or usual_scores(self.classes),
            parameters=subject.parameters,
            flops=subject.flops,
            rewrites=subject.rewrites,
            artifacts=tuple(sorted((*self.artifacts, *more), key=lambda a: places.index(a.image_size))),
            parity=tuple(self.parity),
            sizes=tuple(
                SizeRecord(
                    image_size=other.image_size,
                    preprocess=other.preprocess,
                    flops=other.flops,
                    grid_thw=other.config.grid_thw if other.config else None,
                )
                for other in (job.subject for job in self.jobs[1:])
            ),
            calibration=self.images.record if self.images and self._is_quantised(more) else None,
            provenance=self.provenance,
        )


@dataclass
class _Job:
    """The artifacts of one image size, as they are built and held against its reference."""

    whole: _Whole
    subject: Subject
    place: Size | None
    """The size as artifacts name it; None is the first."""
    golden: Golden = field(default_factory=dict)
    exact: TopClasses | None = None
    """What fp32 says of the labelled images."""

    @property
    def request(self) -> ExportRequest:
        return self.whole.request

    @property
    def progress(self) -> Progress:
        return self.whole.progress

    @property
    def writer(self) -> BundleWriter:
        return self.whole.writer

    @property
    def batches(self) -> Sequence[int] | None:
        """Batch sizes at which artifacts are proven; all where None.

        Large ones are the bulk of an export. A further size has the weights and the operations of the first:
        there images are run alone and in company, and the rest is left to `vitdeploy verify`.
        """
        batch = self.request.batch
        company = min(max(batch.min, 2), batch.max)
        return None if self.place is None else tuple(dict.fromkeys((batch.min, company)))

    def titled(self, stage: str) -> str:
        return stage if self.place is None else f"{stage} {size_name(self.place)}"

    def write_tensors(self) -> int:
        """Write the weights (of a further size, those that differ) and golden tensors; return the bytes."""
        state, size = self.subject.state, 0
        weights = state if self.place is None else {name: state[name] for name in self.subject.own}
        if weights or self.place is None:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            size += _save(tensors, self.writer.file(sized(WEIGHTS, self.place)))
        return size + _save_arrays(self.golden, self.writer.file(sized(GOLDEN, self.place)))

    def reload(self) -> None:
        """Let go of the memory that the weights take, or that was mapped to read them."""
        names = dict.fromkeys((WEIGHTS, sized(WEIGHTS, self.place)))
        paths = [self.writer.directory / name for name in names]
        self.subject.reload([path for path in paths if path.exists()])
        give_back()

    def build(self, precision: Precision) -> None:
        """The ONNX artifact of a precision, unless another one fell back to it."""
        if not self.whole.has(named(f"onnx-{precision}", self.place)):
            self._build_one(precision)

    def _build_one(self, precision: Precision) -> None:
        plan = PrecisionPlan.of(precision)
        rehearsed, trouble = self._try_out(plan)
        if trouble is None:
            artifact, records = self._attempt(plan, precision)
            trouble = first_failure(records)
            if trouble is None:
                return self.whole.accept([artifact], [*rehearsed, *records])
            self.whole.drop(artifact)
        failure = f"{precision} does not compute what the checkpoint computes: {trouble}"
        if precision == "fp32" or not self.request.fallback:
            raise ParityError(
                failure, hint=None if precision == "fp32" else "--bf16 and --fp32 have more range"
            )
        self.progress.note(failure)
        return self._fall_back(plan, precision, trouble)

    def build_quantised(self, forms: Sequence[QuantisedForm], golden: Golden) -> list[Artifact]:
        """The ONNX artifacts of a quantised model, up to the first that costs too much.

        Args:
            forms: of one model, each around another rest.
            golden: what they are held against.

        Raises:
            ParityError: it does, and no fallback is wanted.
        """
        built: list[Artifact] = []
        trouble = shortage(forms[0].model)
        for form in forms if trouble is None else ():
            try:
                artifact, records = self._attempt(
                    PrecisionPlan.of(form.rest), form.kind, quantised=(form, golden)
                )
            except PrecisionError as error:
                trouble = error.message
                break
            trouble = first_failure(records) or self._gemms(artifact, form, golden) or self._drop(artifact)
            if trouble is not None:
                self.whole.drop(artifact)
                break
            self.whole.accept([artifact], records)
            built.append(artifact)
        if trouble is not None:
            failed = forms[len(built)]
            if self.whole.failures is not None and not built:
                self.whole.failures[failed.kind] = f"it would cost too much of the answers: {trouble}"
                return built
            failure = f"no {FILES[failed.name]}: {failed.kind} would cost too much of the answers: {trouble}"
            if not self.request.fallback:
                hint = "leave out --no-fallback, and the others are written"
                raise ParityError(failure, hint=hint)
            others = ", ".join(artifact.path for artifact in self.whole.artifacts)
            self.whole.give_up(f"{failure}; {others} instead")
        return built

    def _gemms(self, artifact: Artifact, form: QuantisedForm, golden: Golden) -> str | None:
        """Every quantised GEMM computed again from what it reads; what is wrong with one.

        Processors compute a rest of fp16 in roundings of their own, which would hide what is looked for.
        """
        if form.rest != "fp32":
            return None
        with self.progress.stage(f"GEMMs {form.name}") as stage:
            bundle = self.writer.seal(self.whole.manifest([artifact]))
            scales = {name: site.input_scale for name, site in form.model.sites.items()}
            trouble = gemms_failure(bundle, artifact, golden[INPUT][:_GEMM_IMAGES], scales)
            stage.detail = trouble or f"{len(scales)} products, each as its own integers say"
        return trouble

    def _drop(self, artifact: Artifact) -> str | None:
        """What is wrong with the classes of labelled images."""
        images, exact = self.whole.labelled, self.exact
        if images is None or exact is None:
            return None
        with self.progress.stage(f"accuracy {artifact.name.removeprefix('onnx-')}") as stage:
            bundle = self.writer.seal(self.whole.manifest([artifact]))
            answers = onnx_answers(bundle, bundle.artifact(artifact.name), images)
            record = score(artifact.name, "onnxruntime", answers, exact, images.labels)
            limit = self.request.max_drop
            held, stage.detail = judge_quantised(record) if limit is None else judge_drop(record, limit)
        return None if held else stage.detail

    def build_kernels(self, precision: Precision) -> None:
        """The fused kernels; what they compute is rehearsed here, and measured where the GPU is."""
        config, name = self.subject.config, named(f"{AOT}-{precision}", self.place)
        source = named(f"onnx-{precision}", self.place)
        if config is None:
            raise UsageError("the kernels are for ViTs that vitdeploy knows, not for modules of your own")
        output = self.subject.outputs[0]
        if beyond := config.beyond_kernels(output):
            raise UsageError(f"there are no fused kernels for {', '.join(beyond)}")
        onnx = [r for r in self.whole.parity if r.backend == EMULATION and r.artifact == source]
        rehearsed, trouble = (
            (onnx, first_failure(onnx)) if onnx else self._try_out(PrecisionPlan.of(precision))
        )
        records = [record.model_copy(update={"artifact": name}) for record in rehearsed]
        if trouble:
            failure = f"{precision} does not compute what the checkpoint computes: {trouble}"
            if not self.request.fallback or not self.whole.artifacts:
                raise ParityError(failure, hint="--bf16 has more range")
            return self.progress.note(f"no {name}, kernels have no fp32 islands: {failure}")
        artifact = triton_aot.write_kernels(
            config,
            precision,
            self.writer,
            batch=self.request.batch,
            architectures=self.request.kernel_architectures,
            output=output,
            input_kind=self.subject.input,
            progress=self.progress,
            place=self.place,
        )
        self.progress.note(f"{name}: no cubin has run yet; on such a GPU: vitdeploy verify --backend triton")
        return self.whole.accept([artifact], records)

    def _fall_back(self, plan: PrecisionPlan, precision: Precision, trouble: str) -> None:
        """The smallest set of islands that passes; where there is none, bf16."""
        attempts = [
            (PrecisionPlan.of("bf16"), f"{precision} failed ({trouble}) and no few fp32 islands help")
        ]
        if proposal := self._search(plan):
            reason = f"{precision} failed ({trouble}); {proposal.reason}"
            attempts.insert(0, (plan.with_islands(proposal.islands), reason))
        for wider, reason in attempts:
            name = named("onnx-mixed" if wider.islands else "onnx-bf16", self.place)
            if wider == plan or self.whole.has(name):
                continue
            rehearsed = self._rehearse(wider)
            artifact, records = self._attempt(wider, precision, reason)
            if first_failure([*rehearsed, *records]) is None:
                self.progress.note(f"{artifact.path} instead: {reason}")
                return self.whole.accept([artifact], [*rehearsed, *records])
            self.whole.drop(artifact)
        raise ParityError(
            f"{precision} does not compute what the checkpoint computes: {trouble}", hint="--fp32"
        )

    def _try_out(self, plan: PrecisionPlan) -> tuple[list[ParityRecord], str | None]:
        """The rehearsal, and what is wrong with it; weights that do not fit are as wrong as results.

        Raises:
            PrecisionError: weights do not fit, and no fallback is wanted.
        """
        try:
            rehearsed = self._rehearse(plan)
        except PrecisionError as error:
            if not self.request.fallback:
                raise
            return [], error.message
        return rehearsed, first_failure(rehearsed)

    def _rehearse(self, plan: PrecisionPlan) -> list[ParityRecord]:
        """A reduced precision as hardware computes it, every result rounded.

        The CPU runtimes that check the artifact itself are free to compute in fp32 and drop roundings between
        operations, and with them an overflow that a GPU would meet.
        """
        if plan.default == torch.float32:
            return []
        precision = plan.name
        with self.progress.stage(self.titled(f"round as {precision}")) as stage:
            results = self.subject.rehearse(plan, torch.from_numpy(self.golden[INPUT]))
            give_back()
            outputs, tolerance = self.subject.outputs, self._tolerance(plan)
            records = []
            for output, result in zip(outputs, results, strict=True):
                reference = golden.reference_of(self.golden, output)
                metrics = parity.measure_parity(reference, result.numpy(), tolerance, output)
                failures = parity.tolerance_failures(metrics, tolerance)
                record = ParityRecord(
                    artifact=named(f"onnx-{precision}", self.place),
                    backend=EMULATION,
                    batch=len(result),
                    provider="PyTorch, every result rounded",
                    output=output if len(outputs) > 1 else None,
                    metrics=metrics,
                    tolerance=tolerance,
                    passed=not failures,
                    failures=failures,
                )
                records.append(record)
            stage.detail = worst(records)
        return records

    def _tolerance(self, plan: PrecisionPlan) -> Tolerance:
        """What the plan's precision may lose, with the user's own bound on top."""
        return parity.TOLERANCES[plan.name].model_copy(update={"max_abs": self.request.atol})

    def _search(self, plan: PrecisionPlan) -> Proposal | None:
        if not self.subject.searches_islands:
            return None
        with self.progress.stage(self.titled("bisect")) as stage:
            deployed = self.subject.deployed(PrecisionPlan.of("fp32"))
            outputs, tolerance = self.subject.outputs, self._tolerance(plan)

            def accepts(results: tuple[torch.Tensor, ...]) -> bool:
                return all(
                    parity.passes(golden.reference_of(self.golden, output), result.numpy(), tolerance, output)
                    for output, result in zip(outputs, results, strict=True)
                )

            proposal = smallest_islands(deployed, plan, torch.from_numpy(self.golden[INPUT]), accepts)
            stage.detail = proposal.reason if proposal else "no small set of islands passes"
        return proposal

    def _attempt(
        self,
        plan: PrecisionPlan,
        requested: ArtifactPrecision,
        fallback: str | None = None,
        quantised: tuple[QuantisedForm, Golden] | None = None,
    ) -> tuple[Artifact, list[ParityRecord]]:
        """Build one artifact and hold it against the reference on a runtime of this machine.

        Args:
            quantised: what is quantised in it, and what it is held against.
        """
        form, golden = quantised or (None, self.golden)
        kind = plan.name if form is None else form.name
        example = torch.from_numpy(self.golden[INPUT][:1])
        with self.progress.stage(self.titled(f"onnx {kind}")) as stage:
            artifact = write_onnx(
                self.subject,
                plan,
                self.writer,
                batch=self.request.batch,
                opset=self.request.opset,
                example=example,
                requested=requested,
                fallback=fallback,
                place=self.place,
                shared=None if form else self.whole.shared_weights(plan.name, requested),
                quantised=form,
            )
            stage.size = sum((self.writer.directory / name).stat().st_size for name in artifact.files)
            stage.detail = f"{artifact.path}, {artifact.nodes} nodes"
        with self.progress.stage(self.titled(f"parity {kind}")) as stage:
            bundle = self.writer.seal(self.whole.manifest([artifact]))
            self.reload()  # unmaps what the rewrites have read
            built = bundle.artifact(artifact.name)
            records = onnx_parity(bundle, built, golden, self.request.atol, self.batches)
            give_back()
            stage.detail = worst(records)
        return artifact, records


def _save_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> int:
    return _save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, path)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> int:
    """Write a file of tensors; return its bytes."""
    save_file(tensors, path)
    path.chmod(_MODE)
    return path.stat().st_size


def _provenance(request: ExportRequest, opened: Checkpoint | UserModule) -> Provenance:
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "safetensors")
    return Provenance(
        source=opened.source,
        family=opened.family,
        seed=opened.seed,
        source_files=dict(opened.provenance),
        versions={name: metadata.version(name) for name in libraries},
        platform=f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}",
        command=request.command,
        notes=opened.notes,
        facts=dict(opened.facts),
    )
