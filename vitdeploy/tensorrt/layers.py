"""The layers of a parsed network and of a built engine, in one form: kind, dtypes, ONNX nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitdeploy.bundle.dtypes import OpDType
from vitdeploy.errors import ExportError
from vitdeploy.tensorrt.api import ILayer, INetworkDefinition

_DTYPES: Mapping[str, OpDType] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8e4m3fn",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""TensorRT's names; what else there is (packed four-bit types, booleans) no GEMM here computes in."""
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# What an engine's report calls a format: "Half", "FP16", "Row major linear FP16 format", ...
_SPELLINGS: Sequence[tuple[str, OpDType]] = (
    (r"BF(?:loat)?16|bfloat16", "bfloat16"),
    (r"\bHalf\b|FP16|float16", "float16"),
    (r"FP8|Float8|E4M3", "float8e4m3fn"),
    (r"Int8|INT8", "int8"),
    (r"Int32|INT32", "int32"),
    (r"Int64|INT64", "int64"),
    (r"\bFloat\b|FP32|float32", "float32"),
)
MOVING = frozenset({"SHUFFLE", "SLICE", "IDENTITY"})
"""Kinds that move values and compute nothing."""


@dataclass(frozen=True)
class Layer:
    """One layer."""

    name: str
    kind: str
    """``MATRIX_MULTIPLY``, ``SOFTMAX``, ... of a network; in an engine, whatever it calls its own kernels."""
    inputs: tuple[OpDType, ...]
    outputs: tuple[OpDType, ...]
    nodes: tuple[str, ...]
    """ONNX nodes it stands for; none for what the parser adds by itself."""
    quantised: OpDType | None = None
    """What a GEMM computes in when all its operands come out of DequantizeLinear."""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """Tensors, of a network's layers."""
    columns: int | None = None
    """Of the first input's last axis, where it is fixed."""


def network_layers(network: INetworkDefinition) -> list[Layer]:
    """The layers of a network that was parsed, in order."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {output.name: layer for layer in layers for output in _outputs(layer)}
    return [
        Layer(
            name=layer.name,
            kind=layer.type.name,
            inputs=tuple(_dtype(tensor) for tensor in _inputs(layer)),
            outputs=tuple(_dtype(tensor) for tensor in _outputs(layer)),
            nodes=onnx_nodes(layer.metadata),
            quantised=_quantised(layer, producers),
            reads=tuple(tensor.name for tensor in _inputs(layer)),
            writes=tuple(tensor.name for tensor in _outputs(layer)),
            columns=_columns(layer),
        )
        for layer in layers
    ]


def inspected_layers(report: str) -> list[Layer]:
    """The layers of a built engine, from the engine inspector's JSON.

    Raises:
        ExportError: it is not the JSON of an engine that was built with detailed layer information.
    """
    try:
        rows = json.loads(report)["Layers"]
        return [_inspected(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the engine inspector's report has another form than expected: {error!r}"
        ) from error


def operator_of(node: str) -> str:
    """``blocks.3.attn/MatMul_2`` is a MatMul."""
    return node.rsplit("/", 1)[-1].split("_", 1)[0]


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's metadata names."""
    return tuple(dict.fromkeys(_NODE.findall(metadata)))


def _inputs(layer: ILayer) -> Iterator[Any]:
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return (tensor for tensor in found if tensor is not None)


def _outputs(layer: ILayer) -> Iterator[Any]:
    found = (layer.get_output(index) for index in range(layer.num_outputs))
    return (tensor for tensor in found if tensor is not None)


def _dtype(tensor: Any) -> OpDType:
    return _DTYPES.get(tensor.dtype.name, "undefined")


def _columns(layer: ILayer) -> int | None:
    first = next(_inputs(layer), None)
    shape = () if first is None else tuple(first.shape)
    return int(shape[-1]) if shape and shape[-1] > 0 else None


def _quantised(layer: ILayer, producers: Mapping[str, ILayer]) -> OpDType | None:
    """The narrow type that all floating-point operands of a layer were in before DequantizeLinear."""
    sources = []
    for tensor in list(_inputs(layer))[:2]:
        producer = producers.get(tensor.name)
        while producer is not None and producer.type.name in MOVING:
            first = producer.get_input(0)
            producer = producers.get(first.name) if first is not None else None
        if producer is None or producer.type.name != "DEQUANTIZE":
            return None
        sources.append(next(_inputs(producer)))
    return _dtype(sources[0]) if sources else None


def _inspected(row: Mapping[str, Any]) -> Layer:
    return Layer(
        name=str(row["Name"]),
        kind=str(row["LayerType"]),
        inputs=tuple(_spelled(tensor) for tensor in row.get("Inputs", ())),
        outputs=tuple(_spelled(tensor) for tensor in row.get("Outputs", ())),
        nodes=onnx_nodes(str(row.get("Metadata", ""))),
    )


def _spelled(tensor: Mapping[str, Any]) -> OpDType:
    """The dtype in a tensor's record: one text for format and type, or a key of its own for the type."""
    keys = ("Format/Datatype", "Datatype", "DataType", "Type", "Format")
    text = " ".join(str(tensor[key]) for key in keys if key in tensor)
    return next((dtype for form, dtype in _SPELLINGS if re.search(form, text)), "undefined")
