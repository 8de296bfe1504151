"""One precision plan of a model, as an ONNX file with its precision proof."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch

from vitdeploy._version import __version__
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.manifest import Artifact, TensorSpec
from vitdeploy.bundle.onnx_graph import prove_precision, undeclared
from vitdeploy.bundle.onnx_metadata import properties
from vitdeploy.bundle.onnx_outline import read_outline, weights_as_inputs
from vitdeploy.bundle.protobuf import header
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import ExportError, PrecisionError
from vitdeploy.exporter.graph import trace
from vitdeploy.exporter.request import NEWEST_OPSET
from vitdeploy.exporter.shared_weights import SharedWeights
from vitdeploy.exporter.subject import Subject
from vitdeploy.machine.memory import give_back, release
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import DTYPES, PrecisionPlan
from vitdeploy.quantisation.qdq import insert
from vitdeploy.scores import usual_scores

if TYPE_CHECKING:
    from vitdeploy.bundle.folder import BundleWriter
    from vitdeploy.exporter.quantised import QuantisedForm

INPUT = "pixel_values"
EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights above which they lie in a file of their own: a protobuf ends at 2 GB."""
FILES = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "mixed": "model.mixed.onnx",
    "int8": "model.int8.onnx",
    "int8-fp16": "model.int8-fp16.onnx",
    "fp8": "model.fp8.onnx",
    "fp8-fp16": "model.fp8-fp16.onnx",
}

_GRAPH, _INITIALIZER, _RAW_DATA = (
    onnx.ModelProto.GRAPH_FIELD_NUMBER,
    onnx.GraphProto.INITIALIZER_FIELD_NUMBER,
    onnx.TensorProto.RAW_DATA_FIELD_NUMBER,
)


def write_onnx(
    subject: Subject,
    plan: PrecisionPlan,
    writer: BundleWriter,
    *,
    batch: BatchRange,
    opset: int,
    example: torch.Tensor,
    requested: ArtifactPrecision,
    fallback: str | None = None,
    place: Size | None = None,
    shared: SharedWeights | None = None,
    quantised: QuantisedForm | None = None,
) -> Artifact:
    """Trace, name, save, check and prove one artifact; return its record.

    Args:
        example: golden inputs, for their shape and dtype.
        requested: the precision the user asked for; ``fallback`` says why it is another one.
        place: the image size as artifacts name it; None is the first.
        shared: where weights go that other sizes have, too; None keeps all of them in the file.
        quantised: what to quantise in the graph; ``plan`` is of the rest.

    Raises:
        PrecisionError: weights overflow, or a GEMM is not in the precision of the plan.
        ExportError: the module cannot be traced, or the graph is not valid ONNX.
    """
    begin = time.perf_counter()
    deployed = subject.deployed(plan) if quantised is None else quantised.deployed(plan)
    islands = subject.islands(deployed, plan)
    default = next(name for name, dtype in DTYPES.items() if dtype == plan.default)
    kind = plan.name if quantised is None else quantised.name
    precision = plan.name if quantised is None else quantised.kind
    graph = trace(deployed, example, batch=batch, opset=opset, names=(INPUT, *subject.outputs))
    if quantised is not None:
        insert(graph, quantised.model.sites, quantised.rest, quantised.model.attention)
    _describe(graph, subject, precision)
    path = writer.file(sized(FILES[kind], place))
    files = _save(graph, path, shared)
    inputs, outputs = (
        tuple(_spec(value) for value in values) for values in (graph.graph.inputs, graph.graph.outputs)
    )
    nodes = graph.graph.num_nodes()
    recorded = isinstance(deployed, DeployedModel)
    del graph, deployed
    if not recorded:
        release()  # PyTorch's tracer leaves cycles that hold the whole model
    outline = read_outline(path)
    _check(outline, path.name)
    gemms = None if quantised is None else QuantisedGemms.of(quantised.kind, quantised.record)
    proof = prove_precision(outline, default, islands, gemms)
    give_back()
    if not proof.ok:
        names = (
            ", ".join(f"{row.name} ({row.dtype})" for row in undeclared(proof.ops, default, gemms))
            or "no GEMM found"
        )
        declared = default if gemms is None else f"{gemms.kind} where it is quantised, and {default}"
        raise PrecisionError(f"{path.name} is not {declared} everywhere: {names}")
    return Artifact(
        name=named(f"onnx-{kind}", place),
        format="onnx",
        precision=precision,
        requested=requested,
        path=path.name,
        files=tuple(file.name for file in files),
        opset=opset,
        batch=batch,
        inputs=inputs,
        outputs=outputs,
        islands=islands,
        fallback=fallback,
        proof=proof,
        quantisation=None if quantised is None else quantised.record,
        image_size=place,
        build_seconds=round(time.perf_counter() - begin, 3),
        nodes=nodes,
    )


