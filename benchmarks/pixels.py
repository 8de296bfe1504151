"""How the cost of an image grows with its pixels: ViT-S/16, Swin-T and ResNet-50 at 128 to 768 pixels a side.

    python -m benchmarks.pixels                      # an hour; writes results/pixels_cpu.json
    python -m benchmarks.pixels --models ResNet-50 --sizes 128 --rounds 2 --output /tmp/pixels.json
    python -m benchmarks.pixels --keep               # measures the bundles of the last time
    python -m benchmarks.pixels --write              # table and plot of the committed record into docs/

Each model at each size is a bundle with random weights in fp32, proven against its float64 reference at
export. ViT and Swin are vitdeploy's own graphs; ResNet-50 is transformers', exported as it is. On each
runtime all models and sizes are loaded in one process and take turns at batch 1, in another order every
round; so a ratio of two sizes is of their two times in one round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vitdeploy
from benchmarks.documents import Part
from benchmarks.peers.environments import ROOT
from benchmarks.spread import quartiles
from vitdeploy.backends.base import Options, Session, get_backend
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.results import write_whole
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ConfigError

if TYPE_CHECKING:
    import torch

WORK = ROOT / "build" / "pixels"
RESULTS = ROOT / "benchmarks" / "results" / "pixels_cpu.json"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/pixels.py")
PLOT = ROOT / "docs" / "pixels.svg"
SIZES = (128, 192, 224, 256, 384, 512, 768)
"""Pixels of a side; with most its double, for what four times the pixels cost."""
THREADS = 2
ROUNDS = 15
BUSY_S, MOST_RUNS = 0.05, 20
"""What a cell takes at least in a round: shorter calls are repeated, so often at most."""
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def _resnet50() -> torch.nn.Module:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model: torch.nn.Module = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    return model


MODELS: Mapping[str, Callable[[], str | torch.nn.Module]] = {
    "ViT-S/16": lambda: "S/16",
    "Swin-T": lambda: "Swin-T",
    "ResNet-50": _resnet50,
}
"""What ``vitdeploy.export`` takes: a named variant, or a module of somebody else's."""


@dataclass(frozen=True)
class Point:
    """A model at a size."""

    model: str
    size: int
    bundle: Bundle

    @property
    def facts(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "model": self.model,
            "size": self.size,
            "flops": manifest.flops,
            "parameters": manifest.parameters,
            "error": max(record.metrics.relative or 0.0 for record in manifest.parity),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write table and plot; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="pixels of a side, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="measure the bundles of the last time")
    parser.add_argument("--write", action="store_true", help="the committed record into docs/")
    options = parser.parse_args(words)
    if options.write:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_whole(PLOT, plot(record))
        PART.publish(table(record), (), write=True)
        return 0
    points = [
        point
        for name in options.models.split(",")
        for size in options.sizes.split(",")
        if (point := prepare(name, MODELS[name], int(size), WORK, keep=options.keep))
    ]
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.pixels", *words]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": THREADS,
        "rounds": options.rounds,
        "environment": find_environment(ROOT, _TITLES).model_dump(mode="json"),
        "cells": [cell for runtime in _TITLES for cell in measured(points, runtime, options.rounds)],
    }
    write_whole(options.output, json.dumps(record, indent=2) + "\n")
    PART.publish(table(record), (), write=False)
    return 0


# --- what is measured ------------------------------------------------------------------------------------


def prepare(
    name: str, make: Callable[[], str | torch.nn.Module], size: int, folder: Path, *, keep: bool = False
) -> Point | None:
    """A model's bundle at a size, made anew or that of the last time; None where there can be none."""
    path = folder / f"{name.replace('/', '-')}-{size}.bundle"
    if not (keep and path.is_dir()):
        print(f"exporting {name} at {size} x {size}", flush=True)
        try:
            vitdeploy.export(make(), path, image_size=size, batch=1, format="onnx", force=True)
        except ConfigError as error:
            print(f"not measured: {error.message}", flush=True)
            return None
    return Point(name, size, Bundle.open(path))


