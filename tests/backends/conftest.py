"""Tiny bundles, drawn with onnx.helper: a linear classifier of (N, 3, 4, 4) pixels."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.torch_events import CudaClock
from tests.helpers.weights_bundles import write_weights
from vitdeploy.backends import onnxruntime_providers
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact, Manifest, Provenance, TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.machine.gpus import Gpu

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


@pytest.fixture
def cuda_clock(monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    return CudaClock(monkeypatch)


@pytest.fixture
def nvidia_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and TensorRT's library, as far as ONNX Runtime's providers ask, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Restored to its absence afterwards, whatever sets it.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setattr(onnxruntime_providers, "find_gpus", lambda: [Gpu("NVIDIA L4", (8, 9))])
    monkeypatch.setattr(onnxruntime_providers, "_load_nvinfer", lambda library: "10.14.1")


@pytest.fixture
def rtx_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """NVIDIA's plugin package of ONNX Runtime, as far as it is called: the path of its library."""
    folder = tmp_path / "site" / onnxruntime_providers.PLUGIN
    folder.mkdir(parents=True)
    library = folder / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    (folder / "__init__.py").write_text(f"def get_library_path():\n    return {str(library)!r}\n")
    monkeypatch.syspath_prepend(folder.parent)
    yield library
    sys.modules.pop(onnxruntime_providers.PLUGIN, None)
