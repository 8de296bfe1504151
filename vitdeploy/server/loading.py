"""A bundle made ready to be served: how it is asked to run, its sessions, and that they answer rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vitdeploy.backends.base import Options, Session, SessionFacts
from vitdeploy.bundle.choices import write_choices
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.config import Size
from vitdeploy.errors import BundleError, ParityError, UsageError
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, require_size
from vitdeploy.predictor import Predictor, Way, choose, chunk_of
from vitdeploy.server.batcher import BatchingRules
from vitdeploy.server.plan import Wanted, keeps, kept_plan, measured_plan, open_plan, plan_line
from vitdeploy.verification.parity import check_session

_MAX_ROWS = 32
"""Rows of a request, at most, where the session takes any number."""
Plans = Mapping[Size | None, Choice]
"""By image size, as artifacts name it: None is the first."""
_SHORT_RUN = 0.01
"""Seconds: to begin and to end such a run is a good part of its cost, and it keeps nobody waiting."""


@dataclass(frozen=True)
class ModelSettings:
    """How bundles are loaded and requests are bounded; None is the bundle's or the runtime's own choice."""

    backend: str | None = None
    artifact: str | None = None
    options: Options = field(default_factory=Options)
    instances: int | None = None
    """Sessions per model and image size, each with threads of its own; None is what was found best, or 1."""
    plan_seconds: float = 0.0
    """For measuring how the processors are best shared out, of each model; 0 measures nothing. A plan that
    the bundle has for this machine is taken as it is."""
    max_latency_ms: float | None = None
    """Of a plan: what the 99th percentile of a run may take."""
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

    def __post_init__(self) -> None:
        if self.max_latency_ms is not None and (self.wanted.is_fixed or not self.plan_seconds):
            raise UsageError(
                "--max-latency-ms chooses among plans that are measured, and none is",
                hint="without --plan-seconds 0, and without one of --instances, --threads and --max-batch",
            )

    @property
    def wanted(self) -> Wanted:
        """What is asked of a plan."""
        return Wanted(self.instances, self.options.threads, self.max_batch, self.buckets, self.max_latency_ms)

    def rules(self, facts: SessionFacts, chunk: int, planned: int | None = None) -> BatchingRules:
        """How this session's requests are batched.

        Args:
            chunk: images that are usually run together, if nothing says better.
            planned: the batch of a plan.

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
        gather = most if self.max_batch is not None else min(most, planned or usual)
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
    plan: Choice | None = None
    """What it follows; None is what was asked for, or a single session."""
    is_new: bool = False
    """Whether the plan was measured for it."""


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle that can answer."""

    bundle: Bundle
    sizes: tuple[LoadedSize, ...]
    """The default first."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    @property
    def plans(self) -> Plans:
        """Those that are followed."""
        return {size.view.place: size.plan for size in self.sizes if size.plan is not None}

    def close(self) -> None:
        """Free what the runtime holds."""
        for size in self.sizes:
            for predictor in size.predictors:
                predictor.close()


def load_bundle(path: Path, settings: ModelSettings, running: Plans | None = None) -> LoadedBundle:
    """Open a bundle and check that it answers rightly here before anybody asks it; not on the event loop.

    What is measured for that is kept in the bundle, where it can be written.

    Args:
        running: the plans of what is in service meanwhile: measuring and it would disturb each other.

    Raises:
        BundleError, UsageError, DeviceUnavailable, MissingDependency: it cannot be run as asked.
        ParityError: its outputs are not the reference's.
    """
    bundle = Bundle.open(path)
    if bundle.sizes and not isinstance(settings.fit, str):
        require_size(settings.fit, bundle.sizes)
    loaded: list[LoadedSize] = []
    views = bundle.views
    try:
        for view in views:
            before = running.get(view.place) if running else None
            loaded.append(_load_size(view, settings, settings.plan_seconds / len(views), before))
    except BaseException:
        LoadedBundle(bundle, tuple(loaded)).close()
        raise
    bundle, notes = _keep_plans(bundle, loaded, settings)
    return LoadedBundle(bundle, tuple(loaded), notes)


def _load_size(view: Bundle, settings: ModelSettings, seconds: float, running: Choice | None) -> LoadedSize:
    way = choose(view, settings.backend, settings.artifact, settings.options)

    def rules_of(facts: SessionFacts, planned: int | None = None) -> BatchingRules:
        return settings.rules(facts, chunk_of(facts, way.batch), planned)

    plan: Choice | None
    sessions: Sequence[Session]
    known = _known_plan(view, way, settings.wanted, running)
    if known is not None:
        plan, sessions = known, open_plan(view, way, known)
    elif seconds and _can_be_measured(view, way, settings.wanted):
        plan, sessions = measured_plan(view, way, settings.wanted, rules_of, seconds)
    else:
        count = settings.instances or (way.picked.concurrency if way.picked else 1)
        plan, sessions = None, way.backend.load_several(view, way.artifact, way.options, count)
    try:
        rules = rules_of(sessions[0].facts, plan.batch if plan else None)
        _require_parity(sessions, view, sorted({rules.padded(1), rules.padded(rules.gather)}))
    except BaseException:
        for session in sessions:
            session.close()
        raise
    predictors = tuple(Predictor(view, session, way.note) for session in sessions)
    return LoadedSize(view, predictors, rules, plan, is_new=plan is not known)


def _known_plan(view: Bundle, way: Way, wanted: Wanted, running: Choice | None) -> Choice | None:
    """The plan that the bundle has, else that of what is running."""
    kept = kept_plan(view, way, wanted.max_latency_ms) if wanted.is_free else None
    return kept or (running if running and running.backend == way.backend.name else None)


def _can_be_measured(view: Bundle, way: Way, wanted: Wanted) -> bool:
    """Whether there is something to search, processors decide, and there are images to run."""
    on_gpu = way.backend.traits.uses_gpu(way.options.provider)
    return not (wanted.is_fixed or on_gpu) and "pixel_values" in view.golden(way.artifact)


def _keep_plans(
    bundle: Bundle, loaded: Sequence[LoadedSize], settings: ModelSettings
) -> tuple[Bundle, tuple[str, ...]]:
    """Put plans that are new and hold for everybody into the bundle; returns it, and what to say of all."""
    plans = [(size.plan, size.is_new) for size in loaded if size.plan is not None]
    notes = [f"plan: {plan_line(plan)}{'' if new else _since(plan)}" for plan, new in plans]
    good = [plan for plan, new in plans if new and keeps(plan)]
    if settings.wanted.is_free and good:
        try:
            bundle = write_choices(bundle, *good)
        except BundleError as error:
            notes.append(f"the plan is measured again at the next start: {error.message}")
    return bundle, tuple(notes)


def _since(plan: Choice) -> str:
    found = "measured" if plan.goal == "serving" else f"picked for {plan.goal}"
    return f", as {found} on {plan.created[:10]}"


def _require_parity(sessions: Sequence[Session], view: Bundle, batches: Sequence[int]) -> None:
    """Compare each with the reference, all at the same time; warms them up besides."""
    golden = view.golden(sessions[0].facts.artifact)

    def check(session: Session) -> list[ParityRecord]:
        return check_session(session, golden, batches=batches, max_abs=view.manifest.max_abs)

    with ThreadPoolExecutor(len(sessions)) as pool:
        records = [record for found in pool.map(check, sessions) for record in found]
    for record in records:
        if not record.passed:
            raise ParityError(
                f"{view.root}: {record.artifact} on {record.backend} is not served: its outputs are wrong "
                f"at {record.place}: {record.failures[0]}",
                hint=f"vitdeploy verify {view.root}",
            )
