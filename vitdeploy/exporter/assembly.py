"""One export as it grows: what all image sizes of a model have in common, and what comes of the jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from vitdeploy._version import __version__
from vitdeploy.bundle import golden
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.files import names_below
from vitdeploy.bundle.folder import CALIBRATION, HELD_OUT, BundleWriter
from vitdeploy.bundle.manifest import (
    Artifact,
    Manifest,
    Provenance,
    SizeRecord,
)
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.config import Precision
from vitdeploy.errors import ExportError, ParityError
from vitdeploy.exporter.artifact_parity import engines_parity
from vitdeploy.exporter.job import Job, save_arrays
from vitdeploy.exporter.onnx import FILES, INPUT
from vitdeploy.exporter.quantised import form_of, held_out_arrays, kept_ranges, onnx_answers, quantise_subject
from vitdeploy.exporter.request import ExportRequest, Order
from vitdeploy.exporter.shared_weights import SharedWeights
from vitdeploy.exporter.subject import Subject
from vitdeploy.exporter.tensorrt import builds_engines, write_engines
from vitdeploy.machine.identity import find_cpu
from vitdeploy.progress import Progress
from vitdeploy.quantisation.calibration import CalibrationImages
from vitdeploy.scores import usual_scores
from vitdeploy.verification.accuracy import LabelledImages, TopClasses
from vitdeploy.verification.gemms import processor_note


class Assembly:
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
            Job(self, subject, subject.image_size if index else None)
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

    @property
    def largest_ran_on(self) -> frozenset[str]:
        """Backends that have run the float graph's largest batch, in a precision that was accepted."""
        most = self.request.batch.max
        floats = {artifact.name for artifact in self.artifacts if not artifact.is_quantised}
        records = (record for record in self.parity if record.artifact in floats)
        return frozenset(record.backend for record in records if record.batch == most)

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
        if "int8" in self.request.quantised:
            note = processor_note(find_cpu(), self.request.weight_bits)
            if note is not None:
                self.progress.note(note)
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
                save_arrays(arrays, self.writer.file(file))

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
