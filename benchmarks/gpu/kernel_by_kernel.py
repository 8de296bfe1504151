"""Every kernel at a model's shapes, checked against float64 and held against its roofline."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from end_to_end import SHAPES
from stopwatch import Deadline

from kernel_tools.cost import Chip, Work, floor, predict, work
from kernel_tools.predictions import foretold
from vitdeploy_kernels.config import Table, load_table, table_for
from vitdeploy_kernels.problems import Problem, build
from vitdeploy_kernels.specs import Spec, flops, model_specs
from vitdeploy_kernels.timing import Run, Timer, graph_timer, input_sets, median, spread

CELLS = (("B/16", 64), ("B/16", 1), ("L/16", 64), ("L/16", 1))


def host_timer(contestants: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Microseconds by the host's clock: shows that the script works, not how fast anything is."""

    def once(runs: Sequence[Run]) -> float:
        start = time.perf_counter()
        for run in runs:
            run()
        return 1e6 * (time.perf_counter() - start) / len(runs)

    return {name: [once(runs) for _ in range(2)] for name, runs in contestants.items()}


def chip_of(facts: Mapping[str, Any]) -> Chip:
    """The GPU of a record, with the ceilings measured there."""
    where, ceilings = facts["environment"], facts["ceilings"]
    return Chip(
        where.get("gpu", "CPU"),
        where.get("multiprocessors", 1),
        ceilings["matmul_flops"],
        ceilings["copy_bytes_per_s"],
    )


def measure(spec: Spec, table: Table, device: torch.device, chip: Chip, timer: Timer) -> dict[str, Any]:
    """One kernel at one shape: error, time, floor, and what the model expected."""

    def make(seed: int) -> Problem:
        return build(spec, torch.float16, device, seed)

    first = make(0)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
    problems = [first, *(make(i) for i in range(1, input_sets(first.size, cache)))]
    entry = table.entry(spec.kernel, spec.shape)
    launches = [problem.launch(entry.config) for problem in problems]
    first.output.fill_(float("nan"))
    launches[0].run()
    wrong = first.wrong(first.expected())
    samples = timer({"": [launch.run for launch in launches]})[""]
    todo: Work = work(launches[0])
    least = 1e6 * floor(todo, chip)
    return {
        "kernel": spec.kernel,
        "shape": list(spec.shape),
        "config": entry.config.as_list(),
        "wrong": wrong,
        "flops": todo.flops,
        "bytes": todo.size,
        "median_us": round(median(samples), 3),
        "spread": round(spread(samples), 4),
        "samples_us": [round(sample, 3) for sample in samples],
        "floor_us": round(least, 3),
        "share_of_floor": round(least / median(samples), 4),
        "predicted_us": round(1e6 * predict(todo, chip), 3),
        "predicted_before_us": foretold(chip.name, spec),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="configurations; the shipped ones when omitted")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, in the interpreter")
    given = parser.parse_args()
    deadline = Deadline(given.seconds)
    device = torch.device("cpu" if given.smoke else "cuda")
    table = load_table(given.table) if given.table else table_for(device)
    chip = chip_of(record.read(given.record))
    timer = host_timer if given.smoke else graph_timer
    found: list[dict[str, Any]] = []
    for model, batch in (("smoke", 1),) if given.smoke else CELLS:
        counts = model_specs(SHAPES[model], torch.float16, batch, table)
        norm = Spec("add_layernorm", (batch * SHAPES[model].tokens, SHAPES[model].width))
        for spec in sorted((norm, *counts), key=flops, reverse=True):
            if deadline.left <= 0:
                print(f"the time is up before {model}, batch {batch}: {spec}")
                return
            row = {"model": model, "batch": batch, "launches": counts.get(spec, 0)}
            row |= measure(spec, table, device, chip, timer)
            found.append(row)
            record.update(given.record, kernels=found)
            share = f"{100 * row['share_of_floor']:.0f} % of its roofline"
            print(
                f"{spec}: {row['median_us']} us, {share}" + (f", WRONG: {row['wrong']}" * bool(row["wrong"]))
            )


if __name__ == "__main__":
    main()
