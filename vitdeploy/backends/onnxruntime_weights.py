"""An ONNX file as ONNX Runtime opens it soonest: its large weights stay where they are, and are mapped.

ONNX Runtime parses a file with protobuf, which copies every weight into memory before it is packed for the
GEMMs. The same graph whose weights are "external data" is small, and external data is mapped instead. It may
lie in any file at any place: here in the ONNX file itself, where the bytes of each tensor are.

Weights of GEMMs alone are left there: once they are packed, nothing is mapped any more, and whoever writes
into the file afterwards changes no answer.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from pathlib import Path

from vitdeploy.bundle.protobuf import BYTES, VARINT, Field, field_of, fields, varint

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
_GEMMS = (b"MatMul", b"Gemm")


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
    for field in fields(data, 0, len(data)):
        if (field.number, field.kind) != (_GRAPH, BYTES):
            model += data[field.begin : field.end]
            continue
        graph = bytearray()
        parts = [*fields(data, field.content, field.end)]
        weights = {weight for part in parts if part.number == _NODE and (weight := _weight(data, part))}
        for part in parts:
            tensor = _outside(data, part, weights, name) if part.number == _INITIALIZER else None
            left_out |= tensor is not None
            graph += data[part.begin : part.end] if tensor is None else field_of(_INITIALIZER, tensor)
        model += field_of(_GRAPH, bytes(graph))
    return bytes(model) if left_out else None


def _weight(data: mmap.mmap, node: Field) -> bytes | None:
    """The name of what a GEMM multiplies by; None of other nodes."""
    parts = [*fields(data, node.content, node.end)]
    inputs = [data[field.content : field.end] for field in parts if field.number == _INPUT]
    is_gemm = any(f.number == _OP_TYPE and data[f.content : f.end] in _GEMMS for f in parts)
    return inputs[1] if is_gemm else None


def _outside(data: mmap.mmap, tensor: Field, weights: Collection[bytes], name: str) -> bytes | None:
    """An initializer whose bytes are external data; None where it stays as it is."""
    parts = [*fields(data, tensor.content, tensor.end)]
    raw = [field for field in parts if field.number == _RAW_DATA]
    if len(raw) != 1 or raw[0].end - raw[0].content < LARGE:
        return None
    if not any(f.number == _NAME and data[f.content : f.end] in weights for f in parts):
        return None
    kept = b"".join(data[field.begin : field.end] for field in parts if field.number != _RAW_DATA)
    place = {"location": name, "offset": str(raw[0].content), "length": str(raw[0].end - raw[0].content)}
    entries = (
        field_of(_EXTERNAL_DATA, field_of(_KEY, key.encode()) + field_of(_VALUE, value.encode()))
        for key, value in place.items()
    )
    return kept + b"".join(entries) + varint(_DATA_LOCATION << 3 | VARINT) + varint(_EXTERNAL)
