"""What the peers do alike: where an exported file lies, and how a runtime is set up.

A peer's job is ``{"checkpoint", "workdir", "threads", "concurrency", "precision", "runtime"}``: a folder
that transformers saved, a folder for exported files that belongs to this checkpoint alone, and how to run.

Both runtimes get the settings that vitdeploy's own backends give them, so that what is compared is the
model: the threads that were asked for, all optimisations, latency before throughput, and threads of ONNX
Runtime that sleep while they wait. A job with ``"spin": true`` leaves the latter at ONNX Runtime's default.

Only the standard library and numpy are imported with this module: each peer has an environment of its own.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitdeploy.benchmark.loop import Array, Caller, LoadedModel

if TYPE_CHECKING:
    import torch

Job = Mapping[str, Any]

OPSET = 20
"""The newest that every exporter here writes; its Gelu is one node."""


def exported(job: Job, tool: str, packages: tuple[str, ...], write: Callable[[Path], None]) -> Path:
    """The folder with a tool's export of the job's checkpoint, which ``write`` fills if it is not there.

    Args:
        job: of the peer.
        tool: its name.
        packages: whose versions decide what is written.
        write: receives an empty folder.
    """
    versions = "-".join(f"{name}-{version(name)}" for name in packages)
    return whole_folder(Path(job["workdir"], f"{tool}-{versions}"), write)


def whole_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, which ``write`` fills if it is not there: whole, or not at all."""
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        beside.mkdir(parents=True)
        try:
            write(beside)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def transformers_model(job: Job) -> torch.nn.Module:
    """transformers' model of the job's checkpoint, returning logits alone."""
    import torch
    from transformers import ViTForImageClassification

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values).logits
            return logits

    model = ViTForImageClassification.from_pretrained(job["checkpoint"], attn_implementation="sdpa")
    return Logits(model).eval()


def session_options(job: Job) -> Any:
    """ONNX Runtime's settings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not job.get("spin", False):
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def on_onnxruntime(job: Job, model: Path) -> list[Caller]:
    """An ONNX file on ONNX Runtime, a session for each caller."""
    import onnxruntime

    def caller() -> Caller:
        session = onnxruntime.InferenceSession(
            model, session_options(job), providers=["CPUExecutionProvider"]
        )
        (name,) = (value.name for value in session.get_inputs())
        return lambda pixels: (session.run(None, {name: pixels})[0], None)

    return [caller() for _ in range(job["concurrency"])]


def on_openvino(job: Job, model: Path) -> list[Caller]:
    """A file that OpenVINO reads, on OpenVINO, a compiled model for each caller.

    Raises:
        RuntimeError: this processor does not compute in the job's precision.
    """
    import openvino

    core = openvino.Core()
    precision = job["precision"]
    if precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError(f"this processor has no {precision}")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }

    def caller() -> Caller:
        request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

        def run(pixels: Array) -> tuple[Array, float | None]:
            # What it returns is its own memory, overwritten by the next run.
            return np.array(request.infer([pixels], share_inputs=True)[0]), None

        return run

    return [caller() for _ in range(job["concurrency"])]


RUNTIMES: Mapping[str, Callable[[Job, Path], list[Caller]]] = {
    "onnxruntime": on_onnxruntime,
    "openvino": on_openvino,
}


def loaded(job: Job, callers: list[Caller], packages: tuple[str, ...], size: int) -> LoadedModel:
    """What a peer's ``load`` returns; see ``facts_of`` of ``vitdeploy.benchmark.cases``.

    Args:
        job: of the peer.
        callers: one per concurrent caller.
        packages: whose versions are worth knowing.
        size: bytes of what was loaded.
    """
    facts = {
        "executes": job["precision"],
        "versions": {name: version(name) for name in packages},
        "size_bytes": size,
    }
    return LoadedModel(callers, facts)
