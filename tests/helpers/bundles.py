"""A small bundle without a model behind it: a linear classifier of 8x8 images, written with onnx.helper.

What it must answer is one matrix product in float64, so tests need no other implementation.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from vitdeploy.bundle.folder import GOLDEN, Bundle, BundleWriter
from vitdeploy.bundle.golden import golden_images, raw_images
from vitdeploy.bundle.manifest import (
    Artifact,
    Manifest,
    Provenance,
    TensorSpec,
)
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.config import BatchRange, Preprocess
from vitdeploy.images.preprocess import apply, apply_uint8

LABELS = ("cat", "dog", "tiger_cat", "eel", "fox")
SIZE = 8
SPEC = Preprocess(size=(SIZE, SIZE))
WEIGHT = np.random.default_rng(0).normal(size=(3 * SIZE * SIZE, len(LABELS))).astype(np.float32)
FEATURES = np.random.default_rng(1).normal(size=(3 * SIZE * SIZE, 7)).astype(np.float32)
"""What the second output is of the pixels, where a bundle has two."""
FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "bf16": "model.bf16.onnx"}
_INNER = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def answer(
    inputs: np.ndarray[Any, Any], kind: str = "float", weight: np.ndarray[Any, Any] = WEIGHT
) -> np.ndarray[Any, Any]:
    """The logits (N, 5) of network inputs, or another output, in float64."""
    values = inputs.astype(np.float64)
    if kind == "uint8":
        values = (values / 127.5 - 1).transpose(0, 3, 1, 2)
    return values.reshape(len(values), -1) @ weight.astype(np.float64)


def answer_images(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    """The logits (N, 5) of images, in float64."""
    return answer(np.stack([apply(image, SPEC) for image in images]))


def random_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def graph(
    precision: str,
    kind: str,
    weight: np.ndarray[Any, Any],
    batch: int | None = None,
    features: np.ndarray[Any, Any] | None = None,
    output: str = "logits",
) -> bytes:
    """Normalise if the input is uint8, flatten, one MatMul for each output in the given precision, float32
    outside."""
    nodes, source = [], "pixel_values"
    constants = [numpy_helper.from_array(weight, "weight")]
    if kind == "uint8":
        constants += [
            numpy_helper.from_array(np.array(value, np.float32), name)
            for name, value in (("scale", 1 / 127.5), ("one", 1.0))
        ]
        nodes = [
            helper.make_node("Cast", [source], ["real"], name="real", to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "scale"], ["scaled"], name="scale"),
            helper.make_node("Sub", ["scaled", "one"], ["normal"], name="shift"),
            helper.make_node("Transpose", ["normal"], ["planes"], name="planes", perm=[0, 3, 1, 2]),
        ]
        source = "planes"
    inner = _INNER[precision]
    nodes += [
        helper.make_node("Flatten", [source], ["flat"], name="flatten"),
        helper.make_node("Cast", ["flat"], ["narrow"], name="narrow", to=inner),
        helper.make_node("Cast", ["weight"], ["narrow_weight"], name="narrow_weight", to=inner),
        helper.make_node("MatMul", ["narrow", "narrow_weight"], ["product"], name="head"),
        helper.make_node("Cast", ["product"], [output], name="widen", to=TensorProto.FLOAT),
    ]
    size = batch or "N"
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [size, len(LABELS)])]
    if features is not None:
        constants.append(numpy_helper.from_array(features, "second"))
        nodes += [
            helper.make_node("Cast", ["second"], ["narrow_second"], name="narrow_second", to=inner),
            helper.make_node("MatMul", ["narrow", "narrow_second"], ["other"], name="second"),
            helper.make_node("Cast", ["other"], ["features"], name="widen_second", to=TensorProto.FLOAT),
        ]
        columns = features.shape[1]
        outputs.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, [size, columns]))
    pixels = [SIZE, SIZE, 3] if kind == "uint8" else [3, SIZE, SIZE]
    dtype = TensorProto.UINT8 if kind == "uint8" else TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", dtype, [size, *pixels])],
        outputs,
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def golden_arrays(kind: str = "float") -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.copy() for name, array in _drawn(kind).items()}


@functools.cache
def _drawn(kind: str) -> dict[str, np.ndarray[Any, Any]]:
    convert = apply_uint8 if kind == "uint8" else apply
    images = [Image.fromarray(image) for image in golden_images((SIZE, SIZE))]
    inputs = np.stack([convert(image, SPEC) for image in images])
    arrays = {"pixel_values": inputs, "reference": answer(inputs, kind)}
    for index, raw in enumerate(raw_images()):
        arrays[f"image.{index}"] = raw
        arrays[f"image.{index}.pixel_values"] = convert(Image.fromarray(raw), SPEC)
    return arrays


def write_bundle(
    folder: Path,
    *,
    precisions: tuple[str, ...] = ("fp32",),
    kind: str = "float",
    batch: BatchRange | None = None,
    weight: np.ndarray[Any, Any] = WEIGHT,
    golden: dict[str, np.ndarray[Any, Any]] | None = None,
    features: np.ndarray[Any, Any] | None = None,
    **manifest: Any,
) -> Bundle:
    """Write the classifier as a bundle; ``weight`` other than WEIGHT makes it wrong.

    Args:
        features: gives it a second output, ``features``, which is right if these are FEATURES.
    """
    batch, output = batch or BatchRange(1, 2, 8), manifest.get("output", "logits")
    arrays = golden_arrays(kind) if golden is None else golden
    if features is not None:
        arrays.setdefault("reference.features", answer(arrays["pixel_values"], kind, FEATURES))
        manifest = {"outputs": ("logits", "features"), **manifest}
    draft = Manifest(
        **{
            "name": "linear",
            "created": "2026-11-21T03:00:00Z",
            "generator": "vitdeploy 0.1.0",
            "input": kind,
            "preprocess": SPEC,
            "labels": LABELS,
            "parameters": weight.size,
            "provenance": Provenance(source="linear", family="test"),
            "artifacts": tuple(
                _artifact(precision, kind, batch, output, features) for precision in precisions
            ),
            **manifest,
        }
    )
    with BundleWriter(folder) as writer:
        for precision in precisions:
            data = graph(precision, kind, weight, batch.min if batch.fixed else None, features, output)
            writer.file(FILES[precision]).write_bytes(data)
        if arrays:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, writer.file(GOLDEN))
        writer.seal(draft)
        return writer.commit()


def _artifact(
    precision: str, kind: str, batch: BatchRange, output: str, features: np.ndarray[Any, Any] | None
) -> Artifact:
    size = batch.min if batch.fixed else "N"
    uint8 = kind == "uint8"
    pixels = (SIZE, SIZE, 3) if uint8 else (3, SIZE, SIZE)
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    columns = {output: len(LABELS)} | ({} if features is None else {"features": features.shape[1]})
    proof = PrecisionProof(ops=(OpPrecision(name="head", op="MatMul", dtype=dtype),), ok=True)
    return Artifact(
        name=f"onnx-{precision}",
        format="onnx",
        precision=precision,
        requested=precision,
        path=FILES[precision],
        files=(FILES[precision],),
        opset=20,
        batch=batch,
        inputs=(
            TensorSpec(name="pixel_values", dtype="uint8" if uint8 else "float32", shape=(size, *pixels)),
        ),
        outputs=tuple(TensorSpec(name=n, dtype="float32", shape=(size, c)) for n, c in columns.items()),
        proof=proof,
        nodes=5,
    )
