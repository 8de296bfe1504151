"""What an export costs: seconds and memory of whole processes, with parity inside.

    pytest benchmarks/bench_export.py --benchmark-json=benchmarks/results/export_cpu.json

Memory is the high-water mark of the exporting process. The framework's own share is what the same
command takes with the small digits model, whose weights are 1.3 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from spread import quartiles

_MB = 1e6


# The peak that wait4 reports starts at the parent's own size; the kernel's high-water mark starts at zero.
_CHILD = """
import re, sys
from vitdeploy.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
sys.exit(code)
"""


def export(model: str | Path, folder: Path) -> float:
    """Export in a process of its own and return its peak memory in MB."""
    command = [sys.executable, "-c", _CHILD, "export", "-m", str(model), "--fp32", "--fp16"]
    done = subprocess.run(
        [*command, "-o", str(folder), "--force"], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024 / _MB


@pytest.fixture(scope="module")
def baseline_mb(tmp_path_factory: pytest.TempPathFactory) -> float:
    return export("digits", tmp_path_factory.mktemp("digits") / "digits.bundle")


def test_export_vit_b16_fp32_and_fp16(
    benchmark: BenchmarkFixture, vit_b16: Path, tmp_path: Path, baseline_mb: float
) -> None:
    peaks: list[float] = []
    bundle = tmp_path / "b16.bundle"
    benchmark.pedantic(lambda: peaks.append(export(vit_b16, bundle)), rounds=3, iterations=1)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    weights = manifest["files"]["weights.safetensors"]["size"] / _MB
    benchmark.extra_info |= {
        "processors": os.cpu_count(),
        "peak_mb": quartiles(peaks),
        "framework_mb": round(baseline_mb, 1),
        "weights_mb": round(weights, 1),
        "peak_beyond_framework_over_weights": quartiles([(peak - baseline_mb) / weights for peak in peaks]),
        "parity": {
            f"{r['artifact']} {r['backend']} {r['batch']}": r["metrics"]["relative"]
            for r in manifest["parity"]
        },
    }


def test_help(benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(
        lambda: subprocess.run(
            [sys.executable, "-m", "vitdeploy", "--help"], check=True, capture_output=True
        ),
        rounds=15,
        iterations=1,
    )
