"""Other tools that quantise: each reads our fp32 graph and images, and writes a file that the benchmark runs.

    python -m benchmarks.peers.quantisers nncf SOURCE.onnx IMAGES.npy FOLDER

All begin with the same float graph, which is the fastest that we have of the model: what differs is what they
make of it. Each runs in a process of its own, in its environment.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, EnvironmentFailure, ensure

LIMIT = 1800
"""Seconds that one may take."""


@dataclass(frozen=True)
class Quantiser:
    """A tool with its settings.

    Attributes:
        module: its file in this folder: ``python -m benchmarks.peers.MODULE JOB``.
        title: for people.
        runtime: what its file is for.
        precision: of what stays float.
        file: that it writes.
        environment: one of ``environments.NAMES``; None is vitdeploy's own.
        settings: further entries of its job.
    """

    module: str
    title: str
    runtime: str
    precision: str
    file: str
    environment: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


QUANTISERS: Mapping[str, Quantiser] = {
    "nncf": Quantiser(
        "nncf_quantise", "NNCF, its default (SmoothQuant)", "openvino", "bf16", "model.xml", "nncf"
    ),
    "nncf-plain": Quantiser(
        *("nncf_quantise", "NNCF, ranges by min and max, attention float", "openvino", "bf16", "model.xml"),
        environment="nncf",
        settings={"plain": True},
    ),
    "ort-static": Quantiser(
        "ort_quantise",
        "ONNX Runtime, `quantize_static` U8S8, linear layers",
        "onnxruntime",
        "fp32",
        "model.onnx",
    ),
    "ort-dynamic": Quantiser(
        *("ort_quantise", "ONNX Runtime, `quantize_dynamic`", "onnxruntime", "fp32", "model.onnx"),
        settings={"dynamic": True},
    ),
}


class QuantiserFailure(Exception):
    """A tool does not quantise the model; says why."""


def quantised(name: str, source: Path, images: Path, folder: Path) -> Path:
    """The file that a tool makes, in a folder that has nothing else; it is made once.

    Args:
        name: one of ``QUANTISERS``.
        source: an ONNX file with floats.
        images: to calibrate with, (K, 3, height, width) float32 in a ``.npy`` file.
        folder: is there with the file, or not at all.

    Raises:
        QuantiserFailure: its environment cannot be made, or it ends with an error.
    """
    tool = QUANTISERS[name]
    if folder.is_dir():
        return folder / tool.file
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    beside.mkdir(parents=True)
    job = {"source": str(source), "images": str(images), "file": str(beside / tool.file), **tool.settings}
    try:
        python = str(ensure(tool.environment)) if tool.environment else sys.executable
        command = [python, "-m", f"benchmarks.peers.{tool.module}", json.dumps(job)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            raise QuantiserFailure(
                f"{name} ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
            )
        beside.rename(folder)
    except (EnvironmentFailure, subprocess.TimeoutExpired) as failure:
        raise QuantiserFailure(f"{name}: {failure}") from failure
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder / tool.file


if __name__ == "__main__":
    print(quantised(sys.argv[1], *map(Path, sys.argv[2:5])))
