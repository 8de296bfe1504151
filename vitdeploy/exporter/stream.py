"""Writing a large ONNX file with one tensor in memory at a time.

The usual way builds a protobuf that holds every weight, then its bytes, then writes them: three models in
memory. A protobuf message is the concatenation of its fields, so the weights can follow one by one, once
the length of the graph that they belong to is known (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

_GRAPH, _INITIALIZER, _RAW_DATA = (
    onnx.ModelProto.GRAPH_FIELD_NUMBER,
    onnx.GraphProto.INITIALIZER_FIELD_NUMBER,
    onnx.TensorProto.RAW_DATA_FIELD_NUMBER,
)
_LENGTH_DELIMITED = 2


def save_streaming(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path``, weights inside; the model loses its initialisers on the way."""
    tensors = [
        value.const_value for value in model.graph.initializers.values() if value.const_value is not None
    ]
    model.graph.initializers.clear()
    proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    weights = [(_opening(tensor), tensor) for tensor in tensors]
    length = len(graph) + sum(len(opening) + tensor.nbytes for opening, tensor in weights)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_header(_GRAPH, length))
        file.write(graph)
        for opening, tensor in weights:
            file.write(opening)
            file.write(tensor.tobytes())


def _opening(tensor: ir.TensorProtocol) -> bytes:
    """All of an initialiser field that comes before the tensor's data."""
    described = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    inner: bytes = described.SerializeToString() + _header(_RAW_DATA, tensor.nbytes)
    return _header(_INITIALIZER, len(inner) + tensor.nbytes) + inner


def _header(field: int, length: int) -> bytes:
    """The tag and the length that come before a length-delimited field."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
