"""vitdeploy against other tools: the same checkpoints, in the same interleaved rounds, on this machine.

    python -m benchmarks.peers.run                                # everything; more than half an hour
    python -m benchmarks.peers.run --models vit_tiny_patch16_224 --batches 1,8 --budget 30s --output /tmp

Writes ``cpu-<model>.json`` for each model. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vitdeploy
from benchmarks.peers.catalogue import PEERS, case_of
from benchmarks.peers.environments import ROOT, EnvironmentFailure, ensure
from benchmarks.vits import SIZES, save_vit
from vitdeploy.benchmark.cases import BenchTarget, Case, Choices, cases_of, open_targets
from vitdeploy.benchmark.results import Results, SkippedCase, require_writable, write_whole
from vitdeploy.benchmark.run import BenchPlan, run_plan
from vitdeploy.cli.output import Stages
from vitdeploy.cli.parse import duration, integers
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.machine.child import WorkerFailure
from vitdeploy.progress import Progress

WORK = ROOT / "build" / "peers"
RESULTS = ROOT / "benchmarks" / "results"
THREADS = 2


@dataclass(frozen=True)
class Scope:
    """What is measured of a model unless the command line says otherwise."""

    batches: tuple[int, ...]
    budget: float
    """Seconds."""
    ours: frozenset[tuple[str, str]]
    """Backends of ours and their precisions."""
    peers: tuple[str, ...]


_EXPORTED = frozenset({("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")})
OURS = _EXPORTED | {("torch", "fp32"), ("torch-compile", "fp32"), ("aotinductor", "fp32")}
SCOPES: Mapping[str, Scope] = {
    "vit_tiny_patch16_224": Scope((1, 8), 120, OURS, tuple(PEERS)),
    "vit_base_patch16_224": Scope((1, 8, 32), 600, OURS, tuple(PEERS)),
    # All cases are in memory at once, with 2 to 3 GB each: these fit into 24 GB.
    "vit_large_patch16_224": Scope(
        (1, 8),
        240,
        _EXPORTED,
        ("torch-onnx", "optimum", "openvino-convert", "openvino-convert-bf16"),
    ),
}
_LOADING = 1800.0
"""Seconds that a peer may take to export and load."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None is the default of each model."""

    models: tuple[str, ...]
    batches: tuple[int, ...] | None
    budget: float | None
    peers: tuple[str, ...] | None
    threads: int
    output: Path

    def file(self, model: str) -> Path:
        """Where the results of a model go."""
        return self.output / f"cpu-{model}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        wanted = parse(words)
        require_writable([wanted.file(model) for model in wanted.models])
        command = shlex.join(["python", "-m", "benchmarks.peers.run", *words])
        with Stages() as stages:
            for model in wanted.models:
                results = measure(model, wanted, command, stages)
                path = write(results, wanted.file(model))
                print(f"{path}: {len(results.cells)} cells, {results.rounds} rounds")
                for one in results.skipped:
                    print(f"  skipped {one.backend} {one.artifact}: {one.reason}")
                if results.partial:
                    return 130
    except VitdeployError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(words: Sequence[str]) -> Wanted:
    """The command line.

    Raises:
        UsageError: a model, peer, batch or duration that is none.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run", description=__doc__)
    parser.add_argument("--models", default=",".join(SCOPES), help="comma-separated")
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)}; of the large model a few, when omitted")
    parser.add_argument("--batches", help="comma-separated; 1,8, and for ViT-B 32 too, when omitted")
    parser.add_argument("--budget", help="for each model: 90s, 5m")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(words)
    return Wanted(
        models=_named(options.models, SCOPES, "model"),
        batches=None if options.batches is None else tuple(integers(options.batches, "--batches")),
        budget=None if options.budget is None else duration(options.budget),
        peers=None if options.peers is None else _named(options.peers, PEERS, "peer"),
        threads=options.threads,
        output=options.output,
    )


def _named(text: str, known: Mapping[str, object], kind: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {kind} {name!r}, only {', '.join(known)}")
    return names


def measure(model: str, wanted: Wanted, command: str, progress: Progress) -> Results:
    """Measure our backends and the peers on one model."""
    checkpoint, scope = WORK / model / model, SCOPES[model]
    with progress.stage(f"export {model}"):
        target = prepare(checkpoint)
    cases, skipped = our_cases(target, scope.ours, wanted.threads)
    notes: list[str] = []
    for name in scope.peers if wanted.peers is None else wanted.peers:
        with progress.stage(f"prepare {name}") as stage:
            try:
                case, versions = peer_case(name, target, checkpoint, wanted.threads)
                cases.append(case)
                notes.append(versions)
            except (EnvironmentFailure, WorkerFailure) as error:
                peer = PEERS[name]
                stage.detail = f"SKIPPED: {error}"
                skipped.append(
                    SkippedCase(
                        subject=target.name, backend=peer.backend, artifact=peer.artifact, reason=str(error)
                    )
                )
    batches, budget = wanted.batches or scope.batches, wanted.budget or scope.budget
    results = run_plan(BenchPlan(cases, batches, budget, skipped=skipped, command=command), progress=progress)
    return results.model_copy(update={"notes": (*results.notes, *notes)})


def prepare(checkpoint: Path) -> BenchTarget:
    """Make the checkpoint, unless it is there, and our bundle of it, always anew."""
    if not checkpoint.is_dir():
        beside = checkpoint.with_name("unfinished")
        save_vit(SIZES[checkpoint.name], beside).rename(checkpoint)
    folder = checkpoint.with_suffix(".bundle")
    bundle = vitdeploy.export(checkpoint, folder, precision=("fp32", "bf16"), format="onnx", force=True)
    return open_targets([bundle])[0]


def our_cases(
    target: BenchTarget, ours: frozenset[tuple[str, str]], threads: int
) -> tuple[list[Case], list[SkippedCase]]:
    """Our own cases, and why some are not there."""
    cases, skipped = cases_of(target, Choices(threads=(threads,)))
    missing = [one for one in skipped if (one.backend, one.artifact.removeprefix("onnx-")) in ours]
    return [case for case in cases if (case.backend, case.precision) in ours], missing


def peer_case(name: str, target: BenchTarget, checkpoint: Path, threads: int) -> tuple[Case, str]:
    """A peer's case and the versions of what it is made of; its model is exported.

    What is measured later loads a file, and has no exporter in memory.

    Raises:
        EnvironmentFailure: its environment cannot be made.
        WorkerFailure: it cannot export or load the model.
    """
    peer = PEERS[name]
    python = ensure(peer.environment) if peer.environment else None
    case = case_of(peer, target, checkpoint, threads, python)
    worker = case.start(_LOADING)
    try:
        facts = worker.answer()["facts"]
    finally:
        worker.close()
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    return replace(case, size_bytes=facts["size_bytes"]), f"{name}: {versions}"


def write(results: Results, path: Path) -> Path:
    """Write results with a line for each cell; partial ones beside the file, not in its place."""
    document = results.as_dict()
    cells = ",\n".join(json.dumps(cell) for cell in document.pop("cells"))
    text = json.dumps({**document, "cells": "@"}, indent=2).replace('"@"', f"[\n{cells}\n]")
    path = path.with_suffix(".partial.json") if results.partial else path
    write_whole(path, text + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
