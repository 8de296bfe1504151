"""A small bundle of several image sizes without a model behind it: one linear classifier of pixels averaged
under a table, which is another one at every size.

The classifier's weights lie once in a file that all graphs share; the tables lie in the graphs, as resampled
positions do. What it must answer is a few sums in float64, so tests need no other implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from vitdeploy.bundle.folder import GOLDEN, Bundle, BundleWriter
from vitdeploy.bundle.golden import golden_images, raw_images
from vitdeploy.bundle.manifest import Artifact, Manifest, Provenance, SizeRecord, TensorSpec
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.config import BatchRange, Preprocess, Size
from vitdeploy.images.preprocess import apply, apply_uint8

SIZES: tuple[Size, ...] = ((8, 8), (16, 16), (8, 16))
"""The first is the default; the last is wide."""
LABELS = ("cat", "dog", "tiger_cat", "eel", "fox")
WEIGHT = np.random.default_rng(2).normal(size=(3, len(LABELS))).astype(np.float32)
FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx"}
_INNER = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def table(size: Size) -> np.ndarray[Any, Any]:
    """How much each pixel counts: (H, W) float32."""
    return np.random.default_rng(size).uniform(0.5, 1.5, size=size).astype(np.float32)


def preprocess(size: Size) -> Preprocess:
    return Preprocess(size=size)


def answer(inputs: np.ndarray[Any, Any], kind: str = "float", at: Size | None = None) -> np.ndarray[Any, Any]:
    """The logits (N, 5) of network inputs in float64.

    Args:
        at: the size whose table is used; that of the inputs when omitted.
    """
    values = inputs.astype(np.float64)
    if kind == "uint8":
        values = (values / 127.5 - 1).transpose(0, 3, 1, 2)
    weighted = values * table(at or values.shape[2:])
    return weighted.mean(axis=(2, 3)) @ WEIGHT.astype(np.float64)


def answer_image(image: Image.Image, size: Size, kind: str = "float") -> np.ndarray[Any, Any]:
    """The logits (5,) of an image at a size, in float64."""
    convert = apply_uint8 if kind == "uint8" else apply
    return answer(convert(image, preprocess(size))[None], kind)[0]


def golden_arrays(size: Size, kind: str = "float") -> dict[str, np.ndarray[Any, Any]]:
    convert, spec = apply_uint8 if kind == "uint8" else apply, preprocess(size)
    inputs = np.stack([convert(Image.fromarray(image), spec) for image in golden_images(size)])
    arrays = {"pixel_values": inputs, "reference": answer(inputs, kind)}
    for index, raw in enumerate(raw_images()):
        arrays[f"image.{index}"] = raw
        arrays[f"image.{index}.pixel_values"] = convert(Image.fromarray(raw), spec)
    return arrays


def several_sizes(
    folder: Path,
    sizes: Sequence[Size] = SIZES,
    *,
    precisions: Sequence[str] = ("fp32",),
    kind: str = "float",
    batch: BatchRange | None = None,
    table_of: dict[Size, Size] | None = None,
    **manifest: Any,
) -> Bundle:
    """Write the classifier for several sizes as one bundle.

    Args:
        sizes: the first is the default; of one, the bundle is as any other.
        table_of: plants a fault: a size whose graph has the table of another one, cut or repeated to fit.
    """
    batch, output = batch or BatchRange(1, 2, 8), manifest.get("output", "logits")
    further = [None, *sizes[1:]]
    artifacts = [
        _artifact(precision, kind, batch, size, place, output, several=len(sizes) > 1)
        for size, place in zip(sizes, further, strict=True)
        for precision in precisions
    ]
    draft = Manifest(
        **{
            "name": "linear",
            "created": "2026-11-21T03:00:00Z",
            "generator": "vitdeploy 0.1.0",
            "input": kind,
            "preprocess": preprocess(sizes[0]),
            "labels": LABELS,
            "parameters": WEIGHT.size,
            "sizes": tuple(
                SizeRecord(image_size=size, preprocess=preprocess(size), flops=size[0] * size[1])
                for size in sizes[1:]
            ),
            "flops": sizes[0][0] * sizes[0][1],
            "provenance": Provenance(source="linear", family="test"),
            "artifacts": tuple(artifacts),
            **manifest,
        }
    )
    with BundleWriter(folder, force=True) as writer:
        for size, place in zip(sizes, further, strict=True):
            used = (table_of or {}).get(size, size)
            values = np.resize(table(used), size)
            for precision in precisions:
                data = f"{FILES[precision]}.data" if len(sizes) > 1 else None
                graph = _graph(precision, kind, size, values, batch, output, data)
                writer.file(sized(FILES[precision], place)).write_bytes(graph)
                if data and place is None:
                    writer.file(data).write_bytes(WEIGHT.tobytes())
            save_file(golden_arrays(size, kind), writer.file(sized(GOLDEN, place)))
        writer.seal(draft)
        return writer.commit()


def _graph(
    precision: str,
    kind: str,
    size: Size,
    values: np.ndarray[Any, Any],
    batch: BatchRange,
    output: str,
    data: str | None,
) -> bytes:
    """Normalise if the input is uint8, weigh and average the pixels, one MatMul in the given precision."""
    weight = numpy_helper.from_array(WEIGHT, "weight")
    if data is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
            weight.external_data.add(key=key, value=value)
    constants = [weight, numpy_helper.from_array(values.reshape(1, 1, *size), "table")]
    nodes, source = [], "pixel_values"
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
        helper.make_node("Mul", [source, "table"], ["weighted"], name="weigh"),
        helper.make_node("GlobalAveragePool", ["weighted"], ["average"], name="average"),
        helper.make_node("Flatten", ["average"], ["flat"], name="flatten"),
        helper.make_node("Cast", ["flat"], ["narrow"], name="narrow", to=inner),
        helper.make_node("Cast", ["weight"], ["narrow_weight"], name="narrow_weight", to=inner),
        helper.make_node("MatMul", ["narrow", "narrow_weight"], ["product"], name="head"),
        helper.make_node("Cast", ["product"], [output], name="widen", to=TensorProto.FLOAT),
    ]
    rows = batch.min if batch.fixed else "N"
    pixels = [*size, 3] if kind == "uint8" else [3, *size]
    dtype = TensorProto.UINT8 if kind == "uint8" else TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", dtype, [rows, *pixels])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [rows, len(LABELS)])],
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.ModelProto.SerializeToString(model)


def _artifact(
    precision: str,
    kind: str,
    batch: BatchRange,
    size: Size,
    place: Size | None,
    output: str,
    *,
    several: bool,
) -> Artifact:
    rows = batch.min if batch.fixed else "N"
    pixels = (*size, 3) if kind == "uint8" else (3, *size)
    path = sized(FILES[precision], place)
    return Artifact(
        name=named(f"onnx-{precision}", place),
        format="onnx",
        precision=precision,
        requested=precision,
        path=path,
        files=(path, f"{FILES[precision]}.data") if several else (path,),
        opset=20,
        batch=batch,
        inputs=(
            TensorSpec(
                name="pixel_values", dtype="uint8" if kind == "uint8" else "float32", shape=(rows, *pixels)
            ),
        ),
        outputs=(TensorSpec(name=output, dtype="float32", shape=(rows, len(LABELS))),),
        image_size=place,
        nodes=7,
    )
