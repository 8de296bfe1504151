"""Which GPU, driver and versions; and its ceilings: a product, a copy from memory and one from the L2 cache,
and what lies between two kernels of a graph that have nothing to do.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import record
import torch
import triton
from stopwatch import in_turns, stand_in_turns

from vitdeploy_kernels.graphs import capture
from vitdeploy_kernels.timing import median

ROOT = Path(__file__).parents[2]
LAUNCHES = 200
"""Of the empty kernel in a graph."""


@triton.jit
def empty_kernel():
    pass


def output_of(*command: str) -> str | None:
    """The first line that a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": output_of("git", "rev-parse", "HEAD"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        query = (
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm",
            "--format=csv,noheader",
        )
        facts |= {
            "gpu": gpu.name,
            "capability": [gpu.major, gpu.minor],
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
            "driver_power_clock": output_of(*query),
        }
    return facts


def ceilings(device: torch.device, rehearse: bool) -> dict[str, Any]:
    """FLOP/s of a large float16 product and bytes/s of two copies, both directions counted.

    The small copy's source and target fill a quarter of the L2 cache together.
    """
    size, count, cache = (64, 2**12, 2**10) if rehearse else (8192, 2**30, _cache(device))
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    product = torch.empty_like(a)
    source, near = torch.randn(count // 4, device=device), torch.randn(cache // 32, device=device)
    target, close = torch.empty_like(source), torch.empty_like(near)
    calls = {
        "matmul": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
        "l2": lambda: close.copy_(near),
    }
    samples = (stand_in_turns if rehearse else in_turns)(calls, rounds=15, least_ms=20.0)
    return {
        "matmul_flops": 2e3 * size**3 / median(samples["matmul"]),
        "copy_bytes_per_s": 2e3 * count / median(samples["copy"]),
        "l2_bytes_per_s": 2e3 * 4 * near.numel() / median(samples["l2"]),
        "matmul_size": size,
        "copy_bytes": count,
        "l2_copy_bytes": 4 * near.numel(),
        "samples_ms": samples,
    }


def _cache(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def gap(device: torch.device) -> dict[str, Any]:
    """Microseconds from one empty kernel of a graph to the next."""

    def run() -> None:
        for _ in range(LAUNCHES):
            empty_kernel[(1,)]()

    if device.type != "cuda":
        run()
        return {"median_us": 1.0, "launches": LAUNCHES}
    graph = capture(run, device)
    samples = in_turns({"": graph.replay}, rounds=9, least_ms=5.0)[""]
    return {"median_us": 1e3 * median(samples) / LAUNCHES, "launches": LAUNCHES}


def main() -> None:
    given = record.parser(__doc__).parse_args()
    recorder = record.Recorder(given.record, given.rehearse)
    device = torch.device("cpu" if given.rehearse else "cuda", None if given.rehearse else 0)
    recorder.add("environment", **environment(device))
    found = ceilings(device, given.rehearse)
    recorder.add("ceilings", **found)
    between = gap(device)
    recorder.add("gap", **between)
    tera, rate, near = (found[name] / 1e12 for name in ("matmul_flops", "copy_bytes_per_s", "l2_bytes_per_s"))
    print(f"matmul {tera:.1f} TFLOP/s, copy {rate:.2f} TB/s, of L2 {near:.2f} TB/s", end=", ")
    print(f"empty kernel {between['median_us']:.2f} us")


if __name__ == "__main__":
    main()
