"""Plain ``torch.onnx.export`` of transformers' model, on ONNX Runtime or OpenVINO (the job's ``runtime``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.common import OPSET, RUNTIMES, exported, loaded, size_of, transformers_model
from vitdeploy.benchmark.loop import LoadedModel, run_process


def load(job: dict[str, Any]) -> LoadedModel:
    """Export the checkpoint, unless that is done, and open the file."""

    def write(folder: Path) -> None:
        import torch

        torch.onnx.export(
            transformers_model(job),
            (torch.zeros(2, 3, 224, 224),),
            folder / "model.onnx",
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: "N"},),
            external_data=False,
            verbose=False,
        )

    folder = exported(job, "torch-onnx", ("torch", "transformers"), write)
    callers = RUNTIMES[job["runtime"]](job, folder / "model.onnx")
    return loaded(job, callers, ("torch", "transformers", job["runtime"]), size_of(folder))


if __name__ == "__main__":
    run_process(load)
