"""Reading an ONNX graph: the precision proof, and the figures that `inspect` shows.

The proof looks at the emitted file, not at the plan: it lists the dtype of every operation whose
precision decides the answer, and holds it against the islands that the plan declares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vitdeploy.bundle.dtypes import PRECISION_DTYPES, OpDType, from_onnx
from vitdeploy.bundle.manifest import OpPrecision, PrecisionProof
from vitdeploy.config import Precision
from vitdeploy.errors import UsageError

if TYPE_CHECKING:
    import onnx

GEMMS = frozenset({"MatMul", "Gemm", "Conv", "Attention", "Einsum", "ConvTranspose"})
NORMALISATIONS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "BatchNormalization",
    }
)
WATCHED = GEMMS | NORMALISATIONS | {"Softmax", "ReduceMean"}
_WIDE = ("float32", "float64")


@dataclass(frozen=True)
class GraphSummary:
    """What `inspect` tells of an ONNX file."""

    opset: int
    ir_version: int
    producer: str
    nodes: int
    operators: dict[str, int]
    parameters: int
    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    metadata: dict[str, str]


def read_graph(path: Path) -> onnx.ModelProto:
    """Open an ONNX file without the weights that lie beside it.

    Raises:
        UsageError: it is not an ONNX file.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # a protobuf DecodeError, whose class lies in whichever protobuf is installed
        raise UsageError(f"{path}: not a readable ONNX file ({error})") from error
    if not model.graph.node:
        raise UsageError(f"{path}: not an ONNX file, or one with an empty graph")
    properties = (text for entry in model.metadata_props for text in (entry.key, entry.value))
    if not all(isinstance(text, str) for text in properties) or not all(map(_is_text, graphs_of(model))):
        raise UsageError(f"{path}: names in it are no text: it is damaged", hint="copy or export it again")
    return model


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, the file's own functions, and what lies inside of their ``If`` and ``Loop``."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        waiting += [a.g for a in attributes if a.HasField("g")]
        waiting += [inner for a in attributes for inner in a.graphs]


def _is_text(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    """Whether its names are: protobuf hands out damaged ones as bytes."""
    import onnx

    nodes = ((n.op_type, n.domain, n.name, *n.input, *n.output) for n in graph.node)
    names = [name for node in nodes for name in node]
    if isinstance(graph, onnx.GraphProto):
        values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        names += [value.name for value in values]
    return all(isinstance(name, str) for name in names)


def dtype_name(element_type: int) -> OpDType:
    """numpy's name of what ONNX has a number for."""
    import onnx

    try:
        return cast(OpDType, from_onnx(onnx.TensorProto.DataType.Name(element_type)))
    except ValueError:  # a number that stands for none
        return "undefined"


def _types(model: onnx.ModelProto) -> dict[str, OpDType]:
    """The dtype of every value whose dtype the file states."""
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {v.name: dtype_name(v.type.tensor_type.elem_type) for v in values if v.type.tensor_type.elem_type}
    return types | {tensor.name: dtype_name(tensor.data_type) for tensor in graph.initializer}


def prove_precision(model: onnx.ModelProto, precision: Precision, islands: Collection[str]) -> PrecisionProof:
    """List every GEMM, normalisation, softmax and mean with its dtype; an undeclared wide GEMM fails.

    Args:
        precision: the graph's default dtype, ``fp32``, ``fp16`` or ``bf16``.
        islands: sites that may be in fp32; a node belongs to the site its name begins with.
    """
    types = _types(model)
    if any(output not in types for node in model.graph.node for output in node.output):
        import onnx.shape_inference

        types |= _types(onnx.shape_inference.infer_shapes(model))
    wanted = PRECISION_DTYPES[precision]
    rows = []
    for node in model.graph.node:
        if node.op_type not in WATCHED:
            continue
        dtype = next((types[v] for v in (*node.input, *node.output) if v in types), "undefined")
        island = dtype in _WIDE and dtype != wanted and declared(node.name, islands)
        rows.append(OpPrecision(name=node.name, op=node.op_type, dtype=dtype, island=island))
    ok = bool(rows) and not undeclared(rows, precision)
    return PrecisionProof(ops=tuple(rows), ok=ok)


def declared(node: str, islands: Collection[str]) -> bool:
    """Whether a node lies on an island; inside an attention, the scores follow what produced the queries."""
    site = node.rsplit("/", 1)[0]
    return site in islands or any(f"{site}.{part}" in islands for part in ("qkv", "key"))


def undeclared(ops: Iterable[OpPrecision], precision: Precision) -> tuple[OpPrecision, ...]:
    """The GEMMs that make a proof fail."""
    wanted = PRECISION_DTYPES[precision]
    return tuple(row for row in ops if row.op in GEMMS and row.dtype != wanted and not row.island)


def summarise(model: onnx.ModelProto) -> GraphSummary:
    """Count what is in a graph."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}

    def specs(values: object) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        return {
            v.name: (
                dtype_name(v.type.tensor_type.elem_type),
                tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
            )
            for v in values  # type: ignore[attr-defined]
            if v.name not in weights
        }

    sizes = [_elements(tensor.dims) for tensor in graph.initializer]
    return GraphSummary(
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        nodes=len(graph.node),
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        parameters=sum(sizes),
        inputs=specs(graph.input),
        outputs=specs(graph.output),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _elements(dims: Collection[int]) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total
