"""Which GPU, driver and versions; and its two ceilings: a large matrix product and a large copy."""

from __future__ import annotations

import argparse
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import record
import torch
import triton
from stopwatch import in_turns

from vitdeploy_kernels.timing import median

ROOT = Path(__file__).parents[2]


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


def ceilings(device: torch.device, smoke: bool) -> dict[str, Any]:
    """FLOP/s of a large float16 product and bytes/s of a large copy, both directions counted."""
    size, count = (64, 2**12) if smoke else (8192, 2**30)
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    samples = in_turns(calls, rounds=3 if smoke else 15, least_ms=1.0 if smoke else 20.0)
    return {
        "matmul_flops": 2e3 * size**3 / median(samples["matmul"]),
        "copy_bytes_per_s": 2e3 * count / median(samples["copy"]),
        "matmul_size": size,
        "copy_bytes": count,
        "samples_ms": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu" if given.smoke else "cuda")
    record.update(given.record, environment=environment(device))
    found = ceilings(device, given.smoke)
    record.update(given.record, ceilings=found)
    tera, rate = found["matmul_flops"] / 1e12, found["copy_bytes_per_s"] / 1e12
    print(f"matmul {tera:.1f} TFLOP/s, copy {rate:.2f} TB/s")


if __name__ == "__main__":
    main()
