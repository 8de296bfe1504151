"""The linear classifier with quantised artifacts, written with onnx.helper.

Its weights are rounded here with numpy and ml_dtypes, so that tests of what comes after an export need no
quantiser. Pixels are rounded, too; the answer to both in float64 is ``quantised_answer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save_file
from scipy import ndimage

from tests.helpers.bundles import LABELS, SIZE, SPEC, WEIGHT, answer, write_bundle
from vitdeploy.bundle.folder import HELD_OUT, Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.quantisation import QuantisationRecord
from vitdeploy.images.preprocess import apply

Kind = Literal["int8", "fp8"]
Array = np.ndarray[Any, Any]
_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
STEPS = 127
"""Of int8 between zero and the brightest pixel; fewer make its error larger."""


def held_out_images(count: int = 6) -> list[Image.Image]:
    """Smooth pictures, as a user's own are."""
    noise = np.random.default_rng(7).uniform(size=(count, SIZE, SIZE, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 1.0, 1.0, 0))
    low, high = smooth.min((1, 2, 3), keepdims=True), smooth.max((1, 2, 3), keepdims=True)
    return [Image.fromarray(image) for image in np.uint8(255 * (smooth - low) / (high - low))]


def held_out() -> dict[str, Array]:
    """The tensors that quantised artifacts are proven on."""
    inputs = np.stack([apply(image, SPEC) for image in held_out_images()])
    return {"pixel_values": inputs, "reference": answer(inputs)}


def stored_weight(kind: Kind) -> tuple[Array, Array]:
    """The weight in 8 bits, and its scale: of each column, of fp8 one for all."""
    if kind == "fp8":
        scale = np.float32(np.abs(WEIGHT).max() / _LARGEST[kind])
        return (WEIGHT / scale).astype(ml_dtypes.float8_e4m3fn), scale
    scales = (np.abs(WEIGHT).max(0) / 63).astype(np.float32)
    return np.round(WEIGHT / scales).astype(np.int8), scales


def rounded(inputs: Array, kind: Kind, steps: int = STEPS) -> Array:
    """Pixels as the GEMM reads them."""
    scale = _scale(kind, steps)
    if kind == "fp8":
        return (inputs / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return np.clip(np.round(inputs / scale), -128, 127).astype(np.float64) * scale


def quantised_answer(inputs: Array, kind: Kind, steps: int = STEPS) -> Array:
    """The logits (N, 5) of rounded pixels and weights, in float64."""
    weight, scale = stored_weight(kind)
    return rounded(inputs, kind, steps).reshape(len(inputs), -1) @ (weight.astype(np.float64) * scale)


def _scale(kind: Kind, steps: int) -> np.float32:
    return np.float32(1 / (_LARGEST[kind] if kind == "fp8" else steps))


def quantised_graph(kind: Kind, steps: int = STEPS) -> bytes:
    """Flatten, QuantizeLinear, DequantizeLinear, MatMul with a dequantised weight."""
    weight, scale = stored_weight(kind)
    dtype = _TYPES[kind]

    def stored(name: str, array: Array) -> onnx.TensorProto:
        return helper.make_tensor(name, dtype, array.shape, array.tobytes(), raw=True)

    def real(name: str, array: Array) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True)

    axis = {"axis": 1} if scale.ndim else {}
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"], name="flatten"),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q"], name="head/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], name="head/DequantizeLinear"),
        helper.make_node("DequantizeLinear", ["weight", "steps"], ["w"], name="head.weight", **axis),
        helper.make_node("MatMul", ["x", "w"], ["logits"], name="head/MatMul"),
    ]
    constants = [
        stored("weight", weight),
        real("steps", np.asarray(scale)),
        real("scale", np.asarray(_scale(kind, steps))),
        stored("zero", np.zeros((), weight.dtype)),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(LABELS)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def record(**changes: Any) -> QuantisationRecord:
    given = {"rest": "fp32", "weight_bits": 7, "sites": ("head",), "macs": 1.0, "images": 24}
    return QuantisationRecord(**{**given, **changes})


def write_quantised(
    folder: Path,
    *,
    precisions: tuple[str, ...] = ("fp32",),
    kinds: Sequence[Kind] = ("int8", "fp8"),
    steps: int = STEPS,
    **manifest: Any,
) -> Bundle:
    """The classifier in float precisions and, after those, quantised.

    Args:
        precisions: float ones; none are left where this is empty.
        steps: of int8.
    """
    base = write_bundle(folder, precisions=precisions or ("fp32",), **manifest)
    like = base.manifest.artifacts[0]
    kept = base.manifest.artifacts if precisions else ()
    made = tuple(_artifact(like, kind) for kind in kinds)
    with base.edit() as writer:
        if not precisions:
            (writer.directory / like.path).unlink()
        for artifact, kind in zip(made, kinds, strict=True):
            writer.file(artifact.path).write_bytes(quantised_graph(kind, steps))
        save_file(held_out(), writer.file(HELD_OUT))
        writer.seal(base.manifest.model_copy(update={"artifacts": (*kept, *made)}))
        return writer.commit()


def _artifact(like: Artifact, kind: Kind) -> Artifact:
    path = f"model.{kind}.onnx"
    update = {"name": f"onnx-{kind}", "precision": kind, "requested": kind, "path": path, "files": (path,)}
    return like.model_copy(update={**update, "quantisation": record(), "proof": None})
