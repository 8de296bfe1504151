"""The peers by name: which file measures each, in which environment, and as what it stands in the results."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitdeploy.benchmark.lanes import Lane, Target
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.machine.child import child_environment


@dataclass(frozen=True)
class Peer:
    """Another tool, on a runtime, in a precision."""

    module: str
    """Its file in this folder."""
    backend: str
    """The tool, as the results name it."""
    runtime: str
    artifact: str
    title: str
    """For people."""
    precision: ArtifactPrecision = "fp32"
    environment: str | None = None
    """One of ``environments.NAMES``; None is vitdeploy's own."""
    spin: bool = False


_ORT, _OV = "onnxruntime", "openvino"

PEERS: Mapping[str, Peer] = {
    "transformers": Peer("transformers_eager", "transformers", "torch", "weights", "transformers, eager"),
    "torch-onnx": Peer("torch_onnx", "torch.onnx", _ORT, "onnx-fp32", "torch.onnx.export"),
    "torch-onnx-spinning": Peer(
        "torch_onnx",
        "torch.onnx",
        _ORT,
        "onnx-fp32 (spinning)",
        "torch.onnx.export, with spinning threads",
        spin=True,
    ),
    "optimum": Peer("optimum_onnx", "optimum-onnx", _ORT, "onnx-fp32", "optimum-onnx", environment="optimum"),
    "timm": Peer("timm_ort", "timm", _ORT, "onnx-fp32", "timm's export", environment="timm"),
    "torch-onnx-openvino": Peer("torch_onnx", "torch.onnx", _OV, "onnx-fp32", "torch.onnx.export"),
    "openvino-convert": Peer(
        "openvino_convert", "openvino.convert", _OV, "ir-fp32", "openvino.convert_model"
    ),
    "torch-onnx-openvino-bf16": Peer(
        "torch_onnx", "torch.onnx", _OV, "onnx-fp32 (bf16 hint)", "torch.onnx.export, bf16", "bf16"
    ),
    "openvino-convert-bf16": Peer(
        "openvino_convert",
        "openvino.convert",
        _OV,
        "ir-fp32 (bf16 hint)",
        "openvino.convert_model, bf16",
        "bf16",
    ),
}


def lane_of(peer: Peer, target: Target, checkpoint: Path, threads: int, python: Path | None = None) -> Lane:
    """The peer as a lane of a measurement.

    Args:
        peer: one of ``PEERS``.
        target: our bundle of the same checkpoint.
        checkpoint: a folder named after the model; exported files go to ``files`` beside it.
        threads: of the runtime.
        python: the interpreter of the peer's environment; this one when omitted.
    """
    return Lane(
        target=target,
        backend=peer.backend,
        artifact=peer.artifact,
        precision=peer.precision,
        threads=threads,
        concurrency=1,
        command=(str(python or sys.executable), "-P", "-m", f"benchmarks.peers.{peer.module}"),
        job={
            "checkpoint": str(checkpoint),
            "workdir": str(checkpoint.with_name("files")),
            "model": checkpoint.name,
            "runtime": peer.runtime,
            "precision": peer.precision,
            "threads": threads,
            "concurrency": 1,
            "spin": peer.spin,
        },
        provider=peer.runtime,
        environment=child_environment(),
    )
