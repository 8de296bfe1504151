"""The golden tensors replayed on a live server: every encoding, several batch sizes, and the latency.

A live model is a session there, so that it is held against the reference as any other is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vitdeploy.backends.base import Array, Session, SessionFacts, run_in_batches
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import REFERENCE
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.config import BatchRange, Output
from vitdeploy.errors import UsageError
from vitdeploy.predictor import EXACTNESS
from vitdeploy.progress import Progress
from vitdeploy.verification.live.client import AnswerError, Client
from vitdeploy.verification.live.discovery import ExpectedPrecision, LiveModel
from vitdeploy.verification.live.report import Latency
from vitdeploy.verification.live.signature import ModelSignature
from vitdeploy.verification.parity import TOLERANCES, check_session, tolerance_failures

Encoding = Literal["binary", "json", "protobuf"]

MOST = 32
"""Images in a request at most, unless more are asked for: larger ones tell nothing more."""

_MOST_BYTES = 32 * 2**20
"""In a request at most, likewise: half of what `vitdeploy serve` takes."""

_MIDDLE = 3
"""A batch size that no engine is built for: the server has to fill it up, and to cut the answer."""

_JSON_ELEMENTS = 2**20
"""Numbers in a JSON request at most: as text they are slow to write and to read."""

_LATENCY_SECONDS = 10.0
"""Calls for the latency end after this long; a few are made in any case."""
_LEAST_CALLS = 5


class LiveSession(Session):
    """Runs arrays on a live server.

    ``run`` raises ServerError where the server cannot be asked, and AnswerError where it answers with an
    error, without the output, or from another version than the one asked for.
    """

    def __init__(
        self,
        client: Client,
        model: LiveModel,
        signature: ModelSignature,
        precision: ArtifactPrecision,
        batch: BatchRange,
        encoding: Encoding,
    ) -> None:
        super().__init__(
            SessionFacts(
                backend=client.address.protocol,
                artifact=model.title,
                precision=precision,
                executes="",
                device="",
                provider=encoding,
                batch=batch,
                inputs=(signature.input,),
                outputs=signature.outputs,
                versions={model.server.name: model.server.version},
                rebuild="--batch says which sizes are sent",
            )
        )
        self.encoding = encoding
        self.at = model.at
        self.least = batch.min
        """Images in a request."""
        self.answered: set[str] = set()
        """Versions that answered."""
        self.seconds = 0.0
        """That the last run took."""
        self._client = client
        self._model = model

    def answer_all(self, inputs: Array, output: Output) -> Array:
        """An output (K, ...) for inputs (K, ...), as few at a time as the server takes."""
        parts = run_in_batches(self, inputs, self.least)
        return np.concatenate([part[output] for part in parts])[: len(inputs)]

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names, asked = [spec.name for spec in self.facts.outputs], self._model.asked
        answer = self._client.infer(self._model.name, asked, inputs, names, as_json=self.encoding == "json")
        for name in names:
            if name not in answer.outputs:
                given = ", ".join(answer.outputs) or "none at all"
                raise AnswerError(f"the answer lacks the output {name}; it has {given}")
        if answer.version:
            self.answered.add(answer.version)
        if asked and answer.version not in ("", asked):
            raise AnswerError(f"version {answer.version} answers, version {asked} was asked")
        for name in names:
            if answer.outputs[name].dtype.kind not in "fiu":
                raise AnswerError(f"the output {name} has no numbers in it")
        self.seconds = answer.seconds
        return {name: answer.outputs[name] for name in names}

    def _close(self) -> None:
        """The client belongs to whoever made it."""


@dataclass(frozen=True)
class Batches:
    """Which batch sizes are sent."""

    sizes: tuple[int, ...]
    served: BatchRange


@dataclass
class Replay:
    """What replaying the golden tensors gave."""

    records: list[ParityRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    """That answered."""
    session: LiveSession | None = None
    """In the first encoding that the server takes; None if it takes none."""


def fits(replayed: Sequence[Replay]) -> ArtifactPrecision | None:
    """The most exact precision whose tolerances every answer keeps; None if there is none."""
    records = [record for one in replayed for record in one.records]
    for precision in (name for name in EXACTNESS if name != "mixed"):  # which has fp16's
        bounds = TOLERANCES[precision]
        known = all(bounds.mean is None or record.metrics.mean_relative is not None for record in records)
        if known and records and not any(tolerance_failures(record.metrics, bounds) for record in records):
            return precision
    return None


def plan_batches(
    bundle: Bundle,
    expected: ExpectedPrecision,
    model: LiveModel,
    fixed: int | None,
    asked: Sequence[int] | None,
    image_bytes: int,
) -> Batches:
    """Choose batch sizes: the least, three, and the most the server takes, up to 32 and to 32 MiB.

    Args:
        fixed: the one batch size that the server takes, if that does not vary.
        asked: the sizes that the user asks for.

    Raises:
        UsageError: a size that the server does not take.
    """
    ranges = [expected.artifact.batch] if expected.artifact else [a.batch for a in bundle.manifest.artifacts]
    most = max((batch.max for batch in ranges), default=MOST)
    least = min((batch.min for batch in ranges), default=1)
    if model.facts.max_batch is not None:
        least, most = 1, model.facts.max_batch
    if fixed is not None:
        least = most = fixed
    if asked is not None and model.facts.max_batch is None and fixed is None:
        most = max(most, *asked)  # nobody says what it takes
        least = min(least, *asked)
    for size in asked or ():
        if not least <= size <= most:
            served = f"{least}" if least == most else f"{least} to {most}"
            raise UsageError(f"batch size {size}, but {model.title} on the server takes {served}")
    middle = min(max(_MIDDLE, least), most)
    largest = max(least, min(most, MOST, _MOST_BYTES // image_bytes))
    sizes = tuple(asked or sorted({least, min(middle, largest), largest}))
    return Batches(sizes, BatchRange(least, least, most))


def replay(
    open_session: Callable[[Encoding], LiveSession],
    encodings: Sequence[Encoding],
    sizes: Sequence[int],
    golden: Mapping[str, Array],
    max_abs: float | None,
    progress: Progress,
) -> Replay:
    """Hold the server against the float64 reference, in every encoding and at every batch size.

    An encoding that the server refuses as such is a note, as long as it takes another one.

    Raises:
        ServerError: the server cannot be asked.
        ParityError: the bundle has no golden data to compare with.
    """
    replayed = Replay()
    refused: dict[Encoding, AnswerError] = {}
    for encoding in encodings:
        session = open_session(encoding)
        errors = _replay_encoding(session, sizes, golden, max_abs, progress, replayed)
        if not any(record.provider == encoding for record in replayed.records) and errors[0][1].refused:
            refused[encoding] = errors[0][1]
        else:
            replayed.failures += [f"{where}: {error.message}" for where, error in errors]
    for encoding, refusal in refused.items():
        text = f"the server refuses {encoding} tensors: {refusal.message}"
        (replayed.notes if replayed.session else replayed.failures).append(text)
    return replayed


def _replay_encoding(
    session: LiveSession,
    sizes: Sequence[int],
    golden: Mapping[str, Array],
    max_abs: float | None,
    progress: Progress,
    replayed: Replay,
) -> list[tuple[str, AnswerError]]:
    """Add what one encoding gives; returns where the server answered with errors, and with which.

    A server that refuses the smallest batch is not sent the others.
    """
    facts, encoding = session.facts, session.encoding
    errors: list[tuple[str, AnswerError]] = []
    for size in _affordable_sizes(sizes, encoding, golden):
        where = f"{facts.artifact} over {facts.backend} ({encoding}), batch {size}"
        try:
            with progress.stage(f"{encoding} {size}{session.at}") as stage:
                records = check_session(session, golden, batches=[size], max_abs=max_abs)
                relative = [r.metrics.relative for r in records if r.metrics.relative is not None]
                stage.detail = f"relative error {max(relative):.1e}" if relative else ""
        except AnswerError as error:
            errors.append((where, error))
            if error.refused and size == sizes[0]:
                break
            continue
        replayed.records += records
        for record in records:
            what = f"{where}, {record.output}" if record.output else where
            replayed.failures += [f"{what}: {reason}" for reason in record.failures]
        replayed.session = replayed.session or session
    replayed.versions |= session.answered
    return errors


def _affordable_sizes(sizes: Sequence[int], encoding: Encoding, golden: Mapping[str, Array]) -> list[int]:
    """The batch sizes that an encoding is tried with; the least of them always."""
    counts = {name: int(np.prod(array.shape[1:])) for name, array in golden.items()}
    answers = sum(count for name, count in counts.items() if name.startswith(REFERENCE))
    numbers = max(counts.get("pixel_values", 0), answers)
    small = [size for size in sizes if encoding != "json" or size * numbers <= _JSON_ELEMENTS]
    return small or [min(sizes)]


def measure_latency(session: LiveSession, inputs: Array, calls: int) -> Latency:
    """Time calls one after the other, each with as few images as the server takes.

    Args:
        inputs: (K, ...), taken in turn.

    Raises:
        ServerError: the server cannot be asked.
        AnswerError: it answers with an error.
    """
    name, size = session.facts.inputs[0].name, session.least
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < calls:
        rows = np.arange(len(seconds) * size, (len(seconds) + 1) * size) % len(inputs)
        session.run({name: inputs[rows]})
        seconds.append(session.seconds)
        if len(seconds) >= _LEAST_CALLS and time.perf_counter() - begin > _LATENCY_SECONDS:
            break
    return Latency.of(seconds, size, session.encoding)
