"""The measurement of one model, part by part, on servers that all run at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import ROOT
from benchmarks.serving import arrivals, limits, mlperf, record, servers
from benchmarks.serving.driving import Driver, Served, alone
from benchmarks.serving.processes import ServerFailure
from benchmarks.serving.raw import Sessions, plans, raw_sessions, run_seconds
from benchmarks.serving.rounds import closed_loop
from benchmarks.serving.settings import Plan
from benchmarks.serving.subjects import KINDS, Subject
from vitdeploy.backends.base import Array
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.bundle.folder import Bundle
from vitdeploy.progress import Progress

_LOADGEN = "loadgen"
"""The part, among what was left out."""


class Measurement:
    """How one model is measured.

    Args:
        peers: names of ``servers.PEERS``.
    """

    def __init__(self, subject: Subject, plan: Plan, peers: Sequence[str], progress: Progress) -> None:
        self._subject, self._plan, self._peers, self._progress = subject, plan, peers, progress
        self._served: list[tuple[Served, Subject]] = []
        self._skipped: dict[str, str] = {}

    def measure(self, parts: Sequence[str], kept: record.Record, command: str) -> dict[str, Any]:
        """Measure some parts; returns the record, with the others as they were.

        Raises:
            ServerFailure, WorkerFailure: our own server or the sessions cannot be measured.
        """
        found: dict[str, Any] = {"closed": kept.get("closed", {})}
        for name in ("at_80_percent", "highest_rate", "overload", "loadgen", "limits"):
            found[name] = kept.get(name)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitdeploy-serving-")))
            if "limits" in parts:
                with self._progress.stage("what the processors can do"):
                    found["limits"] = limits.measure(self._subject, self._plan)
            if {"closed", "open", "loadgen"} & {*parts}:
                self._start(folder, stack, alone=not {"closed", "loadgen"} & {*parts})
            if "closed" in parts:
                found["closed"] = self._closed(folder)
            if "open" in parts:
                found |= self._open(found["closed"]["tensor"], folder)
            if "loadgen" in parts:
                found["loadgen"] = self._loadgen(found["closed"].get("tensor"), folder)
        if "open" in parts:
            found["overload"] = self._overload(found["closed"]["tensor"]) if self._plan.overload else None
        return {**self._heading(parts, kept, command), **found}

    def _heading(self, parts: Sequence[str], kept: record.Record, command: str) -> dict[str, Any]:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        environment = find_environment(ROOT, ["onnxruntime"])
        made = {
            "created": created,
            "command": command,
            "revision": environment.git.model_dump(mode="json") if environment.git else None,
            "settings": {**dataclasses.asdict(self._plan), "batches": list(self._plan.batches)},
        }
        manifest, names = self._subject.bundle.manifest, {server.name for server, _ in self._served}
        known = {*names, *map(record.family, names), *self._skipped} | {_LOADGEN} & {*parts}
        old = [one for one in kept.get("skipped", ()) if one["lane"] not in known]
        return {
            "schema_version": record.SCHEMA,
            "model": self._subject.name,
            "bundle": {
                "digest": manifest.digest,
                "artifact": self._subject.artifact.name,
                "backend": "onnxruntime",
            },
            "created": created,
            "environment": environment.model_dump(mode="json"),
            "parts": {**kept.get("parts", {}), **dict.fromkeys(parts, made)},
            "bytes": {
                "tensor": int(self._subject.pixels[0].nbytes),
                "image": round(float(np.mean([len(data) for data in self._subject.images]))),
            },
            "versions": {**kept.get("versions", {}), **self._told("versions")},
            "notes": {**kept.get("notes", {}), **self._told("note")},
            "skipped": [*old, *({"lane": lane, "reason": why} for lane, why in self._skipped.items())],
        }

    def _told(self, what: str) -> dict[str, Any]:
        told = ((server.name, getattr(server, what)) for server, _ in self._served)
        return {name: dict(value) if what == "versions" else value for name, value in told if value}

    def _start(self, folder: Path, stack: contextlib.ExitStack, *, alone: bool) -> None:
        """Every server that can be had, proven right, and why others cannot; or ours alone."""
        subject, threads = self._subject, self._plan.threads
        with self._progress.stage("start vitdeploy") as stage:
            ours = stack.enter_context(servers.vitdeploy(subject, folder))
            stage.detail = ours.note
        self._served.append((ours, subject))
        if alone:
            return
        self._served.append((stack.enter_context(servers.generator(subject, folder)), subject))
        starts = [(name, start) for name in self._peers for start in servers.PEERS[name]]
        for name, start in starts:
            with self._attempt(name) as own:
                self._served.append((own.enter_context(start(subject, threads, folder)), subject))
                stack.push(own.pop_all())
        if self._plan.optimized:
            with self._attempt(servers.OPTIMIZED) as own:
                picked = servers.picked(subject)
                server = own.enter_context(servers.vitdeploy(picked, folder, servers.OPTIMIZED))
                self._served.append((server, picked))
                stack.push(own.pop_all())

    @contextlib.contextmanager
    def _attempt(self, name: str) -> Iterator[contextlib.ExitStack]:
        """A lane that need not be there; one that is not is recorded with the reason."""
        with self._progress.stage(f"start {name}") as stage:
            try:
                with contextlib.ExitStack() as own:
                    yield own
            except ServerFailure as error:
                stage.detail = f"SKIPPED: {error}"
                self._skipped[name] = str(error)

    def _closed(self, folder: Path) -> dict[str, Any]:
        found, driver = {}, Driver(folder)
        for kind in KINDS:
            with contextlib.ExitStack() as stack:
                raws = [
                    stack.enter_context(raw_sessions(self._subject, kind, sessions, folder))
                    for sessions in plans(self._plan.threads)
                ]
                lanes = [server for server, _ in self._served]
                found[kind] = closed_loop(kind, lanes, raws, driver, self._plan, self._progress)
        return found

    def _open(self, closed: dict[str, Any], folder: Path) -> dict[str, Any]:
        ours, driver, capacity = self._served[0][0], Driver(folder), _capacity(closed)
        perfect = self._perfect(closed)
        plan, progress = self._plan, self._progress
        with alone(ours, (server for server, _ in self._served)):
            return {
                "at_80_percent": arrivals.at_load(ours, capacity, perfect, driver, plan, progress),
                "highest_rate": arrivals.highest_rate(ours, capacity, driver, plan, progress),
            }

    def _perfect(self, closed: dict[str, Any]) -> Callable[[Array], Array]:
        """The latencies of a server that costs nothing but the sessions, at the speed of these rounds."""
        sessions, most = serving_plan(self._subject, self._plan.threads)
        rows = [row for row in closed["raw"] if Sessions(row["sessions"], row["threads"]) == sessions]
        rows = rows or [row for row in closed["raw"] if row["sessions"] == 1]
        times = {row["batch"]: float(np.median(row["seconds"])) for row in rows}
        count = rows[0]["sessions"]
        return lambda due: arrivals.ideal_latencies(due, lambda size: run_seconds(size, times), most, count)

    def _overload(self, closed: dict[str, Any]) -> dict[str, Any]:
        """On a server of its own, with a short queue."""
        with tempfile.TemporaryDirectory(prefix="vitdeploy-serving-") as text:
            folder, flags = Path(text), ("--max-queue", str(arrivals.OVERLOAD_QUEUE))
            with (
                self._progress.stage("overload"),
                servers.vitdeploy(self._subject, folder, flags=flags) as server,
            ):
                return arrivals.overload(server, _capacity(closed), Driver(folder), self._plan)

    def _loadgen(self, closed: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
        """Of the ways to set up a peer, the fastest; None where LoadGen is not to be had."""
        lanes = [(s, subject) for s, subject in self._served if s.name != servers.GENERATOR]
        expected: dict[str, float] = {}
        if closed is not None:
            expected = {name: record.middle(found) for name, found in record.rates(closed).items()}
            families: dict[str, list[str]] = {}
            for name in record.peers(closed):
                families.setdefault(record.family(name), []).append(name)
            slower = {n for names in families.values() for n in names} - {
                record.best(closed, names) for names in families.values()
            }
            lanes = [(server, subject) for server, subject in lanes if server.name not in slower]
        running = [server for server, _ in self._served]
        try:
            return mlperf.measure(lanes, running, expected, self._plan, folder, self._progress)
        except ServerFailure as error:
            self._skipped[_LOADGEN] = str(error)
            return None


def _capacity(closed: dict[str, Any]) -> float:
    """Images per second of our own server with as many clients as batches take."""
    return float(np.median(record.rates(closed)[servers.OURS]))


def serving_plan(subject: Subject, threads: int) -> tuple[Sessions, int]:
    """How ``vitdeploy serve`` runs a bundle that it has loaded, and its largest useful batch."""
    choices = Bundle.open(subject.bundle.root).manifest.choices
    mine = [one for one in choices if one.artifact == subject.artifact.name and one.goal != "latency"]
    if not mine:
        return Sessions(1, threads), subject.artifact.batch.opt
    return Sessions(mine[-1].concurrency, mine[-1].threads or threads), mine[-1].batch
