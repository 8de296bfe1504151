"""OpenVINO's own converter, straight from transformers' model, without ONNX in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.common import exported, loaded, on_openvino, size_of, transformers_model
from vitdeploy.benchmark.loop import LoadedModel, run_process


def load(job: dict[str, Any]) -> LoadedModel:
    """Convert the checkpoint, unless that is done, and compile the file."""

    def write(folder: Path) -> None:
        import openvino
        import torch

        model = openvino.convert_model(
            transformers_model(job), example_input=torch.zeros(2, 3, 224, 224), input=[-1, 3, 224, 224]
        )
        # Compressed, the weights would be rounded to fp16.
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    folder = exported(job, "openvino-convert", ("openvino", "torch", "transformers"), write)
    callers = on_openvino(job, folder / "model.xml")
    return loaded(job, callers, ("openvino", "torch", "transformers"), size_of(folder))


if __name__ == "__main__":
    run_process(load)
