"""What starting costs: whole processes, from nothing to the help, the first answer, the server's readiness.

    python -m benchmarks.startup                    # some minutes; writes results/startup_cpu.json
    python -m benchmarks.startup --rounds 3 --output /tmp/startup.json
    python -m benchmarks.startup --write            # the committed record into docs/performance.md

All take turns in shuffled rounds. The files that they read are in the system's cache, and so are compiled
modules: what is measured is the second start on a machine. How long reading the model's file takes from there
is measured in the same rounds. The processor's time, of all threads together, stands beside the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import vitdeploy
from benchmarks.documents import Part
from benchmarks.peers.environments import ROOT
from benchmarks.spread import quartiles
from benchmarks.vits import SIZES, Size, save_vit
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.results import write_whole
from vitdeploy.data import digits_images

WORK = ROOT / "build" / "startup"
RESULTS = ROOT / "benchmarks" / "results" / "startup_cpu.json"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/startup.py")
ROUNDS = 15
VITDEPLOY = (sys.executable, "-m", "vitdeploy")
READY = "serving http"
"""How the line begins that a server says when it takes requests."""
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "help": "`vitdeploy --help`",
        "predict_digits": "`vitdeploy predict`, one image, digits",
        "predict_vit": "`vitdeploy predict`, one image, ViT-B/16 fp32",
        "serve_digits": "`vitdeploy serve` until it is ready, digits",
        "serve_vit": "`vitdeploy serve` until it is ready, ViT-B/16 fp32",
    }
)
MOST: Mapping[str, float] = MappingProxyType({"help": 0.25, "predict_digits": 1.0, "predict_vit": 2.0})
"""Seconds that we claim, beyond reading the model's file where that is measured."""


@dataclass(frozen=True)
class Start:
    """A process that is started in every round."""

    arguments: tuple[str, ...]
    reads: Path | None = None
    """The model's file, where its size matters."""

    @property
    def serves(self) -> bool:
        """Whether it ends when it is told, and is measured until it is ready."""
        return self.arguments[0] == "serve"


def starts(digits: Path, vit: Path) -> Mapping[str, Start]:
    """What is started, by the names of the record, with a bundle of the digits model and one of a ViT."""
    image, model = str(digits_images()[0]), vit / "model.onnx"
    return {
        "help": Start(("--help",)),
        "predict_digits": Start(("predict", str(digits), image)),
        "predict_vit": Start(("predict", str(vit), image), model),
        "serve_digits": Start(("serve", str(digits), "--port", "0")),
        "serve_vit": Start(("serve", str(vit), "--port", "0"), model),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the table; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="the committed table into docs/performance.md")
    options = parser.parse_args(words)
    if options.write:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        PART.publish(table(record), broken_claims(record), write=True)
        return 0
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.startup", *words]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": options.rounds,
        "environment": find_environment(ROOT, ["onnxruntime"]).model_dump(mode="json"),
        "starts": measure(prepare(WORK, SIZES["vit_base_patch16_224"]), options.rounds),
    }
    write_whole(options.output, json.dumps(record, indent=2) + "\n")
    PART.publish(table(record), broken_claims(record), write=False)
    return 0


def prepare(folder: Path, size: Size) -> Mapping[str, Start]:
    """What is started, with bundles that are made anew: the digits model, and a ViT of that size."""
    digits, vit = folder / "digits.bundle", folder / "vit.bundle"
    vitdeploy.export("digits", digits, format="onnx", force=True)
    vitdeploy.export(save_vit(size, folder / "checkpoint"), vit, format="onnx", force=True)
    return starts(digits, vit)


def measure(found: Mapping[str, Start], rounds: int) -> dict[str, Any]:
    """Start everything in every round; one more comes first and is not counted."""
    order, shuffle = list(found), random.Random(0)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in found}
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            for what, seconds in once(found[name]).items():
                taken[name].setdefault(what, []).extend([seconds] * bool(number))
    return {name: {what: quartiles(seconds) for what, seconds in one.items()} for name, one in taken.items()}


def once(start: Start) -> dict[str, float]:
    """Seconds of one process: by the clock, beyond reading its file, and the processor's."""
    reading = 0.0 if start.reads is None else _reading(start.reads)
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*VITDEPLOY, *start.arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if start.serves and line.startswith(READY):
            break
    if start.serves:
        seconds = time.perf_counter() - begin
        process.terminate()
    with process.stderr:
        process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if not start.serves:
        seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(start.arguments)} failed:\n{said}")
    beyond = {} if start.reads is None else {"reading": reading, "beyond_reading": seconds - reading}
    return {"seconds": seconds, **beyond, "processor_seconds": used.ru_utime + used.ru_stime}


def _reading(path: Path) -> float:
    """Seconds of reading a file, once."""
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return time.perf_counter() - begin


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands in the document."""
    cpu = record["environment"]["cpu"]
    lines = [
        f"Whole processes, on {cpu['name']}, {cpu['threads']} threads, {record['rounds']} interleaved",
        "rounds; everything that is read is in the system's cache. Beside the clock's seconds, the",
        "processor's, of all threads.",
        "",
        "| what | seconds (quartiles) | beyond reading the model's file | processor's seconds |",
        "|---|---|---|---|",
        *(
            f"| {TITLES[name]} | {_said(one['seconds'])} | {_said(one.get('beyond_reading'))} | "
            f"{one['processor_seconds']['median']:.2f} |"
            for name, one in record["starts"].items()
        ),
        "",
        f"`{record['command']}`",
    ]
    return "\n".join(lines)


def _said(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def broken_claims(record: Mapping[str, Any]) -> list[str]:
    """What of our claims a record does not bear out; one line each."""
    found = record["starts"]
    measured = {name: found[name].get("beyond_reading", found[name]["seconds"])["median"] for name in MOST}
    return [
        f"{TITLES[name]}: {measured[name]:.2f} s instead of {most} s"
        for name, most in MOST.items()
        if measured[name] > most
    ]


if __name__ == "__main__":
    sys.exit(main())
