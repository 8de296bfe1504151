"""Measurements as vitdeploy writes them, made up: for tests of what reads them.

``cell(p50_ms=...)`` is one measured, right cell whose samples fit its median; ``sample_results()`` is a
ViT-B/16 on a small server, with a cell of every kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitdeploy.benchmark.results import (
    BenchSettings,
    Cell,
    CellAccuracy,
    Environment,
    Git,
    MeasuredBundle,
    MeasuredCpu,
    Parity,
    Results,
    SkippedCase,
    Startup,
)

ROUND_SAMPLES = 5
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05, "mixed": 0.05, "int8": 0.25, "fp8": 0.35}
ERRORS = {"fp32": 6e-7, "fp16": 7e-4, "bf16": 6e-3, "mixed": 2e-3, "int8": 0.03, "fp8": 0.05}


def samples(p50_ms: float, count: int = 40, *, spread: float = 0.015, seed: int = 0) -> tuple[float, ...]:
    """Call times with the long right tail that real ones have, and exactly this median."""
    noise = np.random.default_rng(seed).gamma(2.0, spread, count)
    times = p50_ms * (1 + noise - np.median(noise))
    return tuple(float(t) for t in times)


def parity(precision: str = "fp32", **changes: Any) -> Parity:
    record = {"passed": True, "relative": ERRORS[precision], "max_abs": 3 * ERRORS[precision]}
    return Parity(**{**record, "tolerance": TOLERANCES[precision], **changes})


def failed_parity(precision: str = "fp16") -> Parity:
    return parity(
        precision,
        passed=False,
        relative=0.83,
        max_abs=4.2,
        failures=("relative error 8.3e-01 above 1.0e-02",),
    )


def cell(**changes: Any) -> Cell:
    """A cell; of what changes, the numbers that follow from it follow."""
    given = {
        "subject": "vit-b16", "backend": "onnxruntime", "provider": "cpu", "artifact": "onnx-fp32",
        "precision": "fp32", "batch": 1, "image_size": (224, 224), "threads": None, "concurrency": 1,
        "status": "ok", "round_samples": ROUND_SAMPLES, **changes,
    }  # fmt: skip
    given.setdefault("executes", given["precision"])
    if given["status"] == "ok":
        given = {**_numbers(given), **given}
    return Cell(**given)


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """What a measured cell has, around its ``p50_ms``."""
    p50 = given.get("p50_ms", 80.0 * given["batch"])
    times = given.get("samples_ms", ())
    if not times and p50 is not None:
        times = samples(p50, seed=given["batch"])
    parts = np.percentile(times, [90, 99]) if times else (None, None)
    return {
        "p50_ms": p50,
        "p90_ms": None if parts[0] is None else float(parts[0]),
        "p99_ms": None if parts[1] is None else float(parts[1]),
        "mean_ms": float(np.mean(times)) if times else None,
        "spread": 0.012,
        "images_per_s": 1000 * given["batch"] * given["concurrency"] / p50 if p50 else None,
        "samples_ms": times,
        "parity": parity(given["precision"]),
    }


SUBJECT = MeasuredBundle(
    name="vit-b16",
    model="vit_base_patch16_224",
    digest="sha256:5d0e3c",
    image_size=(224, 224),
    parameters=86_567_656,
)
ENVIRONMENT = Environment(
    vitdeploy="0.1.0",
    python="3.11.7",
    platform="Linux-6.1.0-x86_64-with-glibc2.36",
    cpu=MeasuredCpu(
        name="AMD EPYC 9R14",
        flags=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
        threads=2,
        memory=25_280_000_000,
        affinity=(0, 1),
        governor="performance",
    ),
    libraries={
        "numpy": "2.4.6",
        "onnxruntime": "1.31.1",
        "openvino": "2026.4.1",
        "torch": "2.13.0",
        "tensorrt": None,
    },
    git=Git(revision="d89991c0a6f1b2c3d4e5f60718293a4b5c6d7e8f", dirty=False),
)
_SPEEDS = {
    ("torch", "weights", "fp32"): (96.0, 655.0, 2700.0),
    ("torch-compile", "weights", "fp32"): (84.0, 601.0, 2480.0),
    ("onnxruntime", "onnx-fp32", "fp32"): (78.0, 588.0, 2390.0),
    ("openvino", "onnx-fp32", "fp32"): (74.0, 552.0, 2260.0),
    ("aotinductor", "aoti-fp32", "fp32"): (81.0, 570.0, 2350.0),
    ("torch", "weights-bf16", "bf16"): (61.0, 371.0, 1490.0),
    ("torch-compile", "weights-bf16", "bf16"): (52.0, 330.0, 1300.0),
    ("onnxruntime", "onnx-bf16", "bf16"): (70.0, 498.0, 2010.0),
    ("openvino", "onnx-bf16", "bf16"): (31.0, 187.0, 742.0),
    ("aotinductor", "aoti-bf16", "bf16"): (49.0, 260.0, 1055.0),
}
_BATCHES = (1, 8, 32)


def _extras(backend: str, artifact: str, precision: str, batch: int) -> dict[str, Any]:
    """Three cells that went wrong, each in its own way; cold start and accuracy where they are measured."""
    top1 = {"fp32": 0.8107, "bf16": 0.8101}[precision]
    extras: dict[str, Any] = {
        "peak_memory_bytes": 700_000_000 + 40_000_000 * batch,
        "size_bytes": {"fp32": 346_290_000, "bf16": 173_200_000}[precision],
        "accuracy": CellAccuracy(
            images=5000,
            top1=top1,
            top5=0.953,
            reference_top1=0.8107,
            reference_top5=0.953,
            top1_difference=top1 - 0.8107,
            top1_interval=(top1 - 0.8107 - 0.0012, top1 - 0.8107 + 0.0012),
        ),
    }
    if batch == 1:
        load = {"torch": 0.6, "torch-compile": 14.2, "aotinductor": 0.9, "openvino": 1.7}.get(backend, 0.5)
        extras["startup"] = Startup(import_s=0.62, load_s=load, first_s=0.11, total_s=0.95 + load)
    if (backend, precision, batch) == ("aotinductor", "bf16", 8):
        extras["parity"] = failed_parity("bf16")
    if (backend, precision, batch) == ("torch-compile", "bf16", 32):
        extras = {"status": "failed", "reason": "out of memory: the process was ended by the system"}
    if (backend, precision, batch) == ("onnxruntime", "fp32", 1):
        extras |= {"disturbed": ("another process took 11 % of the processor",), "repeats": 2, "spread": 0.09}
    return extras


def sample_results(**changes: Any) -> Results:
    """A measurement with 30 cells: 5 backends, fp32 and bf16, batches 1, 8 and 32."""
    cells = tuple(
        _cell(backend, artifact, precision, batch, p50)
        for (backend, artifact, precision), speeds in _SPEEDS.items()
        for batch, p50 in zip(_BATCHES, speeds, strict=True)
    )
    settings = BenchSettings(budget_s=300, seed=7, batches=_BATCHES, threads=(None,), concurrency=(1,))
    given = {
        "created": "2026-11-21T15:00:00Z",
        "command": "vitdeploy bench vit-b16.bundle --batch 1,8,32 --budget 5m --html report.html",
        "environment": ENVIRONMENT,
        "settings": settings,
        "subjects": (SUBJECT,),
        "rounds": 8,
        "cells": cells,
        "skipped": (
            SkippedCase(
                subject="vit-b16",
                backend="tensorrt",
                artifact="plan-fp16",
                reason="no NVIDIA GPU answers",
            ),
        ),
        "notes": ("Weights are random: accuracy says nothing about a trained model.",),
    }
    return Results(**{**given, **changes})


def _cell(backend: str, artifact: str, precision: str, batch: int, p50: float) -> Cell:
    extras = _extras(backend, artifact, precision, batch)
    if extras.get("status") != "failed":
        extras["p50_ms"] = p50
    return cell(backend=backend, artifact=artifact, precision=precision, batch=batch, **extras)
