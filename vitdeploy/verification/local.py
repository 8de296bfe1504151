"""A bundle on the machine it is on: every byte, the preprocessing, every artifact, accuracy."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from vitdeploy.backends.base import (
    Backend,
    Options,
    Session,
    SessionFacts,
    all_backends,
    get_backend,
    runs_nothing,
)
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.bundle.sizes import named
from vitdeploy.config import Size, size_name
from vitdeploy.errors import BundleError, DeviceUnavailable, ParityError
from vitdeploy.machine.identity import find_cpu
from vitdeploy.predictor import EXACTNESS, Predictor
from vitdeploy.progress import Progress
from vitdeploy.verification.accuracy import (
    REFERENCE,
    AccuracyRecord,
    LabelledImages,
    TopClasses,
    check_max_drop,
    find_labelled,
    judge_drop,
    judge_quantised,
    score,
    top_classes,
)
from vitdeploy.verification.gemms import processor_note
from vitdeploy.verification.parity import PreprocessCheck, check_preprocess, check_session


@dataclass(frozen=True)
class SkippedArtifact:
    """An artifact that a backend of this machine does not run."""

    artifact: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """What a backend says of how it runs an artifact: which parts are fused, and which are not and why."""

    artifact: str
    backend: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and what did not hold."""

    bundle: Path
    files: int
    """Whose hashes are right."""
    preprocess: PreprocessCheck
    parity: tuple[ParityRecord, ...]
    skipped: tuple[SkippedArtifact, ...]
    accuracy: tuple[AccuracyRecord, ...]
    unproven: tuple[str, ...]
    """Artifacts that no backend ran; failures too, unless the backends were chosen by name."""
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()
    fusion: tuple[Fusion, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def check(self) -> None:
        """Raise what did not hold.

        Raises:
            ParityError: names the first failures.
        """
        if self.failures:
            more = f" (and {len(self.failures) - 3} more)" if len(self.failures) > 3 else ""
            raise ParityError(f"{self.bundle}: not verified: {'; '.join(self.failures[:3])}{more}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.passed,
            "bundle": str(self.bundle),
            "files": self.files,
            "preprocess": dataclasses.asdict(self.preprocess),
            "parity": [record.model_dump(mode="json") for record in self.parity],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
            "accuracy": [dataclasses.asdict(accuracy) for accuracy in self.accuracy],
            "unproven": list(self.unproven),
            "failures": list(self.failures),
            "notes": list(self.notes),
            "fusion": [dataclasses.asdict(fusion) for fusion in self.fusion],
        }


def verify_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    data: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify a bundle; ``vitdeploy.verify`` documents the arguments and the errors."""
    check_max_drop(max_drop, data)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    pairs = runnable(opened, backends)
    images = find_labelled(Path(data), opened.manifest) if data is not None else None
    job = _Verification(opened, options or Options(), batches, progress or Progress())
    if images is not None and images.unread:
        job.progress.note(images.unread)
    with job.progress.stage("hashes") as stage:
        opened.verify()
        stage.detail = f"{len(opened.manifest.files)} files"
    with job.progress.stage("preprocess") as stage:
        preprocess = _check_preprocess(opened)
        stage.detail = f"{preprocess.images} images, difference {preprocess.max_abs:.1e}"
    if not preprocess.images and preprocess.passed:
        job.notes.append(f"the bundle {opened.manifest.refuses_images}: no pixels were compared")
    job.failures += [f"preprocessing: {reason}" for reason in preprocess.failures]
    job.run(pairs, images)
    job.judge_drops(max_drop)
    unproven = tuple(a.name for a in opened.manifest.artifacts if a.name not in job.executed)
    if backends is None:
        job.require_all(unproven)
    return VerifyReport(
        bundle=opened.root,
        files=len(opened.manifest.files),
        preprocess=preprocess,
        parity=tuple(job.records),
        skipped=tuple(job.skipped),
        accuracy=tuple(job.accuracy),
        unproven=unproven,
        failures=tuple(job.failures),
        notes=tuple(job.notes),
        fusion=tuple(job.fusion),
    )


def _check_preprocess(bundle: Bundle) -> PreprocessCheck:
    """The preprocessing for every image size, as one check."""
    if len(bundle.sizes) < 2:
        return check_preprocess(bundle)
    checks = {size: check_preprocess(bundle.at_size(size)) for size in bundle.sizes}
    return PreprocessCheck(
        sum(check.images for check in checks.values()),
        max(check.max_abs for check in checks.values()),
        tuple(f"{size_name(size)}: {why}" for size, check in checks.items() for why in check.failures),
    )


@dataclass(frozen=True)
class Pair:
    """An artifact (None is the reference weights) and a backend, with the reason if it cannot run it."""

    backend: Backend
    artifact: Artifact | None
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.artifact.name if self.artifact else WEIGHTS

    @property
    def size(self) -> Size | None:
        """The image size as artifacts name it; None is the first."""
        return self.artifact.image_size if self.artifact else None


def runnable(bundle: Bundle, backends: Sequence[str] | None, *, models: bool = False) -> list[Pair]:
    """Every pairing of an artifact with a backend, in the order of the artifacts.

    Args:
        backends: names; None is all. Those that run the weights without reading an artifact are paired
            with each artifact for its precision; with the weights alone if they can run none.
        models: whether None includes those too.

    Raises:
        UsageError: an unknown backend, or one asked for by name that can run nothing of this bundle.
        DeviceUnavailable: a backend asked for by name does not work here, or its engines are for other GPUs.
    """
    pairs = []
    for backend in all_backends() if backends is None else map(get_backend, dict.fromkeys(backends)):
        if backends is not None:
            pairs += _pairs_of(bundle, backend)
        else:
            state = backend.availability()
            missing = None if state.ok else state.reason
            weights = backend.supports(bundle.manifest, None) is None
            for artifact in bundle.manifest.artifacts:
                reason = backend.supports(bundle.manifest, artifact)
                if artifact.format in backend.formats or (models if weights else reason is None):
                    pairs.append(Pair(backend, artifact, missing or reason))
    order = [WEIGHTS, *(artifact.name for artifact in bundle.manifest.artifacts)]
    return sorted(pairs, key=lambda pair: order.index(pair.name))


def _pairs_of(bundle: Bundle, backend: Backend) -> list[Pair]:
    manifest, state = bundle.manifest, backend.availability()
    if not state.ok:
        message = f"the {backend.name} backend does not run here: {state.reason}"
        raise DeviceUnavailable(message, hint=state.hint)
    pairs = [Pair(backend, a, backend.supports(manifest, a)) for a in manifest.artifacts]
    if any(pair.reason is None for pair in pairs):
        return pairs
    if backend.supports(manifest, None) is None:
        return [Pair(backend, None)]
    raise runs_nothing(backend, bundle)


def emulated(facts: SessionFacts) -> str | None:
    """What to say of a runtime that computes a quantised artifact without its 8 bits; None of others."""
    if facts.precision not in get_args(Quantised) or facts.precision in re.findall(r"\w+", facts.executes):
        return None
    return (
        f"{facts.artifact} on {facts.backend} computes in {facts.executes}: {facts.precision} is emulated "
        "there, which proves its answers and says nothing of its speed"
    )


@dataclass
class _Verification:
    bundle: Bundle
    options: Options
    batches: Sequence[int] | None
    progress: Progress
    records: list[ParityRecord] = field(default_factory=list)
    executed: set[str] = field(default_factory=set)
    """Artifacts that a backend has run, or has failed to."""
    skipped: list[SkippedArtifact] = field(default_factory=list)
    accuracy: list[AccuracyRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fusion: list[Fusion] = field(default_factory=list)
    references: set[str] = field(default_factory=set)
    """What accuracy records call the reference, of each image size."""

    def run(self, pairs: Sequence[Pair], images: LabelledImages | None) -> None:
        for size in dict.fromkeys(pair.size for pair in pairs):
            mine = [pair for pair in pairs if pair.size == size]
            self._run_size(self.bundle.of(mine[0].artifact), mine, images)

    def _run_size(self, bundle: Bundle, pairs: Sequence[Pair], images: LabelledImages | None) -> None:
        """Run what is of one image size, of which the bundle is a view."""
        answers: dict[str, tuple[str, TopClasses]] = {}
        for pair in pairs:
            if pair.reason is not None:
                self.skipped.append(SkippedArtifact(pair.name, pair.backend.name, pair.reason))
                continue
            reads = pair.artifact is not None and pair.artifact.format in pair.backend.formats
            if reads:
                self.executed.add(pair.name)
            try:
                with pair.backend.load(bundle, pair.artifact, self.options) as session:
                    if reads and not session.facts.uses_files:
                        self.executed.remove(pair.name)
                        why = "its files are not for this machine; what was compared was compiled here"
                        self.skipped.append(SkippedArtifact(pair.name, pair.backend.name, why))
                    self._check_parity(pair, session, bundle.golden(pair.artifact))
                    if images is not None and pair.name not in answers:
                        classes = self._top_classes(bundle, session, images)
                        answers[pair.name] = pair.backend.name, classes
            except BundleError as error:
                self.failures.append(f"{pair.name} on {pair.backend.name}: {error.message}")
        if images is not None and answers:
            reference = self._reference(bundle, answers, images, named(REFERENCE, pairs[0].size))
            for name, (backend, classes) in answers.items():
                self.accuracy.append(score(name, backend, classes, reference, images.labels))

    def _check_parity(self, pair: Pair, session: Session, golden: Mapping[str, Any]) -> None:
        with self.progress.stage(f"{pair.name}") as stage:
            bound = self.bundle.manifest.max_abs
            records = check_session(session, golden, batches=self.batches, max_abs=bound)
            worst = [r.metrics.relative for r in records if r.metrics.relative is not None]
            stage.detail = f"{pair.backend.name}, relative error {max(worst, default=float('nan')):.1e}"
        self.records += records
        if said := emulated(session.facts):
            self.notes.append(said)
        self._note_processor(pair, session.facts)
        self._note_widened(pair, session.facts)
        if session.facts.fusion:
            self.fusion.append(Fusion(pair.name, pair.backend.name, session.facts.fusion))
        for record in records:
            self.failures += [f"{record.title}: {reason}" for reason in record.failures]

    def _note_processor(self, pair: Pair, facts: SessionFacts) -> None:
        """Say once for each int8 artifact that this processor has no instructions for it."""
        record = pair.artifact.quantisation if pair.artifact else None
        if record is None or facts.precision != "int8" or facts.device != "cpu":
            return
        note = processor_note(find_cpu(), record.weight_bits)
        if note is not None and (said := f"{pair.name}: {note}") not in self.notes:
            self.notes.append(said)

    def _note_widened(self, pair: Pair, facts: SessionFacts) -> None:
        if pair.artifact is None or not pair.artifact.is_quantised or facts.device != "cpu":
            return
        if sites := pair.backend.widened(self.bundle, pair.artifact):
            count = len(pair.artifact.quantisation.sites) if pair.artifact.quantisation else 0
            more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
            share = f"{len(sites)} of its {count} quantised GEMMs"
            named = f"{', '.join(sites[:3])}{more}"
            self.notes.append(f"{pair.name} on {pair.backend.name} computes {share} in floats: {named}")

    def judge_drops(self, max_drop: float | None) -> None:
        """Hold artifacts' accuracy against the reference's; without a number, that of quantised ones."""
        quantised = {artifact.name for artifact in self.bundle.manifest.artifacts if artifact.is_quantised}
        for record in self.accuracy:
            if record.model in self.references or (max_drop is None and record.model not in quantised):
                continue
            held, said = judge_quantised(record) if max_drop is None else judge_drop(record, max_drop)
            if held:
                self.notes.append(f"{record.model}: {said}")
            else:
                self.failures.append(f"{record.model}: {said}")

    def require_all(self, not_executed: Sequence[str]) -> None:
        """An artifact that nothing here can run is not verified, and neither is an empty bundle."""
        for name in not_executed:
            reasons = [f"{s.backend}: {s.reason}" for s in self.skipped if s.artifact == name]
            why = "; ".join(reasons) or "no backend reads its format"
            self.failures.append(f"{name}: no backend here runs it ({why})")
        if not self.records and not self.failures:
            self.failures.append("nothing was compared: the bundle has no artifacts")

    def _top_classes(self, bundle: Bundle, session: Session, images: LabelledImages) -> TopClasses:
        with self.progress.stage("accuracy") as stage:
            classes = top_classes(Predictor(bundle, session), images)
            stage.detail = f"{session.facts.artifact}, {len(images.labels)} images"
        return classes

    def _reference(
        self,
        bundle: Bundle,
        answers: dict[str, tuple[str, TopClasses]],
        images: LabelledImages,
        name: str,
    ) -> TopClasses:
        """What the reference model says, under its name; without torch, what the most exact artifact says."""
        backend = get_backend("torch")
        if backend.availability().ok and backend.supports(bundle.manifest, None) is None:
            with backend.load(bundle, None, Options(threads=self.options.threads)) as session:
                classes = self._top_classes(bundle, session, images)
            self.accuracy.append(score(name, backend.name, classes, classes, images.labels))
            self.references.add(name)
            return classes
        exact = min(
            (a for a in bundle.manifest.artifacts if a.name in answers),
            key=lambda artifact: EXACTNESS.index(artifact.precision),
        )
        self.notes.append(f"agreement is with {exact.name}: the reference model itself does not run here")
        return answers[exact.name][1]
