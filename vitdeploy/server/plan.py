"""How a served model shares out the processors: as asked for, as its bundle says, else as measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from vitdeploy.backends.base import Session, SessionFacts
from vitdeploy.bundle.choices import files_of
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.config import size_name
from vitdeploy.machine.identity import installed_version, this_machine
from vitdeploy.machine.processors import Share, cores, processors, shares
from vitdeploy.predictor import Way
from vitdeploy.server.batcher import BatchingRules
from vitdeploy.server.plan_search import Cell, Search, SideBySide, Sizes, batch_sizes


@dataclass(frozen=True)
class Wanted:
    """What the user says of a plan; what is None is searched."""

    sessions: int | None = None
    threads: int | None = None
    batch: int | None = None
    buckets: tuple[int, ...] = ()
    """Batch sizes to choose from."""
    max_latency_ms: float | None = None
    """What the 99th percentile of a run may take while all sessions run."""

    @property
    def is_free(self) -> bool:
        """Whether nothing is fixed, so that the plan is one for everybody."""
        return (self.sessions, self.threads, self.batch, self.buckets) == (None, None, None, ())

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to search."""
        return None not in (self.sessions, self.threads, self.batch)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The ways to share out the processors that are left."""
        ours = processors()
        if self.sessions is not None:
            threads = self.threads or (max(1, ours // self.sessions) if self.sessions > 1 else None)
            return (Share(self.sessions, threads),)
        if self.threads is not None:
            counts = [share.sessions for share in shares(max(1, ours // self.threads))]
            return tuple(Share(count, self.threads) for count in counts)
        return shares(ours, cores())

    def sizes(self, rules: BatchingRules, facts: SessionFacts) -> Sizes:
        """The batch sizes that are left, of a session batched by these rules if nothing is measured."""
        if self.batch is not None:
            return Sizes((rules.gather,))
        if self.buckets:
            return Sizes(rules.buckets)
        return batch_sizes(facts.batch.min if facts.batch else 1, rules.gather, rules.max_rows)


def kept_plan(bundle: Bundle, way: Way, max_latency_ms: float | None) -> Choice | None:
    """The plan that a bundle of one image size has for this machine: an earlier server's, or what
    ``bench --pick throughput`` or ``optimize --goal throughput`` chose; None where there is none for this
    latency, or the artifact or the runtime is another one since."""
    known = [choice for choice in bundle.manifest.choices if choice.goal == "serving"]
    if way.picked is not None and way.picked.goal == "throughput":
        known.append(way.picked)
    if not known:
        return None
    said = {**_subject(bundle, way), "max_latency_ms": max_latency_ms}
    unsaid: dict[str, object] = {"versions": {}, "files": {}}  # nothing is known to have changed
    for choice in known:
        if all(getattr(choice, name) in (value, unsaid.get(name, value)) for name, value in said.items()):
            return choice.model_copy(update={"image_size": bundle.place})
    return None


def open_plan(bundle: Bundle, way: Way, plan: Choice) -> tuple[Session, ...]:
    """The sessions of a plan."""
    return open_share(bundle, way, Share(plan.concurrency, plan.threads))


def open_share(bundle: Bundle, way: Way, share: Share) -> tuple[Session, ...]:
    """The sessions of a share. Where several would spin, each would keep the cores of the others busy."""
    options = replace(way.options, threads=share.threads, spin=way.options.spin and share.sessions == 1)
    return way.backend.load_several(bundle, way.artifact, options, share.sessions)


def measured_plan(
    bundle: Bundle,
    way: Way,
    wanted: Wanted,
    rules: Callable[[SessionFacts], BatchingRules],
    seconds: float,
) -> tuple[Choice, Sequence[Session]]:
    """Measure what serves most on this machine, and return it with its sessions.

    Args:
        bundle: of one image size, with golden inputs.
        rules: how a session is batched if nothing is measured.

    Raises:
        UsageError, BundleError, DeviceUnavailable, MissingDependency: it cannot be run as asked.
    """

    def sizes_of(session: Session) -> Sizes:
        return wanted.sizes(rules(session.facts), session.facts)

    search = Search(
        open_share=lambda share: open_share(bundle, way, share),
        sizes_of=sizes_of,
        probe=SideBySide(bundle.golden(way.artifact)["pixel_values"]),
        seconds=seconds,
        max_latency=None if wanted.max_latency_ms is None else wanted.max_latency_ms / 1000,
    )
    cell, sessions = search.run(wanted.shares)
    return _record(bundle, way, wanted, cell), sessions


def plan_line(plan: Choice) -> str:
    """``2 sessions of 1 thread, batch 1: 11.8 images/s, p99 171 ms``; with what it does not keep."""
    several = "s" * (plan.concurrency != 1)
    threads = "the runtime's own threads"
    if plan.threads is not None:
        threads = f"{plan.threads} thread{'s' * (plan.threads != 1)}"
    size = f" at {size_name(plan.image_size)}" if plan.image_size else ""
    p99 = f", p99 {plan.p99_ms:.3g} ms" if plan.p99_ms is not None else ""
    missed = "" if keeps(plan) else f"; no plan keeps {plan.max_latency_ms:g} ms, this one comes nearest"
    return (
        f"{plan.concurrency} session{several} of {threads}{size}, batch {plan.batch}: "
        f"{plan.images_per_s:.1f} images/s{p99}{missed}"
    )


def keeps(plan: Choice) -> bool:
    """Whether a plan keeps the latency that it was made for."""
    limit, p99 = plan.max_latency_ms, plan.p99_ms
    return limit is None or p99 is None or p99 <= limit


def _record(bundle: Bundle, way: Way, wanted: Wanted, cell: Cell) -> Choice:
    return Choice(
        **_subject(bundle, way),
        goal="serving",
        max_latency_ms=wanted.max_latency_ms,
        threads=cell.share.threads,
        batch=cell.batch,
        concurrency=cell.share.sessions,
        p50_ms=_ms(cell.p50),
        p99_ms=_ms(cell.p99),
        images_per_s=round(cell.rate, 2),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        image_size=bundle.place,
    )


def _subject(bundle: Bundle, way: Way) -> dict[str, Any]:
    """What a plan is of, as fields of a choice."""
    traits = way.backend.traits
    versions = {library: installed_version(library) for library in traits.libraries}
    return {
        "machine": this_machine(),
        "backend": traits.name,
        "provider": (way.options.provider or traits.providers[0]) if traits.providers else None,
        "artifact": way.artifact.name if way.artifact else None,
        "versions": {library: version for library, version in versions.items() if version},
        "files": files_of(bundle, way.artifact),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
