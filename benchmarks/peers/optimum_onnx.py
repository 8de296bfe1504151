"""optimum-onnx: its exporter, and its ``ORTModelForImageClassification`` on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.common import OPSET, exported, loaded, session_options, size_of
from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, run_process


def load(job: dict[str, Any]) -> LoadedModel:
    """Export the checkpoint, unless that is done, and open the file."""

    def write(folder: Path) -> None:
        from optimum.exporters.onnx import main_export

        main_export(job["checkpoint"], folder, task="image-classification", opset=OPSET)

    folder = exported(job, "optimum-onnx", ("optimum-onnx", "torch", "transformers"), write)
    callers = [_caller(job, folder) for _ in range(job["concurrency"])]
    packages = ("optimum", "optimum-onnx", "torch", "transformers", "onnxruntime")
    return loaded(job, callers, packages, size_of(folder))


def _caller(job: dict[str, Any], folder: Path) -> Caller:
    from optimum.onnxruntime import ORTModelForImageClassification

    model = ORTModelForImageClassification.from_pretrained(
        folder, provider="CPUExecutionProvider", session_options=session_options(job)
    )

    def run(pixels: Array) -> tuple[Array, float | None]:
        return model(pixel_values=pixels).logits, None

    return run


if __name__ == "__main__":
    run_process(load)
