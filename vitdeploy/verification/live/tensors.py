"""The golden tensors replayed on a live server: every encoding, several batch sizes, and the latency."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitdeploy.backends.base import run_in_batches
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import ParityRecord
from vitdeploy.config import BatchRange
from vitdeploy.errors import UsageError
from vitdeploy.progress import Progress
from vitdeploy.verification.live.client import AnswerError, Array, Client
from vitdeploy.verification.live.report import Latency
from vitdeploy.verification.live.session import Encoding, LiveSession
from vitdeploy.verification.live.signature import Signature
from vitdeploy.verification.live.target import Judged, Target
from vitdeploy.verification.parity import TOLERANCES, check_session, failures

MOST = 32
"""Images in a request at most, unless more are asked for: larger ones prove nothing more."""

_MOST_BYTES = 32 * 2**20
"""In a request at most, likewise: half of what `vitdeploy serve` takes."""

_MIDDLE = 3
"""A batch size that no engine is built for: the server has to fill it up, and to cut the answer."""

_JSON_ELEMENTS = 2**20
"""Numbers in a JSON request at most: as text they are slow to write and to read."""

_LATENCY_SECONDS = 10.0
"""Calls for the latency end after this long; a few are made in any case."""
_LEAST_CALLS = 5


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
    encoding: Encoding | None = None
    """One that the server takes; None if it takes none."""

    @property
    def fits(self) -> ArtifactPrecision | None:
        """The most exact precision whose tolerances every answer keeps; None if there is none."""
        order: tuple[ArtifactPrecision, ...] = ("fp32", "fp16", "bf16")  # mixed has fp16's
        for precision in order:
            bounds = TOLERANCES[precision]
            if self.records and not any(failures(record.metrics, bounds) for record in self.records):
                return precision
        return None


def plan_batches(
    bundle: Bundle,
    judged: Judged,
    target: Target,
    fixed: int | None,
    wanted: Sequence[int] | None,
    image_bytes: int,
) -> Batches:
    """Choose batch sizes: the least, three, and the most the server takes, up to 32 and to 32 MiB.

    Args:
        fixed: the one batch size that the server takes, if that does not vary.
        wanted: what the user asked for.

    Raises:
        UsageError: a size that the server does not take.
    """
    ranges = [judged.artifact.batch] if judged.artifact else [a.batch for a in bundle.manifest.artifacts]
    most = max((batch.max for batch in ranges), default=MOST)
    least = min((batch.min for batch in ranges), default=1)
    if target.model.max_batch is not None:
        least, most = 1, target.model.max_batch
    if fixed is not None:
        least = most = fixed
    if wanted is not None and target.model.max_batch is None and fixed is None:
        most = max(most, *wanted)  # nobody says what it takes
        least = min(least, *wanted)
    for size in wanted or ():
        if not least <= size <= most:
            served = f"{least}" if least == most else f"{least} to {most}"
            raise UsageError(f"batch size {size}, but {target.title} on the server takes {served}")
    middle = min(max(_MIDDLE, least), most)
    largest = max(least, min(most, MOST, _MOST_BYTES // image_bytes))
    sizes = tuple(wanted or sorted({least, min(middle, largest), largest}))
    return Batches(sizes, BatchRange(least, least, most))


def replay(
    client: Client,
    target: Target,
    signature: Signature,
    judged: Judged,
    batches: Batches,
    golden: Mapping[str, Array],
    max_abs: float | None,
    progress: Progress,
) -> Replay:
    """Hold the server against the float64 reference, in every encoding and at every batch size.

    An encoding that the server refuses as such is a note, as long as it takes another one.

    Raises:
        ServerError: the server cannot be asked.
        ParityError: the bundle has no golden data that proves anything.
    """
    done = Replay()
    refused: dict[Encoding, AnswerError] = {}
    encodings: tuple[Encoding, ...] = ("binary", "json")
    for encoding in encodings if client.address.protocol == "http" else ("protobuf",):
        session = LiveSession(client, target, signature, judged.precision, batches.served, encoding)
        errors = _replay_in(session, batches, golden, max_abs, progress, done)
        if not any(record.provider == encoding for record in done.records) and errors[0][1].refused:
            refused[encoding] = errors[0][1]
        else:
            done.failures += [f"{where}: {error.message}" for where, error in errors]
    for encoding, refusal in refused.items():
        text = f"the server refuses {encoding} tensors: {refusal.message}"
        (done.notes if done.encoding else done.failures).append(text)
    return done


def _replay_in(
    session: LiveSession,
    batches: Batches,
    golden: Mapping[str, Array],
    max_abs: float | None,
    progress: Progress,
    done: Replay,
) -> list[tuple[str, AnswerError]]:
    """Add what one encoding gives to ``done``; returns where the server answered with errors, and with which.

    A server that refuses the smallest batch is not sent the others.
    """
    facts, encoding = session.facts, session.encoding
    errors: list[tuple[str, AnswerError]] = []
    for size in _sizes(batches.sizes, encoding, golden):
        where = f"{facts.artifact} over {facts.backend} ({encoding}), batch {size}"
        try:
            with progress.stage(f"{encoding} {size}") as stage:
                (record,) = check_session(session, golden, batches=[size], max_abs=max_abs)
                relative = record.metrics.relative
                stage.detail = "" if relative is None else f"relative error {relative:.1e}"
        except AnswerError as error:
            errors.append((where, error))
            if error.refused and size == batches.sizes[0]:
                break
            continue
        done.records.append(record)
        done.failures += [f"{where}: {reason}" for reason in record.failures]
        done.encoding = done.encoding or encoding
    done.versions |= session.answered
    return errors


def measure_latency(
    client: Client,
    target: Target,
    signature: Signature,
    batches: Batches,
    encoding: Encoding,
    inputs: Array,
    calls: int,
) -> Latency:
    """Time calls one after the other, each with as few images as the server takes, a new one each time.

    Raises:
        ServerError: the server cannot be asked.
        AnswerError: it answers with an error.
    """
    session = LiveSession(client, target, signature, "fp32", batches.served, encoding)
    name, size = signature.input.name, batches.served.min
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < calls:
        rows = np.arange(len(seconds) * size, (len(seconds) + 1) * size) % len(inputs)
        session.run({name: inputs[rows]})
        seconds.append(session.seconds)
        if len(seconds) >= _LEAST_CALLS and time.perf_counter() - begin > _LATENCY_SECONDS:
            break
    return Latency.of(seconds, size, encoding)


def answers(
    client: Client,
    target: Target,
    signature: Signature,
    batches: Batches,
    encoding: Encoding,
    inputs: Array,
) -> Array:
    """What the server gives for each golden image (K, ...), as few at a time as it takes.

    Raises:
        ServerError, AnswerError: as :func:`measure_latency`.
    """
    session = LiveSession(client, target, signature, "fp32", batches.served, encoding)
    return np.concatenate(run_in_batches(session, inputs, batches.served.min))[: len(inputs)]


def _sizes(sizes: Sequence[int], encoding: Encoding, golden: Mapping[str, Array]) -> list[int]:
    """Those that an encoding is tried with; the first of them always."""
    inputs = golden.get("pixel_values")
    numbers = int(np.prod(inputs.shape[1:])) if inputs is not None else 0
    small = [size for size in sizes if encoding != "json" or size * numbers <= _JSON_ELEMENTS]
    return small or [min(sizes)]
