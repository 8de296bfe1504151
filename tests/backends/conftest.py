"""Tiny bundles, drawn with onnx.helper: a linear classifier of (N, 3, 4, 4) pixels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from weights_bundles import write_weights

from vitdeploy.bundle import Bundle, BundleWriter
from vitdeploy.config import BatchRange
from vitdeploy.manifest import Artifact, Manifest, Provenance, TensorSpec

WEIGHT = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
INNER = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
MakeBundle = Callable[..., Bundle]


def classifier(precision: str = "fp32") -> bytes:
    """Flatten, one MatMul in the given precision, float32 outside."""
    inner = INNER[precision]
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"], name="flatten"),
        helper.make_node("Cast", ["flat"], ["narrow"], name="narrow", to=inner),
        helper.make_node("Cast", ["weight"], ["narrow_weight"], name="narrow_weight", to=inner),
        helper.make_node("MatMul", ["narrow", "narrow_weight"], ["product"], name="head"),
        helper.make_node("Cast", ["product"], ["logits"], name="widen", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Write a bundle with one artifact: ``make_bundle(precision=..., data=..., batch=..., **manifest)``."""
    numbers = itertools.count()

    def make(
        *,
        precision: str = "fp32",
        data: bytes | None = None,
        batch: BatchRange | None = None,
        inputs: tuple[TensorSpec, ...] | None = None,
        **manifest: Any,
    ) -> Bundle:
        pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, 4, 4))
        artifact = Artifact(
            name=f"onnx-{precision}",
            format="onnx",
            precision=precision,
            requested=precision,
            path="model.onnx",
            files=("model.onnx",),
            opset=20,
            batch=batch or BatchRange(1, 2, 8),
            inputs=inputs or (pixels,),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=("N", 5)),),
        )
        draft = Manifest(
            name="tiny",
            created="2026-11-21T03:00:00Z",
            generator="vitdeploy 0.1.0",
            provenance=Provenance(source="tiny", family="vit"),
            artifacts=(artifact,),
            **manifest,
        )
        with BundleWriter(tmp_path / f"bundle-{next(numbers)}") as writer:
            writer.file("model.onnx").write_bytes(classifier(precision) if data is None else data)
            writer.seal(draft)
            return writer.commit()

    return make


@pytest.fixture
def pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)


@pytest.fixture
def expected(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the classifier must give, in float64."""
    return pixels.reshape(3, 48).astype(np.float64) @ WEIGHT.astype(np.float64)


@pytest.fixture
def weights_bundle(tmp_path: Path) -> MakeBundle:
    """Write a bundle with weights and without any artifact."""
    return functools.partial(write_weights, tmp_path / "bundle")
