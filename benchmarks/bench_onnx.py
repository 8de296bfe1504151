"""Our ONNX against the plain export of the same weights, on the same runtime, in the same rounds.

    pytest benchmarks/bench_onnx.py --benchmark-json=benchmarks/results/onnx_cpu.json

The peer is ``torch.onnx.export`` of transformers' model as it is. Before every timed run of ours the peer
runs once and is timed too, so that both see the same machine; the ratio is taken pair by pair.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from spread import quartiles

import vitdeploy

ROUNDS = {1: 60, 8: 24}
THREADS = 2


class Logits(torch.nn.Module):
    """transformers' model, returning the tensor alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values).logits
        return logits


@pytest.fixture(scope="module")
def files(vit_b16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("onnx")
    bundle = vitdeploy.export(vit_b16, folder / "ours.bundle")
    model = Logits(ViTForImageClassification.from_pretrained(vit_b16)).eval()
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        folder / "plain.onnx",
        dynamo=True,
        opset_version=20,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: "N"},),
        external_data=False,
        verbose=False,
    )
    return {"ours": bundle.path("model.onnx"), "plain": folder / "plain.onnx"}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", ROUNDS)
def test_fp32_against_the_plain_export(
    benchmark: BenchmarkFixture, files: dict[str, Path], batch: int
) -> None:
    ours, plain = session(files["ours"]), session(files["plain"])
    x = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    times: dict[str, list[float]] = {"ours": [], "plain": []}

    def run(name: str, model: onnxruntime.InferenceSession) -> Any:
        begin = time.perf_counter()
        result = model.run(None, {"pixel_values": x})[0]
        times[name].append(time.perf_counter() - begin)
        return result

    for _ in range(3):
        a, b = run("ours", ours), run("plain", plain)
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    times["ours"].clear()
    times["plain"].clear()

    def peer_first() -> None:
        run("plain", plain)

    benchmark.pedantic(lambda: run("ours", ours), setup=peer_first, rounds=ROUNDS[batch], iterations=1)
    pairs = [p / o for o, p in zip(times["ours"], times["plain"], strict=True)]
    benchmark.extra_info |= {
        "batch": batch,
        "threads": THREADS,
        "plain_over_ours": quartiles(pairs),
        "ours_ms": quartiles([1e3 * t for t in times["ours"]]),
        "plain_ms": quartiles([1e3 * t for t in times["plain"]]),
        "relative_difference": error,
        "nodes": {name: len(_nodes(path)) for name, path in files.items()},
        "onnxruntime": onnxruntime.__version__,
    }
    assert error < 1e-4, "a fast wrong model is no result"


def _nodes(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph.node
