"""What an export costs: seconds and memory of whole processes, with parity inside.

    pytest benchmarks/bench_export.py -k fp32_and_fp16 --benchmark-json=benchmarks/results/export_cpu.json

``python -m benchmarks.costs --write`` makes the table in docs/performance.md of it and of the others.

Memory is the high-water mark of the exporting process. The framework's own share is what the same
command takes with the small digits model, whose weights are 1.3 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.spread import Rounds, quartiles
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.records import BuildJob, BuildResult

_MB = 1e6


_CHILD = """
import sys
from vitdeploy.cli import main
from vitdeploy.machine.memory import peak_memory
code = main(sys.argv[1:])
print(peak_memory())
sys.exit(code)
"""


def export(model: str | Path, folder: Path) -> float:
    """Export in a process of its own and return its peak memory in MB."""
    command = [
        sys.executable,
        "-c",
        _CHILD,
        "export",
        "-m",
        str(model),
        "--fp32",
        "--fp16",
        "--format",
        "onnx",
    ]
    done = subprocess.run(
        [*command, "-o", str(folder), "--force"], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / _MB


@pytest.fixture(scope="module")
def baseline_mb(quick: bool, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The framework's share; not measured for a smoke run."""
    return 0.0 if quick else export("digits", tmp_path_factory.mktemp("digits") / "digits.bundle")


def test_export_vit_b16_fp32_and_fp16(
    benchmark: BenchmarkFixture, vit_b16: Path, tmp_path: Path, baseline_mb: float, rounds: Rounds
) -> None:
    peaks: list[float] = []
    bundle = tmp_path / "b16.bundle"
    benchmark.pedantic(lambda: peaks.append(export(vit_b16, bundle)), rounds=rounds(3), iterations=1)
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


def test_export_digits_fp32_and_fp16(benchmark: BenchmarkFixture, tmp_path: Path, rounds: Rounds) -> None:
    """Most of it is starting: what somebody waits for who tries vitdeploy."""
    peaks: list[float] = []
    bundle = tmp_path / "digits.bundle"
    benchmark.pedantic(lambda: peaks.append(export("digits", bundle)), rounds=rounds(9), iterations=1)
    benchmark.extra_info |= {"processors": os.cpu_count(), "peak_mb": quartiles(peaks)}


@pytest.mark.parametrize("size", ["384", "512x336"])
def test_export_of_a_further_size(
    benchmark: BenchmarkFixture, vit_b16: Path, tmp_path: Path, rounds: Rounds, size: str
) -> None:
    """What a second image size adds to an export of 224 pixels, with and without it in the same rounds."""
    alone: list[float] = []

    def export_at(sizes: str) -> float:
        command = ["export", "-m", str(vit_b16), "--fp16", "--format", "onnx", "--image-size", sizes]
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "vitdeploy", *command, "-o", str(tmp_path / "sizes.bundle"), "--force"],
            stdout=subprocess.PIPE,
            check=True,
        )
        return time.perf_counter() - begin

    def first() -> tuple[tuple[Any, ...], dict[str, Any]]:
        alone.append(export_at("224"))
        return (), {}

    benchmark.pedantic(lambda: export_at(f"224,{size}"), setup=first, rounds=rounds(5), iterations=1)
    both = benchmark.stats.stats.data
    benchmark.extra_info |= {
        "processors": os.cpu_count(),
        "further_over_first_seconds": quartiles([b / a - 1 for a, b in zip(alone, both, strict=True)]),
    }


RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


@pytest.fixture(scope="module")
def onnx_b16(vit_b16: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """ViT-B/16 as fp16 ONNX, unproven: what is measured is the builder of engines."""
    folder = tmp_path_factory.mktemp("onnx") / "b16.bundle"
    command = ["export", "-m", str(vit_b16), "--fp16", "--format", "onnx", "--batch", "1,2,4"]
    subprocess.run([sys.executable, "-m", "vitdeploy", *command, "-o", str(folder)], check=True)
    (artifact,) = Bundle.open(folder).manifest.artifacts
    return artifact.model_copy(update={"path": str(folder / artifact.path)})


def build_rtx(source: Artifact, folder: Path, targets: tuple[str, ...]) -> BuildResult:
    """One engine for each target, in a process of its own, as the export builds them."""
    job = BuildJob(
        flavour="tensorrt-rtx",
        onnx=source.path,
        input=source.inputs[0],
        precision="fp16",
        islands=source.islands,
        profiles=(source.batch,),
        targets=tuple((target,) for target in targets),
        outputs=tuple(str(folder / f"{target}.plan") for target in targets),
    )
    return build_engines(job, lambda phase, fraction: None)


def test_rtx_engine_vit_b16_fp16(
    benchmark: BenchmarkFixture, onnx_b16: Artifact, tmp_path: Path, rounds: Rounds
) -> None:
    """One target, and in the same rounds all six from one parse."""
    one: list[BuildResult] = []
    six_seconds: list[float] = []

    def pair() -> tuple[tuple[Any, ...], dict[str, Any]]:
        begin = time.perf_counter()
        build_rtx(onnx_b16, tmp_path, RTX_TARGETS)
        six_seconds.append(time.perf_counter() - begin)
        return (), {}

    benchmark.pedantic(
        lambda: one.append(build_rtx(onnx_b16, tmp_path, ("sm_89",))),
        setup=pair,
        rounds=rounds(5),
        iterations=1,
    )
    weights = Path(onnx_b16.path).stat().st_size
    assert all(result.proof.ok for result in one)
    benchmark.extra_info |= {
        "processors": os.cpu_count(),
        "tensorrt_rtx": one[0].version,
        "engine_seconds": quartiles([result.engines[0].seconds for result in one]),
        "parse_seconds": quartiles([result.parse_seconds for result in one]),
        "peak_beyond_framework_mb": quartiles([(r.peak_bytes - r.framework_bytes) / _MB for r in one]),
        "engine_over_onnx_bytes": one[0].engines[0].size / weights,
        "six_targets_over_one_seconds": quartiles(
            [six / single for six, single in zip(six_seconds, benchmark.stats.stats.data, strict=True)]
        ),
    }
