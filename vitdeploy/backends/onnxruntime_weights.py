"""An ONNX file as ONNX Runtime opens it soonest: its large weights stay where they are, and are mapped.

ONNX Runtime parses a file with protobuf, which copies every weight into memory before it is packed for the
GEMMs. The same graph whose weights are "external data" is small, and external data is mapped instead. It may
lie in any file at any place: here in the ONNX file itself, where the bytes of each tensor are.

Weights of GEMMs alone are left there: once they are packed, nothing is mapped any more, and whoever writes
into the file afterwards changes no answer.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

LARGE = 64 * 2**10
"""Bytes of a tensor from which on it is left in the file; smaller ones would cost more as mappings."""

# Fields of ModelProto, GraphProto, NodeProto, TensorProto and StringStringEntryProto, by their numbers in
# onnx.proto.
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _OP_TYPE = 1, 4
_NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 8, 9, 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
_GEMMS = (b"MatMul", b"Gemm")


class _Field(NamedTuple):
    """A field of a message: where it begins, and where its content begins and ends."""

    number: int
    wire: int
    start: int
    content: int
    end: int


def without_weights(path: Path) -> bytes | None:
    """The model, its large weights as external data in the file ``path`` itself.

    None where there are none: its weights are small, or lie in other files already; and where it is no ONNX
    file, about which ONNX Runtime has more to say.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) < LARGE:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _model(data, path.name)
            except (ValueError, IndexError):  # not what a protobuf message looks like
                return None


def _model(data: mmap.mmap, name: str) -> bytes | None:
    left_out = False
    model = bytearray()
    for field in _fields(data, 0, len(data)):
        if (field.number, field.wire) != (_GRAPH, _BYTES):
            model += data[field.start : field.end]
            continue
        graph = bytearray()
        parts = [*_fields(data, field.content, field.end)]
        weights = {weight for part in parts if part.number == _NODE and (weight := _weight(data, part))}
        for part in parts:
            tensor = _outside(data, part, weights, name) if part.number == _INITIALIZER else None
            left_out |= tensor is not None
            graph += data[part.start : part.end] if tensor is None else _block(_INITIALIZER, tensor)
        model += _block(_GRAPH, bytes(graph))
    return bytes(model) if left_out else None


def _weight(data: mmap.mmap, node: _Field) -> bytes | None:
    """The name of what a GEMM multiplies by; None of other nodes."""
    fields = [*_fields(data, node.content, node.end)]
    inputs = [data[field.content : field.end] for field in fields if field.number == _INPUT]
    is_gemm = any(f.number == _OP_TYPE and data[f.content : f.end] in _GEMMS for f in fields)
    return inputs[1] if is_gemm else None


def _outside(data: mmap.mmap, tensor: _Field, weights: Collection[bytes], name: str) -> bytes | None:
    """An initializer whose bytes are external data; None where it stays as it is."""
    fields = [*_fields(data, tensor.content, tensor.end)]
    raw = [field for field in fields if field.number == _RAW_DATA]
    if len(raw) != 1 or raw[0].end - raw[0].content < LARGE:
        return None
    if not any(f.number == _NAME and data[f.content : f.end] in weights for f in fields):
        return None
    kept = b"".join(data[field.start : field.end] for field in fields if field.number != _RAW_DATA)
    place = {"location": name, "offset": str(raw[0].content), "length": str(raw[0].end - raw[0].content)}
    entries = (
        _block(_EXTERNAL_DATA, _block(_KEY, key.encode()) + _block(_VALUE, value.encode()))
        for key, value in place.items()
    )
    return kept + b"".join(entries) + _varint(_DATA_LOCATION << 3 | _VARINT) + _varint(_EXTERNAL)


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[_Field]:
    """The fields of a message that lies there.

    Raises:
        ValueError, IndexError: it is none.
    """
    at = begin
    while at < end:
        start = at
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            content = at
            _, at = _read_varint(data, at)
        elif wire == _BYTES:
            size, content = _read_varint(data, at)
            at = content + size
        else:
            content = at
            at += _FIXED.get(wire, end)
        if at > end or not number:
            raise ValueError(f"no field at byte {start}")
        yield _Field(number, wire, start, content, at)


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"no number at byte {at}")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _block(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
