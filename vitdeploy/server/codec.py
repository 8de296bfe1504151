"""Tensors on the wire of the Open Inference Protocol v2: JSON numbers, and the binary extension over HTTP.

Specification: the Open Inference Protocol (github.com/kserve/open-inference-protocol) and, for the binary
data and classification extensions, the Triton Inference Server's protocol documents.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.errors import MissingDependency
from vitdeploy.server.messages import Array, InferRequest, InferResponse, RequestedOutput, RequestError

WIRE = {np.dtype(name): wire for name, wire in DATATYPES.items() if name != "bfloat16"}
"""The protocol's names of numpy's dtypes, which it takes long to name."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring = 2, 10, 60
_DTYPES = {wire: dtype for dtype, wire in WIRE.items()}
_MAX_DIMENSIONS = 8
_MOST_ELEMENTS = 1 << 31


def protocol_dtype(datatype: Any, where: str) -> np.dtype[Any]:
    """numpy's dtype of a protocol's datatype.

    Raises:
        RequestError: there is none.
    """
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        raise RequestError("invalid", f"{where}: datatype {_short(datatype)} is not supported")
    return _DTYPES[datatype]


def checked_shape(shape: Any, where: str) -> tuple[int, ...]:
    """A shape that a client sent.

    Raises:
        RequestError: not a list of sizes, or beyond all reason.
    """
    good = (
        isinstance(shape, Sequence) and not isinstance(shape, str | bytes) and len(shape) <= _MAX_DIMENSIONS
    )
    if not good or any(type(n) is not int or not 0 <= n <= _MOST_ELEMENTS for n in shape):
        raise RequestError("invalid", f"{where}: shape {_short(shape)} is not a list of sizes")
    if math.prod(shape) > _MOST_ELEMENTS:
        raise RequestError("invalid", f"{where}: shape {_short(shape)} has too many elements")
    return tuple(shape)


def from_bytes(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Array:
    """A tensor from its little-endian bytes; the array is a view of them.

    Raises:
        RequestError: there are too few or too many.
    """
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise RequestError(
            "invalid", f"{where}: {len(data)} bytes, but {list(shape)} of {dtype} have {size} bytes"
        )
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)


