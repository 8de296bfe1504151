"""Whole models: the fused runner against the same model with PyTorch's fused attention, as a CUDA graph and
eager, in turns, with parity beside each.

The graph is the fair contestant: ours runs as one, and what eager loses to the host's launches is no merit of
a kernel's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import record
import torch
from models import Model, parity, table_of
from stopwatch import Call, Deadline, graphed, in_turns, stand_in_turns, summary

from vitdeploy_kernels.config import Table
from vitdeploy_kernels.staging import HostRunner

BATCHES = (64, 1, 8, 256)
"""The most telling first."""


@torch.no_grad()
def measure(model: Model, batch: int, table: Table, rehearse: bool) -> dict[str, Any]:
    """One cell: all contestants in turns."""
    images = model.images(batch)
    runner, plain = model.runner(batch, table), model.plain()
    from_host, images_on_host = HostRunner(runner), images.cpu()
    calls: dict[str, Call] = {
        "vitdeploy": lambda: runner(images),
        "sdpa, CUDA graph": graphed(plain, images),
        "sdpa, eager": lambda: plain(images),
        "vitdeploy, from the host": lambda: from_host(images_on_host),
    }
    expected = model.expected(images)
    facts: dict[str, Any] = {
        name: parity(call().to(model.device), expected)  # type: ignore[attr-defined]
        for name, call in calls.items()
    }
    turns = stand_in_turns if rehearse else in_turns
    for name, samples in turns(calls, rounds=9, least_ms=30.0).items():
        facts[name] |= summary(samples, "ms")
    return {"model": model.name, "batch": batch, "contestants": facts}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--label", required=True, help="of the cells in the record: default, tuned")
    parser.add_argument("--table", type=Path, help="configurations; the shipped ones when omitted")
    given = parser.parse_args()
    deadline = Deadline(given.seconds)
    recorder = record.Recorder(given.record, given.rehearse)
    model = Model.of("B/16", given.rehearse)
    table = table_of(given.table, model.device)
    for batch in (2,) if given.rehearse else BATCHES:
        if deadline.left <= 0:
            print(f"the time is up before batch {batch}")
            return
        cell = measure(model, batch, table, given.rehearse)
        recorder.add("cell", label=given.label, **cell)
        times = (f"{name} {facts['median_ms']:.3f}" for name, facts in cell["contestants"].items())
        print(f"{model.name}, batch {batch}, ms: " + "; ".join(times), flush=True)


if __name__ == "__main__":
    main()
