"""The checkpoint in transformers as it is, eager, with PyTorch's fused attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.common import loaded, transformers_model
from vitdeploy.benchmark.loop import Array, LoadedModel, run_process


def load(job: dict[str, Any]) -> LoadedModel:
    """Open the checkpoint; all callers share the model."""
    import torch

    torch.set_num_threads(job["threads"])
    model = transformers_model(job)

    @torch.inference_mode()
    def run(pixels: Array) -> tuple[Array, float | None]:
        return model(torch.from_numpy(pixels)).numpy(), None

    size = Path(job["checkpoint"], "model.safetensors").stat().st_size
    return loaded(job, [run] * job["concurrency"], ("torch", "transformers"), size)


if __name__ == "__main__":
    run_process(load)