def from_numbers(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Array:
    """A tensor from JSON numbers, flat or nested, row by row.

    Raises:
        RequestError: not numbers, not as many as the shape has, or outside the dtype's range.
    """
    if not isinstance(data, list):
        raise RequestError("invalid", f"{where}: data is not an array")
    try:
        array = np.array(data)
        if dtype.kind in "iu" and array.dtype.kind == "f":  # numpy's way with integers beyond int64
            array = np.array(data, dtype=object)
    except (ValueError, OverflowError) as error:
        raise RequestError("invalid", f"{where}: data is not an array of numbers of one shape") from error
    allowed: dict[str, set[type]] = {"f": {int, float}, "b": {bool}}
    if not _types(data) <= allowed.get(dtype.kind, {int}):
        raise RequestError("invalid", f"{where}: data does not fit the datatype {WIRE[dtype]}")
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise RequestError(
            "invalid",
            f"{where}: data has {_short(list(array.shape))} elements, but the shape is {list(shape)}",
        )
    try:
        with np.errstate(over="ignore"):
            converted = array.astype(dtype).reshape(shape)
        floats = dtype.kind == "f"
        exact = np.isfinite(converted).all() if floats else (converted.ravel() == array.ravel()).all()
    except OverflowError:
        exact = False
    if not exact:
        raise RequestError("invalid", f"{where}: data is outside the range of {WIRE[dtype]}")
    return converted


def _types(data: list[Any]) -> set[type]:
    """What kinds of values there are, in lists within lists too; to numpy, true is 1."""
    types: set[type] = set(map(type, data))
    if list in types:
        types.remove(list)
        types = types.union(*(_types(item) for item in data if isinstance(item, list)))
    return types


def parse_request(body: memoryview, header_length: int | None) -> InferRequest:
    """Read the body of an infer request.

    Args:
        body: JSON, and behind it the bytes of the binary tensors one after the other.
        header_length: of the JSON, as ``Inference-Header-Content-Length`` says; None is all of it.

    Raises:
        RequestError: says what is wrong and where.
    """
    if header_length is not None and not 0 < header_length <= len(body):
        raise RequestError(
            "invalid",
            f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes",
        )
    document = parse_json(body if header_length is None else body[:header_length])
    tail = body[len(body) if header_length is None else header_length :]
    inputs: dict[str, Array] = {}
    for index, entry in enumerate(_entries(document, "inputs", required=True)):
        name = _name(entry, f"inputs[{index}]")
        if name in inputs:
            raise RequestError("invalid", f"input '{name}' is given twice")
        inputs[name], tail = _input(entry, f"input '{name}'", tail)
    if tail:
        raise RequestError("invalid", f"{len(tail)} bytes behind the tensors that the JSON announces")
    parameters = _parameters(document, "the request")
    binary = parameters.get("binary_data_output") is True
    requested = []
    for index, entry in enumerate(_entries(document, "outputs", required=False)):
        name = _name(entry, f"outputs[{index}]")
        requested.append(requested_output(name, _parameters(entry, f"output '{name}'"), binary=binary))
    return InferRequest(
        inputs=inputs,
        requested=tuple(requested),
        binary=binary,
        id=_id(document),
        timeout=timeout_seconds(parameters.get("timeout")),
        image_size=image_size(parameters),
    )


def render_response(response: InferResponse) -> tuple[list[bytes], int | None]:
    """The body of an answer in parts, and the length of its JSON if binary tensors follow.

    Raises:
        MissingDependency: orjson is not installed.
    """
    try:
        import orjson
    except ImportError as error:
        raise MissingDependency("orjson", extra="serve", purpose="serving") from error
    outputs, tail = list[dict[str, Any]](), list[bytes]()
    for name, array in response.outputs.items():
        text = array.dtype == object
        entry: dict[str, Any] = {
            "name": name,
            "datatype": "BYTES" if text else WIRE[array.dtype],
            "shape": list(array.shape),
        }
        if response.binary(name):
            data = length_prefixed(array) if text else little_endian(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        elif text:
            entry["data"] = [item.decode(errors="replace") for item in array.ravel()]
        else:
            entry["data"] = array.ravel()
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.request.id:
        document["id"] = response.request.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = outputs
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return [head, *tail], len(head) if tail else None


def little_endian(array: Array) -> bytes:
    """The raw bytes of a tensor."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def length_prefixed(texts: Array) -> bytes:
    """BYTES elements: each behind its length in four bytes, little-endian."""
    return b"".join(len(item).to_bytes(4, "little") + item for item in texts.ravel())


def parse_json(data: bytes | memoryview) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: not JSON, or no object.
        MissingDependency: orjson is not installed.
    """
    try:
        import orjson
    except ImportError as error:
        raise MissingDependency("orjson", extra="serve", purpose="serving") from error
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError("invalid", f"failed to parse the request JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError("invalid", "failed to parse the request JSON: not an object")
    return document


def timeout_seconds(microseconds: Any) -> float | None:
    """A request's ``timeout`` parameter, in seconds; zero is none, as elsewhere.

    Raises:
        RequestError: not a whole number of microseconds.
    """
    if isinstance(microseconds, str) and microseconds.isdecimal() and len(microseconds) < 20:
        microseconds = int(microseconds)
    if microseconds is None or (microseconds == 0 and not isinstance(microseconds, bool)):
        return None
    if not isinstance(microseconds, int) or isinstance(microseconds, bool) or microseconds < 0:
        raise RequestError("invalid", f"timeout {_short(microseconds)} is not a number of microseconds")
    return microseconds / 1e6


def image_size(parameters: Mapping[str, Any]) -> str | None:
    """A request's ``image_size`` parameter, of a model that has several.

    Raises:
        RequestError: not a text.
    """
    given = parameters.get("image_size")
    if given is not None and not isinstance(given, str):
        raise RequestError("invalid", f"image_size {_short(given)} is not a text, as 384x384")
    return given


def requested_output(name: str, parameters: Mapping[str, Any], *, binary: bool) -> RequestedOutput:
    """An output as its entry in the request asks for it.

    Raises:
        RequestError: a classification of no classes.
    """
    classes = parameters.get("classification", 0)
    if not isinstance(classes, int) or isinstance(classes, bool) or not 0 <= classes < 1 << 31:
        raise RequestError(
            "invalid", f"output '{name}': classification {_short(classes)} is not a number of classes"
        )
    if "shared_memory_region" in parameters:
        raise RequestError("invalid", f"output '{name}': shared memory is not supported")
    return RequestedOutput(name, classes, bool(parameters.get("binary_data", binary)))


def _input(entry: Mapping[str, Any], where: str, tail: memoryview) -> tuple[Array, memoryview]:
    """One input, and what of the binary tail is left behind it."""
    dtype, shape = protocol_dtype(entry.get("datatype"), where), checked_shape(entry.get("shape"), where)
    parameters = _parameters(entry, where)
    if "shared_memory_region" in parameters:
        raise RequestError("invalid", f"{where}: shared memory is not supported")
    size = parameters.get("binary_data_size")
    if size is None:
        return from_numbers(entry.get("data"), dtype, shape, where), tail
    if "data" in entry:
        raise RequestError("invalid", f"{where}: has both data and binary_data_size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail):
        raise RequestError(
            "invalid", f"{where}: binary_data_size is {_short(size)}, but {len(tail)} bytes are left"
        )
    return from_bytes(tail[:size], dtype, shape, where), tail[size:]


def _entries(document: Mapping[str, Any], key: str, *, required: bool) -> list[dict[str, Any]]:
    entries = document.get(key)
    if entries is None and not required:
        return []
    if not isinstance(entries, list) or (required and not entries):
        raise RequestError("invalid", f"the request has no array '{key}'")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise RequestError("invalid", f"{key}[{index}] is not an object")
    return entries


def _name(entry: Mapping[str, Any], where: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError("invalid", f"{where} has no name")
    return name[:200]


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError("invalid", f"{where}: parameters is not an object")
    return parameters


def _id(document: Mapping[str, Any]) -> str:
    given = document.get("id", "")
    if not isinstance(given, str):
        raise RequestError("invalid", "the request's id is not a string")
    return given


def _short(value: Any) -> str:
    """A client's value in a message of bounded length, whatever its size and depth."""
    return _SHORT.repr(value)
