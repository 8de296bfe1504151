"""The precision proof of an engine: the dtype in which TensorRT itself has each GEMM, norm and softmax.

It is read from layers, which a parsed network and a built engine give in one form: kind, dtypes, ONNX nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitdeploy.bundle.dtypes import PRECISION_DTYPES, OpDType
from vitdeploy.bundle.onnx_graph import GEMMS, declared, undeclared
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.config import Precision
from vitdeploy.errors import ExportError, PrecisionError
from vitdeploy.tensorrt.api import ILayer, INetworkDefinition

_OPERATORS: Mapping[str, str] = {
    "MATRIX_MULTIPLY": "MatMul",
    "CONVOLUTION": "Conv",
    "DECONVOLUTION": "ConvTranspose",
    "EINSUM": "Einsum",
    "ATTENTION_INPUT": "Attention",
    "NORMALIZATION": "LayerNormalization",
    "SOFTMAX": "Softmax",
    "REDUCE": "ReduceMean",
}
"""Kinds of layers whose dtype decides the answer, as the ONNX operators they come from."""
_NARROW = ("int8", "float8e4m3fn")
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
    """What a GEMM computes in when both its operands come out of DequantizeLinear."""
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
    tensors = (layer.get_input(index) for index in range(layer.num_inputs))
    return (tensor for tensor in tensors if tensor is not None)


def _outputs(layer: ILayer) -> Iterator[Any]:
    tensors = (layer.get_output(index) for index in range(layer.num_outputs))
    return (tensor for tensor in tensors if tensor is not None)


def _dtype(tensor: Any) -> OpDType:
    return _DTYPES.get(tensor.dtype.name, "undefined")


def _columns(layer: ILayer) -> int | None:
    first = next(_inputs(layer), None)
    shape = () if first is None else tuple(first.shape)
    return int(shape[-1]) if shape and shape[-1] > 0 else None


def _quantised(layer: ILayer, producers: Mapping[str, ILayer]) -> OpDType | None:
    """The narrow type that both operands of a layer were in before DequantizeLinear."""
    sources = []
    for tensor in list(_inputs(layer))[:2]:
        producer = producers.get(tensor.name)
        while producer is not None and producer.type.name in MOVING:
            first = producer.get_input(0)
            producer = producers.get(first.name) if first is not None else None
        if producer is None or producer.type.name != "DEQUANTIZE":
            return None
        sources.append(_dtype(next(_inputs(producer))))
    return sources[0] if len(set(sources)) == 1 else None


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


def prove_network(
    layers: Sequence[Layer],
    precision: Precision,
    islands: Collection[str],
    quantised: QuantisedGemms | None = None,
) -> PrecisionProof:
    """Read the proof from the layers of a parsed network.

    A strongly typed network is built in the dtypes it has: what stands here is what the engine computes in.

    Args:
        precision: the default dtype of the graph it was parsed from.
        islands: its sites that may be in fp32.
        quantised: GEMMs that must be in 8 bits on both sides, and no others; None takes what comes.
    """
    default = PRECISION_DTYPES[precision]
    ops = []
    for layer in layers:
        if layer.kind not in _OPERATORS or not layer.inputs:
            continue
        operator = _OPERATORS[layer.kind]
        name = layer.nodes[0] if layer.nodes else layer.name
        dtype = (layer.quantised if operator in GEMMS else None) or layer.inputs[0]
        island = dtype == "float32" and dtype != default and declared(name, islands)
        ops.append(OpPrecision(name=name, op=operator, dtype=dtype, island=island))
    ok = any(op.op in GEMMS for op in ops) and not _wide(ops, precision, quantised)
    return PrecisionProof(ops=tuple(ops), ok=ok)


def require(
    proof: PrecisionProof, precision: Precision, where: str, quantised: QuantisedGemms | None = None
) -> None:
    """Refuse a proof that does not hold.

    Raises:
        PrecisionError: names the ONNX nodes of every GEMM that is wider than declared.
    """
    if proof.ok:
        return
    wide = _wide(proof.ops, precision, quantised)
    names = ", ".join(f"{op.name} ({op.dtype})" for op in wide) or "no GEMM found"
    dtypes = precision if quantised is None else f"{quantised.kind} where it is quantised, and {precision}"
    raise PrecisionError(
        f"{where} would not be {dtypes} everywhere: {names}",
        hint="export the model again, or ask for fp32",
    )


def check_built(layers: Sequence[Layer], proof: PrecisionProof, where: str) -> None:
    """Hold a built engine's own layers against the proof of its network.

    Raises:
        PrecisionError: a kernel that computes a proven narrow GEMM reads only fp32, and casts nothing itself.
    """
    narrow = {op.name for op in proof.ops if op.op in GEMMS and op.dtype not in ("float32", "undefined")}
    for layer in layers:
        floats = {dtype for dtype in layer.inputs if dtype not in ("int32", "int64", "undefined")}
        casts = any(operator_of(node) == "Cast" for node in layer.nodes)
        if floats == {"float32"} and not casts and (widened := narrow.intersection(layer.nodes)):
            raise PrecisionError(f"{where}: {layer.name} computes {', '.join(sorted(widened))} in fp32")


def _wide(
    ops: Sequence[OpPrecision], precision: Precision, quantised: QuantisedGemms | None
) -> list[OpPrecision]:
    """The undeclared GEMMs; where nothing is said of quantised ones, not those."""
    wrong = undeclared(ops, precision, quantised)
    return [op for op in wrong if quantised is not None or op.dtype not in _NARROW]