def _describe(model: ir.Model, subject: Subject, precision: str) -> None:
    model.producer_name, model.producer_version = "vitdeploy", __version__
    model.graph.name = subject.config.kind if subject.config else "model"
    classes = next((value.shape for value in model.graph.outputs if value.name == "logits"), None)
    scores = subject.scores or usual_scores(
        int(classes[-1]) if classes and isinstance(classes[-1], int) else 0
    )
    model.metadata_props.update(
        properties(
            precision=precision,
            input=subject.input,
            outputs=subject.outputs,
            scores=scores,
            labels=subject.labels,
            preprocess=subject.preprocess,
        )
    )


def _save(model: ir.Model, path: Path, shared: SharedWeights | None) -> list[Path]:
    """Write the graph; it loses its weights, which the exporter's pattern matchers would hold on to."""
    values = list(model.graph.initializers.values())
    if shared is not None:
        files = [path, shared.path] if shared.take(model) else [path]
        save_streaming(model, path)
    elif sum(value.const_value.nbytes for value in values if value.const_value) <= EXTERNAL_ABOVE:
        save_streaming(model, path)
        files = [path]
    else:
        data = path.with_name(f"{path.name}.data")
        ir.save(model, path, external_data=data.name)
        files = [path, data]
    for value in values:
        value.const_value = None
    return files


def _spec(value: ir.Value) -> TensorSpec:
    shape = () if value.shape is None else tuple(d if isinstance(d, int) else "N" for d in value.shape)
    dtype = "float32" if value.dtype is None else str(value.dtype.numpy())
    return TensorSpec(name=value.name or "", dtype=dtype, shape=shape)


def _check(outline: onnx.ModelProto, name: str) -> None:
    """The graph of a file; its weights have been read where parity has run it."""
    try:
        onnx.checker.check_model(weights_as_inputs(outline), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{name} is not valid ONNX: {' '.join(str(error).split())}",
            hint=f"operators take more dtypes at a later --opset, up to {NEWEST_OPSET}",
        ) from error


def save_streaming(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path``, weights inside, with one tensor in memory at a time; external ones stay.

    The usual way builds a protobuf that holds every weight, then its bytes, then writes them: three models in
    memory. A protobuf message is the concatenation of its fields, so the weights can follow one by one, once
    the length of the graph that they belong to is known (https://protobuf.dev/programming-guides/encoding/).
    The model loses its initialisers on the way.
    """
    tensors = []
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor):
            del model.graph.initializers[name]
            if value.const_value is not None:
                tensors.append(value.const_value)
    proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    weights = [(_opening(tensor), tensor) for tensor in tensors]
    length = len(graph) + sum(len(opening) + tensor.nbytes for opening, tensor in weights)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(header(_GRAPH, length))
        file.write(graph)
        for opening, tensor in weights:
            file.write(opening)
            file.write(tensor.tobytes())


def _opening(tensor: ir.TensorProtocol) -> bytes:
    """All of an initialiser field that comes before the tensor's data."""
    described = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    inner: bytes = described.SerializeToString() + header(_RAW_DATA, tensor.nbytes)
    return header(_INITIALIZER, len(inner) + tensor.nbytes) + inner
