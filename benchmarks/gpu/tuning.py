"""Tunes ViT-B/16 on this GPU: the most valuable shapes first; the table is whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import record
import torch
from models import SHAPES
from stopwatch import Deadline, stand_in_timer

from vitdeploy_kernels.config import shipped_table, table_for
from vitdeploy_kernels.timing import graph_timer
from vitdeploy_kernels.tuner import (
    Finding,
    Target,
    contestants_of,
    random_problems,
    specs_of,
    this_gpu,
    tune,
    write_table,
)
from vitdeploy_kernels.warming import Warmer

BATCHES = (64, 1, 8, 256)
STAND_IN = Target("rehearsal", (9, 0), 4, 2**10)


def facts(found: Finding) -> dict[str, Any]:
    """A finding, for the record."""
    entry = found.entry
    return {
        "kernel": found.spec.kernel,
        "shape": list(found.spec.shape),
        "route": None if entry is None else entry.route,
        "config": None if entry is None else entry.config.as_list(),
        "microseconds": {name: round(value, 3) for name, value in found.microseconds.items()},
        "rejected": dict(found.rejected),
    }


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="the folder that the table goes to")
    given = parser.parse_args()
    deadline = Deadline(given.seconds)
    recorder = record.Recorder(given.record, given.rehearse)
    device = torch.device("cpu") if given.rehearse else torch.device("cuda", 0)
    target = STAND_IN if given.rehearse else this_gpu(device)
    table = table_for(device) if given.rehearse else shipped_table(target.capability, target.name)
    model, batches = ("rehearsed", (1,)) if given.rehearse else ("B/16", BATCHES)
    specs = specs_of([SHAPES[model]], batches, torch.float16, table)[:: 3 if given.rehearse else 1]
    processes = 1 if given.rehearse else os.cpu_count() or 1
    with Warmer(torch.float16, processes) as warmer:
        warmer.submit({} if given.rehearse else {s: contestants_of(s, target, table) for s in specs})
        for done, spec in enumerate(specs):
            if deadline.left <= 0:
                print(
                    f"the time is up: {done} of {len(specs)} shapes are tuned, the rest keep their defaults"
                )
                break
            table, findings = tune(
                [spec],
                target,
                table,
                build=random_problems(torch.float16, device),
                timer=stand_in_timer if given.rehearse else graph_timer,
                budget=deadline.left,
                ready=warmer.ready,
                keep=lambda partial: write_table(partial, given.tables),
                report=lambda line: print(line, flush=True),
            )
            for found in findings:
                recorder.add("tuned", **facts(found))


if __name__ == "__main__":
    main()
