"""An ONNX file without the numbers of its weights: its graph can be read and checked in milliseconds."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

from vitdeploy.bundle.protobuf import Field, field_of, fields
from vitdeploy.errors import UsageError

LEAST = 1 << 16
"""Bytes of a constant below which its numbers stay: shapes and zero points are part of the graph."""
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def read_outline(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; large constants have a name, a dtype and a shape, and no data.

    Raises:
        UsageError: it is not an ONNX file.
    """
    model = onnx.ModelProto()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model.ParseFromString(_outlined(data))
    except Exception as error:  # a protobuf DecodeError, whose class lies in whichever protobuf is installed
        raise UsageError(f"{path}: not a readable ONNX file ({error})") from error
    return model


def weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which constants without data are inputs: a whole graph, to be checked."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, kept = copy.graph, []
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or _is_empty(tensor):
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
        else:
            kept.append(tensor)
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return copy


def _is_empty(tensor: onnx.TensorProto) -> bool:
    return not any(field.name.endswith("_data") for field, _ in tensor.ListFields())


def _outlined(data: mmap.mmap) -> bytes:
    """The bytes of a model without large constants."""
    return b"".join(
        field_of(_GRAPH, b"".join(_graph(data, field)))
        if field.number == _GRAPH
        else data[field.begin : field.end]
        for field in fields(data, 0, len(data))
    )


def _graph(data: mmap.mmap, graph: Field) -> Iterator[bytes]:
    for field in fields(data, graph.content, graph.end):
        if field.number == _INITIALIZER and field.end - field.content > LEAST:
            parts = fields(data, field.content, field.end)
            tensor = (data[part.begin : part.end] for part in parts if part.number != _RAW_DATA)
            yield field_of(_INITIALIZER, b"".join(tensor))
        else:
            yield data[field.begin : field.end]
