"""The precision proof of an engine: the dtype in which TensorRT itself has each GEMM, norm and softmax."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vitdeploy.bundle.dtypes import PRECISION_DTYPES
from vitdeploy.bundle.manifest import OpPrecision, PrecisionProof
from vitdeploy.bundle.onnx_graph import GEMMS, declared, undeclared
from vitdeploy.config import Precision
from vitdeploy.errors import PrecisionError
from vitdeploy.tensorrt.layers import Layer, operator_of

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


def prove_network(layers: Sequence[Layer], precision: Precision, islands: Collection[str]) -> PrecisionProof:
    """Read the proof from the layers of a parsed network.

    A strongly typed network is built in the dtypes it has: what stands here is what the engine computes in.

    Args:
        precision: the default dtype of the graph it was parsed from.
        islands: its sites that may be in fp32.
    """
    wanted = PRECISION_DTYPES[precision]
    ops = []
    for layer in layers:
        if layer.kind not in _OPERATORS or not layer.inputs:
            continue
        operator = _OPERATORS[layer.kind]
        name = layer.nodes[0] if layer.nodes else layer.name
        dtype = (layer.quantised if operator in GEMMS else None) or layer.inputs[0]
        island = dtype == "float32" and dtype != wanted and declared(name, islands)
        ops.append(OpPrecision(name=name, op=operator, dtype=dtype, island=island))
    ok = any(op.op in GEMMS for op in ops) and not _wide(ops, precision)
    return PrecisionProof(ops=tuple(ops), ok=ok)


def require(proof: PrecisionProof, precision: Precision, where: str) -> None:
    """Refuse a proof that does not hold.

    Raises:
        PrecisionError: names the ONNX nodes of every GEMM that is wider than declared.
    """
    if proof.ok:
        return
    wide = _wide(proof.ops, precision)
    names = ", ".join(f"{op.name} ({op.dtype})" for op in wide) or "no GEMM found"
    raise PrecisionError(
        f"{where} would not be {precision} everywhere: {names}",
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


def _wide(ops: Sequence[OpPrecision], precision: Precision) -> list[OpPrecision]:
    """The undeclared GEMMs, but for those that are quantised on purpose."""
    return [op for op in undeclared(ops, precision) if op.dtype not in _NARROW]
