"""Traced graphs, one for each model and session: a trace takes seconds, and is the same every time."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import onnx_ir as ir

from tests.helpers.models import pixels, random_vit
from vitdeploy.config import BatchRange, ViTConfig
from vitdeploy.exporter.graph import trace
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.rewrites import deploy

NAMES = ("pixel_values", "logits")
RANGE = BatchRange(1, 2, 8)
SPREAD = 0.2
"""Of the random weights."""


@functools.cache
def traced(config: ViTConfig, plan: PrecisionPlan, opset: int = 20, batch: BatchRange = RANGE) -> bytes:
    """The ONNX file of a model's first output; its reference is ``random_vit(config, spread=SPREAD)``."""
    output = config.outputs[0]
    deployed = deploy(random_vit(config, spread=SPREAD), plan, outputs=(output,))
    graph = trace(deployed, pixels(config, 1), batch=batch, opset=opset, names=(NAMES[0], output))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        ir.save(graph, path)
        return path.read_bytes()
