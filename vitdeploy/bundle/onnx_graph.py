"""Reading an ONNX graph: the precision proof, and the figures that `inspect` shows.

The proof looks at the emitted file, not at the plan: it lists the dtype of every operation whose
precision decides the answer, and holds it against the islands that the plan declares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vitdeploy.bundle.dtypes import PRECISION_DTYPES, QUANTISED_DTYPES, OpDType, from_onnx
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.bundle.quantisation import QuantisedGemms
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
_MOVING = ("Transpose", "Reshape")
"""What may stand between DequantizeLinear and a GEMM: it computes nothing."""
_QUANTISING = ("QuantizeLinear", "DequantizeLinear")


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


def prove_precision(
    model: onnx.ModelProto,
    precision: Precision,
    islands: Collection[str],
    quantised: QuantisedGemms | None = None,
) -> PrecisionProof:
    """List every GEMM, normalisation, softmax and mean with its dtype; an undeclared wide GEMM fails.

    A GEMM both of whose inputs come out of DequantizeLinear has the dtype that they were stored in.

    Args:
        precision: the graph's default dtype, ``fp32``, ``fp16`` or ``bf16``.
        islands: sites that may be in fp32; a node belongs to the site its name begins with.
        quantised: GEMMs that must be stored in 8 bits, and no others.
    """
    types = _types(model)
    if any(output not in types for node in model.graph.node for output in node.output):
        import onnx.shape_inference

        types |= _types(onnx.shape_inference.infer_shapes(model))
    wanted = PRECISION_DTYPES[precision]
    stored = _Stored(model.graph, types)
    rows = []
    for node in model.graph.node:
        if node.op_type not in WATCHED:
            continue
        dtype = next((types[v] for v in (*node.input, *node.output) if v in types), "undefined")
        if node.op_type in GEMMS:
            dtype = stored.dtype(node) or dtype
        island = dtype in _WIDE and dtype != wanted and declared(node.name, islands)
        rows.append(OpPrecision(name=node.name, op=node.op_type, dtype=dtype, island=island))
    ok = bool(rows) and not undeclared(rows, precision, quantised)
    return PrecisionProof(ops=tuple(rows), ok=ok)


class _Stored:
    """What the values of a graph were stored in before DequantizeLinear."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, OpDType]) -> None:
        self.types = types
        self.producers = {output: node for node in graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def dtype(self, gemm: onnx.NodeProto) -> OpDType | None:
        """Of both inputs of a GEMM; None where one of them was float all the way."""
        first, second = (self._of(value) for value in gemm.input[:2])
        if first is None or second is None:
            return None
        if first == second:
            return first
        return next((d for d in (first, second) if d not in QUANTISED_DTYPES.values()), "undefined")

    def _of(self, value: str) -> OpDType | None:
        node = self.producers.get(value)
        while node is not None and node.op_type in _MOVING:
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        source = self.producers.get(node.input[0])
        zeros = [list(n.input)[2:3] for n in (node, source) if n is not None and n.op_type in _QUANTISING]
        if any(self._is_off(name) for names in zeros for name in names):
            return "undefined"  # an offset, which TensorRT takes from nobody
        if source is None:
            return self.types.get(node.input[0], "undefined")
        # Without a zero point, what is stored is uint8.
        return self.types.get(zeros[-1][0], "undefined") if zeros[-1] else "uint8"

    def _is_off(self, zero_point: str) -> bool:
        constant = self.constants.get(zero_point)
        return constant is None or any(constant.raw_data) or any(constant.int32_data)


def declared(node: str, islands: Collection[str]) -> bool:
    """Whether a node lies on an island; inside an attention, the scores follow what produced the queries."""
    site = site_of(node)
    return site in islands or any(f"{site}.{part}" in islands for part in ("qkv", "key"))


def site_of(node: str) -> str:
    """``blocks.3.attn.qkv/MatMul`` belongs to ``blocks.3.attn.qkv``."""
    return node.rsplit("/", 1)[0]


def undeclared(
    ops: Iterable[OpPrecision], precision: Precision, quantised: QuantisedGemms | None = None
) -> tuple[OpPrecision, ...]:
    """The GEMMs that make a proof fail; a quantised site without any is among them, of no dtype."""
    wanted, sites = PRECISION_DTYPES[precision], frozenset(quantised.sites if quantised else ())
    gemms = [row for row in ops if row.op in GEMMS]

    def holds(row: OpPrecision) -> bool:
        if quantised is not None and site_of(row.name) in sites:
            return row.dtype == quantised.dtype
        return row.dtype == wanted or row.island

    there = {site_of(row.name) for row in gemms}
    missing = (OpPrecision(name=site, op="MatMul", dtype="undefined") for site in sorted(sites - there))
    return (*(row for row in gemms if not holds(row)), *missing)


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
