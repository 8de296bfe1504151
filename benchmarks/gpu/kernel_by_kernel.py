"""Every kernel at a model's shapes by every route, checked against float64 and held against its prediction.

The routes of a product: the fused kernel; what the tables call "cublas"; and cuBLASLt's product alone, plain
and as ``out += x @ weight`` in place (beta = 1), which no route with the same result can beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import torch
from models import SHAPES, table_of
from stopwatch import Deadline, stand_in_timer, summary

from kernel_tools.cost import Chip, floor, terms, work
from kernel_tools.predictions import foretold
from vitdeploy_kernels.config import Table
from vitdeploy_kernels.problems import Problem, build
from vitdeploy_kernels.specs import Spec, flops, model_specs
from vitdeploy_kernels.timing import Run, Timer, graph_timer, input_sets, median

BATCHES = (64, 1)
PRODUCTS = ("layernorm_linear", "linear_residual")


def chip_of(path: Path) -> Chip:
    """The GPU of a record, with the ceilings measured there."""
    where, ceilings = record.last(path, "environment"), record.last(path, "ceilings")
    return Chip(
        where.get("gpu", "CPU"),
        where.get("multiprocessors", 1),
        ceilings["matmul_flops"],
        ceilings["copy_bytes_per_s"],
        capability=tuple(where.get("capability", (9, 0))),
    )


def products(spec: Spec, device: torch.device, sets: int) -> Mapping[str, list[Run]]:
    """cuBLASLt's products of a spec's shape, on random operands."""
    rows, columns, depth = spec.shape

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, device=device) * 1e-2).half()

    x = [random(rows, depth) for _ in range(sets)]
    weights = [random(depth, columns) for _ in range(sets)]
    out = [torch.zeros(rows, columns, dtype=torch.float16, device=device) for _ in range(sets)]

    def plain(place: int) -> Run:
        return lambda: torch.mm(x[place], weights[place], out=out[place])  # type: ignore[return-value]

    def added(place: int) -> Run:
        return lambda: out[place].addmm_(x[place], weights[place])  # type: ignore[return-value]

    return {
        "product alone": [plain(place) for place in range(sets)],
        "product, beta = 1": [added(place) for place in range(sets)],
    }


def measure(spec: Spec, table: Table, device: torch.device, chip: Chip, timer: Timer) -> dict[str, Any]:
    """One kernel at one shape: error, times by route, floor, and what the cost model expected."""

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
    routes: dict[str, list[Run]] = {"fused": [launch.run for launch in launches]}
    if first.unfused is not None:
        routes["as the tables' cublas"] = [each.unfused(table) for each in problems if each.unfused]
    if spec.kernel in PRODUCTS:
        routes |= products(spec, device, len(problems))
    samples = timer(routes)
    todo = work(launches[0], chip.capability)
    predicted = terms(todo, chip)
    least, fused = 1e6 * floor(todo, chip), median(samples["fused"])
    return {
        "kernel": spec.kernel,
        "shape": list(spec.shape),
        "options": dict(spec.options),
        "config": entry.config.as_list(),
        "chosen": entry.route,
        "wrong": wrong,
        "flops": todo.flops,
        "bytes": todo.size,
        "floor_us": round(least, 3),
        "predicted_us": round(1e6 * predicted.seconds, 3),
        "predicted_wait": predicted.bound,
        "predicted_before_us": foretold(chip.name, spec),
        "share_of_floor": round(least / fused, 4),
        "routes": {name: summary(found, "us") for name, found in samples.items()},
    }


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--table", type=Path, help="configurations; the shipped ones when omitted")
    parser.add_argument("--label", default="now", help="which kernels these are, of now or of before")
    parser.add_argument("--kernels", nargs="*", help="these only; all when omitted")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    given = parser.parse_args()
    deadline = Deadline(given.seconds)
    recorder = record.Recorder(given.record, given.rehearse)
    device = torch.device("cpu") if given.rehearse else torch.device("cuda", 0)
    table = table_of(given.table, device)
    chip = chip_of(given.record)
    timer = stand_in_timer if given.rehearse else graph_timer
    model = "rehearsed" if given.rehearse else "B/16"
    shape = SHAPES[model]
    for batch in (1,) if given.rehearse else given.batches:
        counts = model_specs(shape, torch.float16, batch, table)
        norm = Spec("add_layernorm", (batch * shape.tokens, shape.width))
        for spec in sorted((norm, *counts), key=flops, reverse=True):
            if given.kernels and spec.kernel not in given.kernels:
                continue
            if deadline.left <= 0:
                print(f"the time is up before batch {batch}: {spec}")
                return
            row = measure(spec, table, device, chip, timer)
            launches = counts.get(spec, 0)
            recorder.add("kernel", label=given.label, model=model, batch=batch, launches=launches, **row)
            times = (f"{name} {found['median_us']}" for name, found in row["routes"].items())
            said = f"predicted {row['predicted_us']}" + f", WRONG: {row['wrong']}" * bool(row["wrong"])
            print(f"{spec}, us: {'; '.join(times)}; {said}", flush=True)


if __name__ == "__main__":
    main()
