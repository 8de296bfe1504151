"""Hardware counters of the four kernels that matter most, by Nsight Compute where it is installed.

With --launch N this is the program that is profiled: it runs the N-th of :data:`KERNELS` twice.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import record
import torch
from models import SHAPES, table_of
from stopwatch import Deadline

from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.problems import build
from vitdeploy_kernels.specs import spec_of

KERNELS = (
    ("fc1", "blocks.0.mlp.fc1", 64),
    ("fc2", "blocks.0.mlp.fc2", 64),
    ("attention", "blocks.0.attn", 64),
    ("absorbed attention", "blocks.11.attn", 1),
)
"""Name, site in the plan, and batch."""
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
)


def run(number: int, rehearse: bool) -> None:
    """The kernel, once to compile it and once to be profiled."""
    device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
    shape, table = SHAPES["rehearsed" if rehearse else "B/16"], table_of(None, device)
    _, site, batch = KERNELS[number]
    if rehearse:
        site, batch = site.replace("blocks.11", f"blocks.{shape.depth - 1}"), 1
    wanted = [launch for where, launch in launches(shape, torch.float16, batch, table) if where == site]
    spec = spec_of(wanted[-1])
    launch = build(spec, torch.float16, device, 0).launch(table.config(spec.kernel, spec.shape))
    for _ in range(2):
        launch.run()
    if device.type == "cuda":
        torch.cuda.synchronize()


def command(profiler: str, number: int, path: Path) -> list[str]:
    """Nsight Compute over this program; clocks are left as they are."""
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    ours = r"regex:^(layernorm_linear|linear_residual|attention|absorbed_attention)_kernel$"
    which = ["--kernel-name", ours, "--launch-skip", "1", "--launch-count", "1"]
    program = [sys.executable, __file__, "--record", str(path), "--launch", str(number)]
    return [profiler, *options, *which, *program]


def counters_of(text: str) -> dict[str, float | str]:
    """The numbers of a report in CSV: a line of names, one of units, one for the kernel.

    Raises:
        ValueError: there is none.
    """
    table = [row for row in csv.reader(text.splitlines()) if len(row) > 3]
    if len(table) < 3:
        raise ValueError(next(iter(text.strip().splitlines()[-1:]), "nothing was reported"))
    names, units, values = table[0], table[1], table[-1]
    found: dict[str, float | str] = {}
    for name, unit, value in zip(names, units, values, strict=True):
        if name in METRICS:
            number = value.replace(",", "")
            found[f"{name} ({unit})" if unit else name] = float(number) if _is_number(number) else value
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def profile(profiler: str, number: int, path: Path, seconds: float) -> dict[str, Any]:
    """What the profiler says of one kernel, or why it says nothing."""
    try:
        done = subprocess.run(
            command(profiler, number, path), capture_output=True, text=True, timeout=seconds, check=False
        )
        return {"counters": counters_of(done.stdout)}
    except subprocess.TimeoutExpired:
        return {"reason": f"took longer than {seconds:.0f} s"}
    except ValueError as error:
        return {"reason": f"{profiler}: {error}"}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--launch", type=int, help="run this kernel, for the profiler")
    given = parser.parse_args()
    if given.launch is not None:
        return run(given.launch, given.rehearse)
    deadline = Deadline(given.seconds)
    recorder = record.Recorder(given.record, given.rehearse)
    profiler = shutil.which("ncu")
    for number, (name, _, batch) in enumerate(KERNELS):
        facts: dict[str, Any]
        if given.rehearse:
            run(number, rehearse=True)
            facts = {"reason": "a rehearsal profiles nothing"}
        elif profiler is None:
            facts = {"reason": "Nsight Compute (ncu) is not installed"}
        elif deadline.left <= 0:
            facts = {"reason": "the time was up"}
        else:
            facts = profile(profiler, number, given.record, deadline.left)
        recorder.add("counters", kernel=name, batch=batch, **facts)
        print(f"{name}: {facts.get('reason') or facts['counters']}", flush=True)
    return None


if __name__ == "__main__":
    main()
