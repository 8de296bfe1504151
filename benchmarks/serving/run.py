"""vitdeploy's server under load, beside the raw session and other servers, on this machine.

    python -m benchmarks.serving.run                                       # some 25 minutes
    python -m benchmarks.serving.run --models digits --seconds 1 --rounds 2 -o /tmp

Writes ``serve-<model>.json`` for each model. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import ROOT
from benchmarks.serving import arrivals, record, servers
from benchmarks.serving.driving import Driver, Served
from benchmarks.serving.processes import ServerFailure
from benchmarks.serving.raw import raw_session, run_seconds
from benchmarks.serving.rounds import Plan, closed_loop
from benchmarks.serving.subjects import KINDS, SCOPES, Subject, prepare
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.results import require_writable
from vitdeploy.cli.output import Stages
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.machine.child import WorkerFailure
from vitdeploy.progress import Progress

THREADS = 2
ROUNDS = 5


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None is the default of each model."""

    models: tuple[str, ...]
    peers: tuple[str, ...]
    seconds: float | None
    rounds: int
    threads: int
    output: Path

    def file(self, model: str) -> Path:
        """Where the record of a model goes."""
        return self.output / f"serve-{model}.json"

    def plan(self, model: str) -> Plan:
        """How a model is measured."""
        scope = SCOPES[model]
        return Plan(
            seconds=self.seconds or scope.seconds,
            rounds=self.rounds,
            threads=self.threads,
            clients=scope.clients,
            bound_ms=scope.bound_ms,
            overload=scope.overload,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        wanted = parse(words)
        require_writable([wanted.file(model) for model in wanted.models])
        command = shlex.join(["python", "-m", "benchmarks.serving.run", *words])
        broken = []
        with Stages() as stages:
            for model in wanted.models:
                with stages.stage(f"export {model}"):
                    subject = prepare(model)
                found = measure(subject, wanted.plan(model), wanted.peers, command, stages)
                record.write(found, wanted.file(model))
                print(f"\n{record.table(found)}\n\n{wanted.file(model)}\n")
                broken += record.broken_claims(found)
    except VitdeployError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except (ServerFailure, WorkerFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for claim in broken:
        print(f"does not hold: {claim}", file=sys.stderr)
    return 0


def parse(words: Sequence[str]) -> Wanted:
    """The command line.

    Raises:
        UsageError: a model or peer that is none, or a number that makes no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.run", description=__doc__)
    parser.add_argument("--models", default=",".join(SCOPES), help="comma-separated")
    parser.add_argument("--peers", default=",".join(servers.PEERS), help="comma-separated; empty is none")
    parser.add_argument("--seconds", type=float, help="of a closed-loop visit; 4 for digits, 12 for ViT-B")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS, help="a folder")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.threads < 1 or (options.seconds is not None and options.seconds <= 0):
        raise UsageError("--rounds, --threads and --seconds must be positive")
    return Wanted(
        models=_named(options.models, SCOPES, "model"),
        peers=_named(options.peers, servers.PEERS, "peer"),
        seconds=options.seconds,
        rounds=options.rounds,
        threads=options.threads,
        output=options.output,
    )


def _named(text: str, known: Any, kind: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {kind} {name!r}, only {', '.join(known)}")
    return names


def measure(
    subject: Subject, plan: Plan, peers: Sequence[str], command: str, progress: Progress
) -> dict[str, Any]:
    """Measure one model; returns its record.

    Raises:
        ServerFailure, WorkerFailure: our own server or the session cannot be measured.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitdeploy-serving-")))
        driver = Driver(folder)
        served, skipped = _start_all(subject, plan, peers, folder, stack, progress)
        closed = {}
        for kind in KINDS:
            with raw_session(subject, kind, plan.threads, folder) as raw:
                closed[kind] = closed_loop(kind, served, raw, driver, plan, progress)
        found = {
            **_heading(subject, plan, command),
            "versions": {server.name: dict(server.versions) for server in served},
            "notes": {server.name: server.note for server in served if server.note},
            "skipped": skipped,
            "closed": closed,
        }
        (ours,) = (server for server in served if server.name == servers.OURS)
        capacity = float(np.median(closed["tensor"]["per_s"][servers.OURS]))
        perfect = _perfect(subject, closed["tensor"])
        found["at_80_percent"] = arrivals.at_load(ours, capacity, perfect, driver, plan, progress)
        found["highest_rate"] = arrivals.highest_rate(ours, capacity, driver, plan, progress)
    found["overload"] = _overload(subject, capacity, plan, progress) if plan.overload else None
    return found


def _start_all(
    subject: Subject,
    plan: Plan,
    peers: Sequence[str],
    folder: Path,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> tuple[list[Served], list[dict[str, str]]]:
    """Every server that can be had, proven right, and why others cannot."""
    with progress.stage("start vitdeploy"):
        ours = stack.enter_context(servers.vitdeploy(subject, plan.threads, folder))
        servers.check(ours, subject)
    served, skipped = [ours, stack.enter_context(servers.generator(subject, plan.threads, folder))], []
    for name in peers:
        with progress.stage(f"start {name}") as stage:
            own = contextlib.ExitStack()
            try:
                server = own.enter_context(servers.PEERS[name](subject, plan.threads, folder))
                servers.check(server, subject)
            except ServerFailure as error:
                own.close()
                stage.detail = f"SKIPPED: {error}"
                skipped.append({"lane": name, "reason": str(error)})
            else:
                stack.push(own)
                served.append(server)
    return served, skipped


def _heading(subject: Subject, plan: Plan, command: str) -> dict[str, Any]:
    manifest = subject.bundle.manifest
    (artifact,) = manifest.artifacts
    return {
        "schema_version": 1,
        "model": subject.name,
        "bundle": {"digest": manifest.digest, "artifact": artifact.name, "backend": "onnxruntime"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": find_environment(ROOT, ["onnxruntime"]).model_dump(mode="json"),
        "settings": dataclasses.asdict(plan),
        "bytes": {
            "tensor": int(subject.pixels[0].nbytes),
            "image": round(float(np.mean([len(data) for data in subject.images]))),
        },
    }


def _perfect(subject: Subject, part: dict[str, Any]) -> Any:
    """The latencies of a server that costs nothing but the session, at the speed of these rounds."""
    sizes = {size for one in part["raw_seconds"] for size in one}
    times = {int(n): float(np.median([one[n] for one in part["raw_seconds"]])) for n in sizes}
    (artifact,) = subject.bundle.manifest.artifacts
    return lambda due: arrivals.ideal_latencies(
        due, lambda size: run_seconds(size, times), artifact.batch.opt
    )


def _overload(subject: Subject, capacity: float, plan: Plan, progress: Progress) -> dict[str, Any]:
    """On a server of its own, with a short queue."""
    with tempfile.TemporaryDirectory(prefix="vitdeploy-serving-") as text, progress.stage("overload"):
        folder, flags = Path(text), ("--max-queue", str(arrivals.OVERLOAD_QUEUE))
        with servers.vitdeploy(subject, plan.threads, folder, flags) as server:
            return arrivals.overload(server, capacity, Driver(folder), plan)


if __name__ == "__main__":
    sys.exit(main())
