"""An ONNX file without the numbers of its weights: what its graph is can be read and checked in milliseconds.

A protobuf message is a sequence of fields, each with its number and length before it, so that a reader can
step over what it does not want (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from vitdeploy.errors import UsageError

LEAST = 1 << 16
"""Bytes of a constant below which its numbers stay: shapes and zero points are part of the graph."""
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
"""Bytes of the kinds of field that have always as many."""
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


class _Field(NamedTuple):
    number: int
    begin: int
    """Of its tag."""
    payload: int
    end: int


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[_Field]:
    """The fields of the message that lies between two places."""
    while begin < end:
        tag, payload = _varint(data, begin)
        kind = tag & 7
        if kind == _VARINT:
            _, stop = _varint(data, payload)
        elif kind == _LENGTH_DELIMITED:
            length, payload = _varint(data, payload)
            stop = payload + length
        elif kind in _FIXED:
            stop = payload + _FIXED[kind]
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if stop > end:
            raise ValueError("it ends too early")
        yield _Field(tag >> 3, begin, payload, stop)
        begin = stop


def _outlined(data: mmap.mmap) -> bytes:
    """The bytes of a model without large constants."""
    parts = []
    for field in _fields(data, 0, len(data)):
        if field.number == _GRAPH:
            graph = b"".join(_graph(data, field))
            parts += [field_header(_GRAPH, len(graph)), graph]
        else:
            parts.append(data[field.begin : field.end])
    return b"".join(parts)


def _graph(data: mmap.mmap, graph: _Field) -> Iterator[bytes]:
    for field in _fields(data, graph.payload, graph.end):
        if field.number == _INITIALIZER and field.end - field.payload > LEAST:
            tensor = b"".join(
                data[part.begin : part.end]
                for part in _fields(data, field.payload, field.end)
                if part.number != _RAW_DATA
            )
            yield field_header(_INITIALIZER, len(tensor))
            yield tensor
        else:
            yield data[field.begin : field.end]


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """The number that begins at a place, and where it ends."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7


def field_header(field: int, length: int) -> bytes:
    """The tag and the length that come before a length-delimited field."""
    return varint(field << 3 | _LENGTH_DELIMITED) + varint(length)


def varint(value: int) -> bytes:
    """A number as protobuf writes it, seven bits in a byte, the lowest first."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
