"""Whole models: the fused runner against eager, SDPA and torch.compile, in turns, with parity beside each.

A first pass measures what starts at once; a second adds the compiled contestants, model by model, as long
as the time suffices. Every cell that is done is in the record.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from plain_vit import PlainViT
from stopwatch import Call, Deadline, in_turns
from torch import Tensor

from vitdeploy_kernels.config import Table, load_table, table_for
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.timing import median, spread
from vitdeploy_kernels.tuner import MODELS
from vitdeploy_kernels.vit import VitShape, VitWeights, random_weights
from vitdeploy_kernels.warming import Warmer

SMOKE = VitShape(image_size=(16, 16), patch=8, width=32, depth=2, heads=2, mlp_width=64, classes=10)
SHAPES = {**MODELS, "smoke": SMOKE}
CELLS = [
    (model, batch)
    for batches in ((64, 1), (8, 256), (32,))
    for model in ("B/16", "L/16")
    for batch in batches
]
"""Model and batch, the most telling first."""
COMPARED = 8
"""Images of a batch that are compared with float64."""
SECONDS_TO_COMPILE = {"default": 25.0, "max-autotune": 60.0}
"""What is expected to be left before a compilation is begun."""


class Bench:
    """One model on one device, with the contestants that are built so far."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, smoke: bool) -> None:
        self.name, self.shape, self.smoke, self.device = name, SHAPES[name], smoke, device
        self.weights = random_weights(self.shape, dtype, device)
        self.models = {
            "eager": PlainViT(self.shape, self.weights, sdpa=False).eval(),
            "sdpa": PlainViT(self.shape, self.weights, sdpa=True).eval(),
        }

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(batch)
        return torch.randn(self.shape.image_shape(batch), generator=generator, device=self.device)

    def expected(self, images: Tensor) -> Tensor:
        """In float64, of the same rounded weights."""
        exact = PlainViT(self.shape, self.weights, sdpa=False).double().eval()
        return exact(images[:COMPARED].to(self.weights.dtype))

    def compile(self, mode: str) -> Callable[[Tensor], Tensor]:
        # A model of its own for each mode: compiled code is kept by the module's class and shapes.
        torch._dynamo.reset()
        backend = {"backend": "aot_eager"} if self.smoke else {"mode": mode}
        return torch.compile(PlainViT(self.shape, self.weights, sdpa=True).eval(), dynamic=False, **backend)


def parity(output: Tensor, expected: Tensor) -> dict[str, float]:
    """Worst relative error of a row, and the share of images with the same best class."""
    got = output[:COMPARED].double()
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    agree = (got.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
    return {"relative_error": float(error.max()), "same_class": float(agree)}


@torch.no_grad()
def measure(
    bench: Bench, batch: int, runner: VitRunner, modes: tuple[str, ...], deadline: Deadline, rounds: int
) -> dict[str, Any]:
    """One cell: all contestants in turns."""
    images = bench.images(batch)
    calls: dict[str, Call] = {"vitdeploy": lambda: runner(images)}
    calls |= {name: lambda model=model: model(images) for name, model in bench.models.items()}
    seconds = {}
    for mode in modes:
        if deadline.left > SECONDS_TO_COMPILE[mode]:
            start = time.monotonic()
            compiled = bench.compile(mode)
            calls[f"compile {mode}"] = lambda compiled=compiled: compiled(images)
            compiled(images)
            seconds[f"compile {mode}"] = round(time.monotonic() - start, 1)
    expected = bench.expected(images)
    facts: dict[str, Any] = {name: parity(call(), expected) for name, call in calls.items()}  # type: ignore[arg-type]
    least = 1.0 if bench.smoke else 30.0
    for name, samples in in_turns(calls, rounds=rounds, least_ms=least).items():
        facts[name] |= {
            "median_ms": round(median(samples), 4),
            "spread": round(spread(samples), 4),
            "samples_ms": [round(sample, 4) for sample in samples],
        }
        if name in seconds:
            facts[name]["compile_seconds"] = seconds[name]
    return {"model": bench.name, "batch": batch, "contestants": facts}


def runners(
    benches: dict[str, Bench], cells: list[tuple[str, int]], table: Table, deadline: Deadline
) -> Callable[[str, int], VitRunner]:
    """Makes runners, whose kernels many processes compile first."""
    if any(bench.device.type == "cuda" for bench in benches.values()):
        dtype = next(iter(benches.values())).weights.dtype
        with Warmer(dtype, os.cpu_count() or 1) as warmer:
            for model, batch in cells:
                warmer.submit_plan(SHAPES[model], batch, table)
            warmer.finish(deadline.left / 2)

    def runner(model: str, batch: int) -> VitRunner:
        weights: VitWeights = benches[model].weights
        return VitRunner(SHAPES[model], weights, batches=[batch], table=table)

    return runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--label", required=True, help="of the part of the record: default, tuned")
    parser.add_argument("--table", type=Path, help="configurations; the shipped ones when omitted")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, in the interpreter")
    given = parser.parse_args()
    deadline = Deadline(given.seconds)
    device = torch.device("cpu" if given.smoke else "cuda")
    table = load_table(given.table) if given.table else table_for(device)
    cells = [("smoke", 3)] if given.smoke else CELLS
    names = dict.fromkeys(model for model, _ in cells)
    benches = {name: Bench(name, device, torch.float16, given.smoke) for name in names}
    runner = runners(benches, cells, table, deadline)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for modes in ((), ("default", "max-autotune")):
        for model, batch in cells:
            if deadline.left <= (min(SECONDS_TO_COMPILE.values()) if modes else 0.0):
                print(f"the time is up before {model}, batch {batch}")
                continue
            rounds = 2 if given.smoke else 9
            cell = measure(benches[model], batch, runner(model, batch), modes, deadline, rounds)
            found[model, batch] = cell
            parts = record.read(given.record).get("end_to_end", {})
            record.update(given.record, end_to_end={**parts, given.label: list(found.values())})
            times = (f"{name} {facts['median_ms']:.3f}" for name, facts in cell["contestants"].items())
            print(f"{model}, batch {batch}, ms: " + ", ".join(times), flush=True)


if __name__ == "__main__":
    main()
