"""Compiles what is launched next, launcher stubs included, in as many processes as there are cores."""

from __future__ import annotations

import os
import time

import kernel_by_kernel
import record
import torch
from end_to_end import BATCHES
from models import Model, table_of
from stopwatch import Deadline

from vitdeploy_kernels.specs import model_specs
from vitdeploy_kernels.warming import Warmer


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--table", help="configurations; the shipped ones when omitted")
    given = parser.parse_args()
    deadline, start = Deadline(given.seconds), time.monotonic()
    model = Model.of("B/16", given.rehearse)
    table = table_of(given.table, model.device)
    processes = 1 if given.rehearse else os.cpu_count() or 1
    with Warmer(torch.float16, processes) as warmer:
        for batch in (1,) if given.rehearse else BATCHES:
            warmer.submit_plan(model.shape, batch, table)
        for batch in (
            (1,) if given.rehearse else kernel_by_kernel.BATCHES
        ):  # their statistics have other tiles
            specs = model_specs(model.shape, torch.float16, batch, table)
            warmer.submit({spec: [table.config(spec.kernel, spec.shape)] for spec in specs})
        left = warmer.finish(deadline.left)
    facts = {"binaries": warmer.count, "unfinished": left, "processes": processes}
    facts["seconds"] = round(time.monotonic() - start, 2)
    record.Recorder(given.record, given.rehearse).add("warm", **facts)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
