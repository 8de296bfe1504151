"""Every backend at every batch size, proven against the float64 reference before it is timed.

    pytest benchmarks/bench_models.py --benchmark-json=models.json

One ViT-B/16 in this process, a test after the other: fit for following one backend over time. ``vitdeploy
bench`` compares backends, in interleaved rounds and processes of their own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import vitdeploy
from benchmarks.spread import Rounds
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.verification.parity import check_session

THREADS = 2
ROUNDS = {1: 50, 8: 15, 32: 5}
"""By batch size; with --quick the largest is left out."""
BACKENDS = (
    ("onnxruntime", "fp32", "cpu"),
    ("openvino", "fp32", "cpu"),
    ("openvino", "bf16", "cpu"),
    ("torch", "fp32", "cpu"),
    ("torch-compile", "fp32", "cpu"),
    ("aotinductor", "fp32", "cpu"),
    pytest.param("torch-compile", "bf16", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "bf16", "cuda", marks=pytest.mark.gpu),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = list(ROUNDS)
    metafunc.parametrize("batch", sizes[:-1] if metafunc.config.getoption("--quick") else sizes)


@pytest.fixture(scope="module")
def bundle(quick: bool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ViT-B/16, or the digits model for a smoke run."""
    if quick:
        folder: Path = request.getfixturevalue("digits_bundle")
        return Bundle.open(folder)
    checkpoint: Path = request.getfixturevalue("vit_b16")
    folder = tmp_path_factory.mktemp("models") / "b16.bundle"
    return vitdeploy.export(checkpoint, folder, precision=("fp32", "bf16"), format="onnx")


@pytest.mark.parametrize("backend, precision, device", BACKENDS)
def test_model(
    benchmark: BenchmarkFixture,
    bundle: Bundle,
    backend: str,
    precision: str,
    device: str,
    batch: int,
    rounds: Rounds,
) -> None:
    runtime, artifact = get_backend(backend), bundle.artifact(precision)
    state = runtime.availability()
    reason = runtime.supports(bundle.manifest, artifact) if state.ok else state.reason
    if reason:
        pytest.skip(f"{backend}: {reason}")
    golden = bundle.golden()
    pixels = golden["pixel_values"]
    with runtime.load(bundle, artifact, Options(threads=THREADS, device=device)) as session:
        (record,) = check_session(session, golden, batches=[batch], max_abs=bundle.manifest.max_abs)
        assert record.passed, f"a fast wrong model is no result: {record.failures}"
        benchmark.extra_info |= {
            "model": bundle.manifest.name,
            "batch": batch,
            "threads": THREADS,
            "executes": session.facts.executes,
            "versions": dict(session.facts.versions),
            "parity": {
                "relative": record.metrics.relative,
                "max_abs": record.metrics.max_abs,
                "tolerance": record.tolerance.relative,
            },
        }
        inputs = {session.facts.inputs[0].name: np.ascontiguousarray(pixels[np.arange(batch) % len(pixels)])}
        benchmark.pedantic(
            lambda: session.run(inputs), rounds=rounds(ROUNDS[batch]), warmup_rounds=rounds(3), iterations=1
        )
