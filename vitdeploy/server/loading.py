"""A bundle made ready to be served: how it is asked to run, its sessions, and that they answer rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitdeploy.backends.base import Options, Session, SessionFacts
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, require_size
from vitdeploy.predictor import Predictor
from vitdeploy.server.batcher import BatchingRules
from vitdeploy.verification.parity import check_session

_MAX_ROWS = 32
"""Rows of a request, at most, where the session takes any number."""
_SHORT_RUN = 0.01
"""Seconds: to begin and to end such a run is a good part of its cost, and it keeps nobody waiting."""


@dataclass(frozen=True)
class ModelSettings:
    """How bundles are loaded and requests are bounded; None is the bundle's or the runtime's own choice."""

    backend: str | None = None
    artifact: str | None = None
    options: Options = field(default_factory=Options)
    instances: int = 1
    """Sessions per model and image size, each with threads of its own."""
    max_batch: int | None = None
    max_delay: float = 0.0
    """Seconds."""
    max_queue: int = 256
    """Images that wait."""
    timeout: float = 30.0
    """Seconds in the queue."""
    buckets: tuple[int, ...] = ()
    max_pixels: int = 50_000_000
    """Of an image that is sent."""
    fit: Rule = DEFAULT_RULE
    """How an image gets one of several sizes."""

    def rules(self, facts: SessionFacts, chunk: int) -> BatchingRules:
        """How this session's requests are batched.

        Raises:
            UsageError: the session does not run the batch sizes that were asked for.
        """
        least, most = (facts.batch.min, facts.batch.max) if facts.batch else (1, _MAX_ROWS)
        if self.max_batch is not None:
            if facts.batch and self.max_batch > most:
                raise UsageError(
                    f"--max-batch {self.max_batch}, but {facts.artifact} takes {most} at most",
                    hint=facts.rebuild,
                )
            most = self.max_batch
        outside = [size for size in self.buckets if not least <= size <= most]
        if outside:
            raise UsageError(f"--buckets {outside[0]}, but {facts.artifact} runs {least} to {most}")
        usual = max(chunk, facts.batch.opt if facts.batch else 1)
        gather = most if self.max_batch is not None else min(most, usual)
        fixed = (least,) if least > 1 else ()
        return BatchingRules(
            gather=gather,
            max_rows=most,
            short=_SHORT_RUN,
            delay=self.max_delay,
            max_queue=self.max_queue,
            timeout=self.timeout,
            buckets=tuple(sorted({*self.buckets, *fixed, *((most,) if self.buckets else ())})),
        )


@dataclass(frozen=True)
class LoadedSize:
    """One image size of a bundle, with its sessions open and their outputs compared with the reference."""

    view: Bundle
    """The bundle at this size alone."""
    predictors: tuple[Predictor, ...]
    rules: BatchingRules


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle that can answer."""

    bundle: Bundle
    sizes: tuple[LoadedSize, ...]
    """The default first."""

    def close(self) -> None:
        """Free what the runtime holds."""
        for size in self.sizes:
            for predictor in size.predictors:
                predictor.close()


def load_bundle(path: Path, settings: ModelSettings) -> LoadedBundle:
    """Open a bundle and check that it answers rightly here before anybody asks it; not on the event loop.

    Raises:
        BundleError, UsageError, DeviceUnavailable, MissingDependency: it cannot be run as asked.
        ParityError: its outputs are not the reference's.
    """
    bundle = Bundle.open(path)
    if bundle.sizes and not isinstance(settings.fit, str):
        require_size(settings.fit, bundle.sizes)
    loaded: list[LoadedSize] = []
    try:
        for view in bundle.views:
            loaded.append(_load_size(view, settings))
    except BaseException:
        LoadedBundle(bundle, tuple(loaded)).close()
        raise
    return LoadedBundle(bundle, tuple(loaded))


def _load_size(view: Bundle, settings: ModelSettings) -> LoadedSize:
    predictors: list[Predictor] = []
    try:
        for _ in range(settings.instances):
            predictors.append(
                Predictor.open(
                    view, backend=settings.backend, artifact=settings.artifact, options=settings.options
                )
            )
        session = predictors[0].session
        rules = settings.rules(session.facts, predictors[0].chunk)
        batches = sorted({rules.padded(1), rules.padded(rules.gather)})
        for predictor in predictors:
            _require_parity(predictor.session, view, batches)
    except BaseException:
        for predictor in predictors:
            predictor.close()
        raise
    return LoadedSize(view, tuple(predictors), rules)


def _require_parity(session: Session, view: Bundle, batches: Sequence[int]) -> None:
    """Compare with the reference; warms the session up besides."""
    golden = view.golden(session.facts.artifact)
    for record in check_session(session, golden, batches=batches, max_abs=view.manifest.max_abs):
        if not record.passed:
            raise ParityError(
                f"{view.root}: {record.artifact} on {record.backend} is not served: its outputs are wrong "
                f"at {record.place}: {record.failures[0]}",
                hint=f"vitdeploy verify {view.root}",
            )
