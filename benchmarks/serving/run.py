"""vitdeploy's server under load, beside the sessions alone and other servers, on this machine.

    python -m benchmarks.serving.run                               # both models: some 20 minutes
    python -m benchmarks.serving.run --models digits --seconds 1 --rounds 2 -o /tmp
    python -m benchmarks.serving.run --parts open,limits           # the record keeps its other parts

Writes ``serve-<model>.json`` for each model. Its parts: ``closed``, the throughput, with as many clients as
batches take; ``open``, the latencies at a given rate; ``loadgen``, MLPerf's LoadGen; ``limits``, what the
processors can do. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import record, servers
from benchmarks.serving.claims import broken_claims, unmeasured
from benchmarks.serving.measuring import Measurement
from benchmarks.serving.processes import ServerFailure
from benchmarks.serving.settings import PARTS, PLANS, THREADS, Plan
from benchmarks.serving.subjects import prepare
from benchmarks.serving.table import text_of
from vitdeploy.benchmark.results import require_writable
from vitdeploy.cli.output import Stages
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.machine.child import WorkerFailure

_OPTIMIZED = "optimize"
"""The lane of ``vitdeploy optimize``'s pick, among the peers on the command line."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None is the default of each model."""

    models: tuple[str, ...]
    peers: tuple[str, ...]
    parts: tuple[str, ...]
    seconds: float | None
    rounds: int | None
    threads: int
    output: Path

    def file(self, model: str) -> Path:
        """Where the record of a model goes."""
        return self.output / f"serve-{model}.json"

    def plan(self, model: str) -> Plan:
        """How a model is measured."""
        plan = PLANS[model]
        plan = plan if self.rounds is None else plan.with_rounds(self.rounds)
        return dataclasses.replace(
            plan,
            seconds=self.seconds or plan.seconds,
            threads=self.threads,
            optimized=plan.optimized and _OPTIMIZED in self.peers,
        )

    def kept(self, model: str) -> record.Record:
        """The record of a model that there is already, for the parts that are not measured.

        Raises:
            UsageError: the open loop alone, without a throughput that its rates are shares of.
        """
        path = self.file(model)
        old = record.read(path) if path.is_file() else {}
        kept = old if old.get("schema_version") == record.SCHEMA else {}
        if "open" in self.parts and "closed" not in self.parts and "tensor" not in kept.get("closed", {}):
            raise UsageError(f"--parts open: {path} has no throughput yet; measure closed, too")
        return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        wanted = parse(words)
        require_writable([wanted.file(model) for model in wanted.models])
        kept = {model: wanted.kept(model) for model in wanted.models}
        command = shlex.join(["python", "-m", "benchmarks.serving.run", *words])
        doubts = []
        with Stages() as stages:
            for model in wanted.models:
                with stages.stage(f"export {model}"):
                    subject = prepare(model)
                peers = [name for name in wanted.peers if name != _OPTIMIZED]
                measurement = Measurement(subject, wanted.plan(model), peers, stages)
                found = measurement.measure(wanted.parts, kept[model], command)
                record.write(found, wanted.file(model))
                print(f"\n{text_of(found)}\n\n{wanted.file(model)}\n")
                doubts += [f"does not hold: {claim}" for claim in broken_claims(found)]
                doubts += unmeasured(found)
    except VitdeployError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except (ServerFailure, WorkerFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for doubt in doubts:
        print(doubt, file=sys.stderr)
    return 0


def parse(words: Sequence[str]) -> Wanted:
    """The command line.

    Raises:
        UsageError: a model, peer or part that is none, or a number that makes no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    every = (_OPTIMIZED, *servers.PEERS)
    parser.add_argument("--models", default=",".join(PLANS), help="comma-separated")
    parser.add_argument("--peers", default=",".join(every), help=f"among {', '.join(every)}; empty is none")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"among {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, help="of a closed-loop visit; 1.5 for digits, 5 for ViT-B")
    parser.add_argument("--rounds", type=int, help="closed-loop; 5, and of ViT-B with images 2")
    parser.add_argument("--threads", type=int, default=THREADS, help="processors that there are")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS, help="a folder")
    options = parser.parse_args(words)
    numbers = (options.rounds, options.threads, options.seconds)
    if any(number is not None and number <= 0 for number in numbers):
        raise UsageError("--rounds, --threads and --seconds must be positive")
    return Wanted(
        models=_named(options.models, PLANS, "model"),
        peers=_named(options.peers, every, "peer"),
        parts=_named(options.parts, PARTS, "part"),
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


if __name__ == "__main__":
    sys.exit(main())
