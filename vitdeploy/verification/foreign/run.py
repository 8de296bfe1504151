"""Verify a stranger's artifact: find its files, open the checkpoint for each, hold one against the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitdeploy.backends.base import Array, Options
from vitdeploy.bundle.manifest import MANIFEST
from vitdeploy.bundle.proofs import ParityRecord, Tolerance
from vitdeploy.config import Scores
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError, VitdeployError
from vitdeploy.predictor import Predictor
from vitdeploy.progress import Progress
from vitdeploy.scores import scores_of
from vitdeploy.verification.accuracy import (
    REFERENCE,
    AccuracyRecord,
    LabelledImages,
    TopClasses,
    check_max_drop,
    find_labelled,
    judge_drop,
    score,
    top_classes,
)
from vitdeploy.verification.foreign.audit import (
    audit_precision,
    check_labels,
    check_preprocessing,
    check_scores,
)
from vitdeploy.verification.foreign.engine_file import SUFFIXES as ENGINES
from vitdeploy.verification.foreign.engine_file import EngineFile
from vitdeploy.verification.foreign.onnx_file import Described, Interface, OnnxFile, find_files, shown
from vitdeploy.verification.foreign.report import Finding, ForeignReport, State
from vitdeploy.verification.foreign.session import Renamed, open_session
from vitdeploy.verification.foreign.truth import Chosen, Model, Truth, TruthSession
from vitdeploy.verification.foreign.weights import match_weights
from vitdeploy.verification.parity import check_session

# No table can say what a quantised model may lose: that is decided on labelled images. This tells a model
# that was rounded to 8 or 4 bits from another model, whose relative error is near 1.
_QUANTISED = Tolerance(relative=0.3, kl=1.0, batch_invariance=0.3)
_NAMED = 3
"""How many changed tensors a line names."""


def verify_foreign(
    path: Path,
    model: Model | None,
    checkpoint: Path | str | None = None,
    *,
    batches: Sequence[int] | None = None,
    data: Path | None = None,
    max_drop: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> ForeignReport:
    """Hold an ONNX file, or a folder of them, against a checkpoint; ``vitdeploy.verify`` documents the rest.

    Raises:
        UsageError, BundleError, CheckpointError: bad input.
        MissingDependency, DeviceUnavailable: what opens the checkpoint or runs the file is not there.
    """
    check_max_drop(max_drop, data)
    if path.is_dir() and (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} is a bundle, which carries its own reference",
            hint="verify it without -m, or one file of it; with --url, -m is the model's name there",
        )
    job = _Job(model, checkpoint, batches, data, max_drop, options or Options(), progress or Progress())
    if path.is_file() and path.suffix in ENGINES:
        job.run_engine(EngineFile(path))
        return job.report(path, [path.name])
    files = find_files(path)
    refused: list[VitdeployError] = []
    for place, name in files:
        file = OnnxFile(place, name)
        try:
            job.run(file)
        except (UsageError, DeviceUnavailable, BundleError) as error:
            if len(files) == 1:
                raise
            refused.append(error)
            # Another kind of model is left out; one of images that does not run is none that holds.
            state: State = "failed" if isinstance(error, BundleError) else "not checked"
            job.add(file, "parity", state, error.message.removeprefix(f"{place}: "))
    if not job.records and len(refused) == len(files):
        raise refused[0]
    return job.report(path, [name for _, name in files])


@dataclass
class _Job:
    model: Model | None
    checkpoint: Path | str | None
    batches: Sequence[int] | None
    data: Path | None
    max_drop: float | None
    options: Options
    progress: Progress
    records: list[ParityRecord] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    accuracy: list[AccuracyRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = ""
    _truths: dict[tuple[object, ...], Truth] = field(default_factory=dict)
    _answers: dict[Truth, TopClasses] = field(default_factory=dict)

    def add(self, file: Described, check: str, state: State, detail: str) -> None:
        self.findings.append(Finding(file.name, check, state, detail))

    def run(self, file: OnnxFile) -> None:
        """Hold an ONNX file against the checkpoint."""
        truth = self._truth(file.interface)
        chosen = truth.choose()
        ending = file.ending(chosen.value.name)
        session = open_session(file, chosen, truth.size, self.options)
        right = self._parity(file, truth, chosen, session, ending)
        if right and file.claim[0] in ("fp16", "mixed"):
            why = "this CPU may compute fp16 in fp32, where nothing overflows"
            self.add(file, "overflow", "not checked", why)
        self.findings.append(audit_precision(file))
        self._weights(file, truth, wrong=not right)
        self._words(file, truth)

    def run_engine(self, engine: EngineFile) -> None:
        """Hold an engine against the checkpoint."""
        truth = self._truth(engine.interface)
        chosen = truth.choose()
        self._parity(engine, truth, chosen, engine.open(chosen, truth.size), "none")
        for check in ("precision", "weights"):
            self.add(
                engine, check, "not checked", "an engine does not tell them: verify the ONNX file before it"
            )
        self._words(engine, truth)

    def report(self, path: Path, files: Sequence[str]) -> ForeignReport:
        return ForeignReport(
            path=path,
            checkpoint=self.source,
            files=tuple(files),
            parity=tuple(self.records),
            findings=tuple(self.findings),
            accuracy=tuple(self.accuracy),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _words(self, file: Described, truth: Truth) -> None:
        """What is said of the file, rather than what it computes."""
        self.findings += check_labels(file, truth)
        self.findings += check_scores(file, truth)
        self.findings += check_preprocessing(file, truth)
        self.notes += file.said.notes

    def _parity(
        self, file: Described, truth: Truth, chosen: Chosen, session: Renamed, ending: Scores
    ) -> bool:
        """Run a file on the golden inputs, and on labelled images; closes the session."""
        with session, self.progress.stage(file.name) as stage:
            trials = []
            for words, golden in truth.meanings(chosen.output):
                golden["reference"] = scores_of(golden["reference"], ending)
                trials.append((words, self._records(file, session, golden)))
                if all(record.passed for record in trials[-1][1]):
                    break
            words, records = min(trials, key=lambda trial: _worst(trial[1]))
            stage.detail = f"relative error {_worst(records):.1e}"
            self._judge(file, chosen, words, records, ending)
            if self.data is not None:
                self._accuracy(file, truth, chosen, session, ending)
        return all(record.passed for record in records)

    def _truth(self, interface: Interface) -> Truth:
        """The checkpoint at this file's size; files that take the same share it."""
        key = (interface.dtype, interface.kind, interface.channels, interface.size)
        if key not in self._truths:
            with self.progress.stage("checkpoint") as stage:
                truth = Truth.open(self.model, self.checkpoint, interface)
                stage.detail = f"{truth.source} for {truth.size[0]}x{truth.size[1]} pixels"
            for note in truth.opened.notes:
                self.progress.note(note)
            self._truths[key], self.source = truth, truth.source
        return self._truths[key]

    def _records(self, file: Described, session: Renamed, golden: dict[str, Array]) -> list[ParityRecord]:
        tolerance = _QUANTISED if file.claim[0] == "quantised" else None
        try:
            return check_session(session, golden, batches=self.batches, tolerance=tolerance)
        except BundleError as error:
            if session.facts.batch is not None or self.batches is not None:
                raise
            # Batches may be stated to vary, and one be built in.
            records = check_session(session, golden, batches=[1], tolerance=tolerance)
            detail = f"stated to vary, but 8 images fail: {error.message.removeprefix(f'{file.name}: ')}"
            self.add(file, "batch", "failed", detail)
            return records

    def _judge(
        self, file: Described, chosen: Chosen, words: str, records: list[ParityRecord], ending: Scores
    ) -> None:
        self.records += records
        claim, source = file.claim
        batches = ", ".join(str(record.batch) for record in records)
        after = "" if ending == "none" else f" after its own {ending}"
        what = f"{shown(chosen.value.name)}{after}{words} at batch {batches}"
        failed = [record for record in records if not record.passed]
        if failed:
            others = [str(record.batch) for record in failed[1:]]
            also = f" (batch {', '.join(others)} fails, too)" if others else ""
            reasons = "; ".join(failed[0].failures)
            self.add(file, "parity", "failed", f"{what}: batch {failed[0].batch}: {reasons}{also}")
        elif claim == "quantised":
            bound = (
                f"{what}: within {_QUANTISED.relative:g} of float64, which tells it from another model only"
            )
            self.add(file, "parity", "held", bound)
            why = "no table says what a quantised model may lose: --data DIR --max-drop P judges it"
            self.add(file, "tolerance", "not checked", why)
        else:
            bound = f"{what}: within {records[0].tolerance.relative:g} of float64, as {claim} may be"
            self.add(file, "parity", "held", f"{bound}, by {source}")
        self._company(file, records)
        others = [shown(value.name) for value in file.interface.outputs if value != chosen.value]
        if others:
            self.add(
                file,
                "outputs",
                "not checked",
                f"{_some(others)}: only {shown(chosen.value.name)} was compared",
            )

    def _company(self, file: Described, records: list[ParityRecord]) -> None:
        """What other images in the batch change; too much is among parity's failures as well."""
        moved = [r.metrics.batch_invariance for r in records if r.metrics.batch_invariance is not None]
        if moved:
            state: State = "held" if max(moved) <= records[0].tolerance.batch_invariance else "failed"
            self.add(file, "batch invariance", state, f"other company changes an answer by {max(moved):.1e}")
        elif file.interface.batch == 1:
            self.add(file, "batch invariance", "not checked", "its batch is one image")
        else:
            self.add(file, "batch invariance", "not checked", "no batch of several images was compared")

    def _weights(self, file: OnnxFile, truth: Truth, *, wrong: bool) -> None:
        """Name the tensors that were changed, where the outputs are ``wrong`` and they can be told.

        A file that computes the same may have folded or merged them.
        """
        if file.quantised:
            return self.add(file, "weights", "not checked", "quantised: none is as the checkpoint has it")
        match = match_weights(file, truth.state)
        found = f"{match.found} of {match.tensors} tensors are in it bit for bit"
        if wrong and match.differences:
            changed = _some([str(difference) for difference in match.differences])
            return self.add(file, "weights", "failed", f"differs: {changed}; {found}")
        if match.found:
            return self.add(file, "weights", "held", found)
        return self.add(file, "weights", "not checked", "folded, merged or rounded: no tensor can be told")

    def _accuracy(
        self, file: Described, truth: Truth, chosen: Chosen, session: Renamed, ending: Scores
    ) -> None:
        if chosen.output != "logits":
            raise UsageError(
                f"{file.path}: --data needs logits, and {shown(chosen.value.name)} are {chosen.output}"
            )
        assert self.data is not None
        bundle = truth.bundle(file.path, None if ending == "none" else "none")
        images = find_labelled(self.data, bundle.manifest)
        classes = top_classes(Predictor(bundle, session), images)
        reference = self._reference(truth, session, images)
        record = score(file.name, session.facts.backend, classes, reference, images.labels)
        self.accuracy.append(record)
        if self.max_drop is None:
            return
        held, said = judge_drop(record, self.max_drop)
        self.add(file, "accuracy", "held" if held else "failed", said)

    def _reference(self, truth: Truth, session: Renamed, images: LabelledImages) -> TopClasses:
        """What the checkpoint itself says; once for all files that take the same images."""
        if truth not in self._answers:
            with TruthSession(truth, session.facts) as exact:
                found = top_classes(Predictor(truth.bundle(Path(truth.source), None), exact), images)
            self._answers[truth] = found
            self.accuracy.append(score(REFERENCE, "torch", found, found, images.labels))
        return self._answers[truth]


def _worst(records: Sequence[ParityRecord]) -> float:
    """The largest relative error; infinite where nothing finite was compared."""
    relative = [record.metrics.relative for record in records]
    return max((float("inf") if error is None else error for error in relative), default=float("inf"))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