def measured(points: Sequence[Point], runtime: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A cell for each point on a runtime."""
    backend, options = get_backend(runtime), Options(threads=THREADS)
    sessions = [backend.load(point.bundle, point.bundle.artifact("fp32"), options) for point in points]
    try:
        calls = [_call(session, point) for session, point in zip(sessions, points, strict=True)]
        for point, times in zip(points, taking_turns(calls, rounds), strict=True):
            cell = {**point.facts, "runtime": runtime, **times}
            print(point.model, point.size, runtime, f"{cell['ms']['median']:.2f} ms", flush=True)
            yield cell
    finally:
        for session in sessions:
            session.close()


def _call(session: Session, point: Point) -> Callable[[], object]:
    golden = point.bundle.golden()
    inputs = {session.facts.inputs[0].name: np.ascontiguousarray(golden["pixel_values"][:1])}
    return lambda: session.run(inputs)


def taking_turns(calls: Sequence[Callable[[], object]], rounds: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of each call, in milliseconds: quartiles over the rounds, the rounds, the processor's time."""
    random = np.random.default_rng(seed)
    runs = [_runs(call) for call in calls]
    walls: list[list[float]] = [[] for _ in calls]
    processor: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for place in random.permutation(len(calls)):
            begin, used = time.perf_counter(), time.process_time()
            for _ in range(runs[place]):
                calls[place]()
            walls[place].append(1e3 * (time.perf_counter() - begin) / runs[place])
            processor[place].append(1e3 * (time.process_time() - used) / runs[place])
    return [
        {
            "ms": quartiles(wall),
            "rounds_ms": [round(value, 4) for value in wall],
            "processor_ms": round(float(np.median(used)), 4),
        }
        for wall, used in zip(walls, processor, strict=True)
    ]


def _runs(call: Callable[[], object]) -> int:
    """How often it is called in a round, after a call that warms it up."""
    call()
    begin = time.perf_counter()
    call()
    return min(MOST_RUNS, max(1, round(BUSY_S / (time.perf_counter() - begin))))


# --- what is said of it ----------------------------------------------------------------------------------


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands in the document: times by size, then what four times the pixels cost."""
    cells = record["cells"]
    models, sizes = list(dict.fromkeys(cell["model"] for cell in cells)), sorted({c["size"] for c in cells})
    heading = ["pixels"]
    for name in models:
        heading += [f"{name}: GFLOPs", *_TITLES.values()]
    parameters = ", ".join(f"{name} {_parameters(cells, name)}" for name in models)
    lines = [
        "How the cost of an image grows with its pixels: fp32, batch 1, on "
        f"{record['environment']['cpu']['name']}, {record['threads']} threads,",
        f"{record['rounds']} interleaved rounds. Median ms (quartiles over the rounds). FLOPs are of an",
        f"image, a multiply-add counted as two; parameters: {parameters}.",
        "Empty: the model does not take the size (the last map of a Swin has to hold a window).",
        "",
        f"![Latency against image size]({PLOT.name})",
        "",
        f"| {' | '.join(heading)} |",
        "|---" * len(heading) + "|",
    ]
    for size in sizes:
        entries = [f"{size} × {size}"]
        for name in models:
            found = {cell["runtime"]: cell for cell in cells if (cell["model"], cell["size"]) == (name, size)}
            entries.append(f"{next(iter(found.values()))['flops'] / 1e9:.2f}" if found else "")
            entries += [_spread(found[runtime]["ms"], 1) if runtime in found else "" for runtime in _TITLES]
        lines.append(f"| {' | '.join(entries)} |")
    pairs = [(size, 2 * size) for size in sizes if 2 * size in sizes]
    if pairs:
        lines += ["", *_growth(record, models, pairs)]
    lines += ["", f"`{record['command']}`"]
    return "\n".join(lines)


def _growth(
    record: Mapping[str, Any], models: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """What twice the side, four times the pixels, costs: as FLOPs, and as measured round by round."""
    cells = {(cell["model"], cell["size"], cell["runtime"]): cell for cell in record["cells"]}
    heading = ["four times the pixels"]
    for name in models:
        heading += [f"{name}: FLOPs", *_TITLES.values()]
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    for small, large in pairs:
        entries = [f"from {small} to {large}"]
        for name in models:
            both = [[cells.get((name, size, runtime)) for size in (small, large)] for runtime in _TITLES]
            known = [(a, b) for a, b in both if a is not None and b is not None]
            entries.append(f"{known[0][1]['flops'] / known[0][0]['flops']:.2f} ×" if known else "")
            entries += [_ratio(a, b) if a is not None and b is not None else "" for a, b in both]
        yield f"| {' | '.join(entries)} |"


def _ratio(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    ratios = [b / a for a, b in zip(before["rounds_ms"], after["rounds_ms"], strict=True)]
    return _spread(quartiles(ratios), 2, " ×")


def _spread(values: Mapping[str, float], decimals: int, unit: str = "") -> str:
    low, high = (f"{values[key]:.{decimals}f}" for key in ("q1", "q3"))
    return f"{values['median']:.{decimals}f}{unit} ({low} to {high})"


def _parameters(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{next(cell['parameters'] for cell in cells if cell['model'] == name) / 1e6:.1f} M"


def plot(record: Mapping[str, Any]) -> str:
    """Latency against the side of the image as SVG, both axes logarithmic: a panel for each runtime."""
    import io

    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    cells, buffer = record["cells"], io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "pixels", "font.size": 9.0, "axes.grid": True}
    with matplotlib.style.context(settings, after_reset=True):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(_TITLES), sharey=True)
        for axes, (runtime, title) in zip(panels, _TITLES.items(), strict=True):
            for name, marker in zip(dict.fromkeys(cell["model"] for cell in cells), "os^", strict=False):
                line = [cell for cell in cells if (cell["model"], cell["runtime"]) == (name, runtime)]
                sides = [cell["size"] for cell in line]
                axes.plot(sides, [cell["ms"]["median"] for cell in line], marker=marker, label=name)
                quartile = [[cell["ms"][key] for cell in line] for key in ("q1", "q3")]
                axes.fill_between(sides, *quartile, alpha=0.25)
            ticks = sorted({cell["size"] for cell in cells})
            axes.set(xscale="log", yscale="log", title=title, xlabel="pixels of a side")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
        panels[0].set_ylabel("median, ms")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].legend()
        named = {"Creator": None, "Format": None, "Type": None, "Date": record["created"]}
        figure.savefig(buffer, format="svg", metadata=named)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    sys.exit(main())
