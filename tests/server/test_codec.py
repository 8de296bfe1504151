"""Tensors on the wire, against tritonclient's own encoder and decoder; everything malformed is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from vitdeploy.server.codec import WIRE, parse_request, render_response, timeout_seconds
from vitdeploy.server.messages import InferRequest, InferResponse, RequestedOutput, RequestError

Array = np.ndarray[Any, Any]
DTYPES = [*WIRE]


def arrays(dtype: np.dtype[Any], *, finite: bool) -> st.SearchStrategy[Array]:
    """Any array of up to three dimensions and 60 elements, empty and scalar ones included."""
    elements = None
    if dtype.kind == "f":
        elements = st.floats(width=8 * dtype.itemsize, allow_nan=not finite, allow_infinity=not finite)
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    return hnp.arrays(dtype, shapes, elements=elements)


def encoded(inputs: list[tuple[str, Array, bool]], **how: Any) -> tuple[memoryview, int | None]:
    """What tritonclient sends for (name, array, binary)."""
    tensors = []
    for name, array, binary in inputs:
        tensor = InferInput(name, list(array.shape), WIRE[array.dtype])
        tensors.append(tensor.set_data_from_numpy(array, binary_data=binary))
    body, length = InferenceServerClient.generate_request_body(tensors, **how)
    return memoryview(body), length


def same(one: Array, other: Array) -> bool:
    return bool(
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_binary_requests(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Several inputs behind one another, binary and not; any value, NaN included."""
    first = data.draw(arrays(dtype, finite=False))
    second = data.draw(arrays(dtype, finite=True))
    third = data.draw(arrays(dtype, finite=False))
    body, length = encoded([("a", first, True), ("b", second, False), ("c", third, True)])
    found = parse_request(body, length)
    assert list(found.inputs) == ["a", "b", "c"]
    for name, array in (("a", first), ("b", second), ("c", third)):
        assert same(found.inputs[name], array)
    assert found.binary  # no outputs are named, so that all of them are to be binary


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_json_requests(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Flat as tritonclient sends them, and nested as others do."""
    array = data.draw(arrays(dtype, finite=True))
    body, length = encoded([("a", array, False)])
    assert length is None
    assert same(parse_request(body, None).inputs["a"], array)
    if array.ndim and array.size:
        document = json.loads(bytes(body))
        document["inputs"][0]["data"] = array.tolist()
        nested = memoryview(json.dumps(document).encode())
        assert same(parse_request(nested, None).inputs["a"], array)


@pytest.mark.slow
@given(
    name=st.text(max_size=20),
    outputs=st.lists(st.tuples(st.sampled_from("xyz"), st.booleans(), st.integers(0, 9)), max_size=3),
    timeout=st.none() | st.integers(1, 10**12),
)
def test_what_a_request_asks_for(
    name: str, outputs: list[tuple[str, bool, int]], timeout: int | None
) -> None:
    wanted = [
        InferRequestedOutput(output, binary_data=binary, class_count=count)
        for output, binary, count in outputs
    ]
    how = {"outputs": wanted, "request_id": name, "timeout": timeout}
    body, length = encoded([("a", np.zeros(1, np.float32), True)], **how)
    found = parse_request(body, length)
    assert found.id == name
    assert found.timeout == (None if timeout is None else timeout / 1e6)
    assert [(w.name, w.binary, w.classes) for w in found.requested] == outputs
    assert found.binary == (not outputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_answers(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """tritonclient reads what was given, binary and as JSON."""
    first = data.draw(arrays(dtype, finite=False))
    second = data.draw(arrays(dtype, finite=True))
    texts = np.array([[b"0.5:1:cat", "0.25:0:b\u00e4r".encode(), b""]], object)
    wanted = tuple(
        RequestedOutput(name, binary=binary) for name, binary in zip("abcd", (1, 0, 1, 0), strict=True)
    )
    request = InferRequest({}, requested=wanted, id="7")
    outputs = {"a": first, "b": second, "c": texts, "d": texts}
    parts, length = render_response(InferResponse("m", "3", outputs, request))
    found = InferenceServerClient.parse_response_body(b"".join(parts), header_length=length)
    response = found.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("m", "3", "7")
    assert same(found.as_numpy("a"), first)
    assert same(found.as_numpy("b"), second)
    assert found.as_numpy("c").tolist() == texts.tolist()
    assert found.as_numpy("d").tolist() == [[text.decode() for text in texts[0]]]


def test_an_answer_without_binary_tensors_is_all_json() -> None:
    parts, length = render_response(InferResponse("m", "1", {"a": np.zeros((1, 2), np.float32)}))
    assert length is None
    assert json.loads(b"".join(parts))["outputs"] == [
        {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 0.0]}
    ]


def test_whole_numbers_are_floats_too() -> None:
    body = b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": [3], "data": [1, 2.5, -3]}]}'
    assert parse_request(memoryview(body), None).inputs["a"].tolist() == [1.0, 2.5, -3.0]


GOOD = {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
HOSTILE: list[Any] = [
    None, True, -1, 0.5, 2**63, 2**70, 1e308, "", "x", "1" * 10_000, [], [None], ["x"], {}, {"a": 1},
    json.loads("[" * 90 + "]" * 90),
]  # fmt: skip
DEEP = "[" * 1000 + "]" * 1000


def document(**changes: Any) -> bytes:
    return json.dumps({"inputs": [{**GOOD, **changes}]}).encode()


def refused(body: bytes, length: int | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        parse_request(memoryview(body), length)
    assert caught.value.kind == "invalid"
    assert len(caught.value.message) < 1000
    return caught.value.message


@pytest.mark.parametrize("body", [
    b"", b" ", b"{", b"null", b"[]", b'"x"', b"1", b"{}", b'{"inputs": []}', b'{"inputs": {}}',
    b'{"inputs": [null]}', b'{"inputs": [[]]}', b"\xff\xfe{}", b'{"inputs": [{}]}', b"{'inputs': 1}",
    b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
    b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1e999]}]}',
    b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1e39]}]}',
    b'{"inputs": [{"name": "\xff", "datatype": "FP32", "shape": [1], "data": [1]}]}',
    DEEP.encode(), b'{"inputs": ' + DEEP.encode() + b"}", document() + b"x", document() + document(),
])  # fmt: skip
def test_no_request(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_fields_of_an_input(key: str, value: Any) -> None:
    if (key, value) in (("name", "x"), ("name", "1" * 10_000)):
        return  # names like any other; whether the model has them is asked later
    refused(document(**{key: value}))


@pytest.mark.parametrize("key", GOOD)
def test_missing_fields_of_an_input(key: str) -> None:
    changed = {name: value for name, value in GOOD.items() if name != key}
    refused(json.dumps({"inputs": [changed]}).encode())


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("place", [
    "id", "parameters", "outputs", "output", "output name", "output parameters", "classification", "timeout",
    "input parameters", "binary_data_size",
])  # fmt: skip
def test_hostile_fields_elsewhere(place: str, value: Any) -> None:
    """Refused, or understood as nothing in particular; never an error of another kind."""
    output = {"name": "logits", "parameters": {}}
    entry: dict[str, Any] = dict(GOOD)
    request: dict[str, Any] = {"inputs": [entry], "outputs": [output]}
    if place in ("id", "parameters", "outputs"):
        request[place] = value
    elif place == "output":
        request["outputs"] = [value]
    elif place.startswith("output "):
        output[place.removeprefix("output ")] = value
    elif place == "classification":
        output["parameters"] = {place: value}
    elif place == "timeout":
        request["parameters"] = {place: value}
    elif place == "input parameters":
        entry["parameters"] = value
    else:
        entry["parameters"] = {place: value}
    with contextlib.suppress(RequestError):
        parse_request(memoryview(json.dumps(request).encode()), None)


@pytest.mark.parametrize("key", ["shape", "datatype", "data", "parameters", "name"])
def test_fields_of_great_depth(key: str) -> None:
    """As deep as the JSON parser goes, which is deeper than Python's own recursion."""
    refused(document(**{key: "@"}).replace(b'"@"', DEEP.encode()))


@pytest.mark.parametrize("request_with", [
    {"inputs": [{**GOOD, "parameters": {"binary_data_size": "@"}}]},
    {"inputs": [GOOD], "parameters": {"timeout": "@"}},
    {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"classification": "@"}}]},
    {"inputs": [GOOD], "id": "@"},
])  # fmt: skip
def test_parameters_of_great_depth(request_with: dict[str, Any]) -> None:
    refused(json.dumps(request_with).encode().replace(b'"@"', DEEP.encode()))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"datatype": "fp32"}, "datatype"),
        ({"datatype": "BYTES", "data": ["x", "y"]}, "BYTES"),
        ({"datatype": "BF16"}, "BF16"),
        ({"datatype": ["FP32"]}, "datatype"),
        ({"shape": [1, -2]}, "shape"),
        ({"shape": [1, 2.0]}, "shape"),
        ({"shape": [1, True]}, "shape"),
        ({"shape": "12"}, "shape"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [0, 2**62], "data": []}, "shape"),
        ({"shape": [0, 2**63], "data": []}, "shape"),
        ({"shape": [2**20, 2**20]}, "too many"),
        ({"shape": [1, 3]}, "shape"),
        ({"shape": []}, "shape"),
        ({"data": [[1.0], [2.0]]}, "shape"),
        ({"data": [[1.0, 2.0], [3.0]]}, "one shape"),
        ({"data": [1.0, "2"]}, "does not fit"),
        ({"data": [1.0, None]}, "does not fit"),
        ({"data": [1.0, True]}, "does not fit"),
        ({"data": [[1.0, False]]}, "does not fit"),
        ({"data": [True, False]}, "does not fit"),
        ({"data": [1, 2e38 * 10]}, "range"),
        ({"datatype": "UINT8", "data": [1, 256]}, "range"),
        ({"datatype": "UINT8", "data": [1, -1]}, "range"),
        ({"datatype": "UINT8", "data": [1, 1.5]}, "does not fit"),
        ({"datatype": "UINT8", "data": [1, True]}, "does not fit"),
        ({"datatype": "INT64", "data": [1, 2**63]}, ""),
        ({"datatype": "BOOL", "data": [0, 1]}, "does not fit"),
        ({"datatype": "FP16", "data": [1, 70000.0]}, "range"),
    ],
    ids=str,
)
def test_wrong_tensors(changes: dict[str, Any], words: str) -> None:
    assert words in refused(document(**changes))


@pytest.mark.parametrize(
    "size, tail, words",
    [
        (8, b"", "8"),
        (8, b"\0" * 7, "8"),
        (7, b"\0" * 8, "7 bytes"),
        (8, b"\0" * 9, "1 bytes behind"),
        (0, b"\0" * 8, "0 bytes"),
        (-8, b"\0" * 8, "-8"),
        (2**70, b"\0" * 8, "binary_data_size"),
        ("8", b"\0" * 8, "binary_data_size"),
        (8.0, b"\0" * 8, "binary_data_size"),
        (True, b"\0" * 8, "binary_data_size"),
    ],
    ids=str,
)
def test_sizes_that_lie(size: Any, tail: bytes, words: str) -> None:
    entry = {key: value for key, value in GOOD.items() if key != "data"}
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": size}}]}).encode()
    assert words in refused(head + tail, len(head))


@pytest.mark.parametrize("length", [0, 1, 10_000, 10**17])
def test_header_lengths_that_lie(length: int) -> None:
    refused(document(), length)


def test_both_data_and_bytes() -> None:
    head = document(parameters={"binary_data_size": 8})
    assert "both" in refused(head + b"\0" * 8, len(head))


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_refused(where: str) -> None:
    entry = {**GOOD, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}
    request = {"inputs": [GOOD], "outputs": [{"name": "y"}]} | {where: [entry]}
    assert "shared memory is not supported" in refused(json.dumps(request).encode())


@pytest.mark.parametrize(
    "given, seconds",
    [(None, None), (0, None), ("0", None), (1, 1e-6), ("2000000", 2.0), (2**63, 2**63 / 1e6)],
)
def test_timeouts(given: Any, seconds: float | None) -> None:
    assert timeout_seconds(given) == seconds


@pytest.mark.parametrize("given", [-1, 0.5, "x", "-1", "", True, False, [], {}, "9" * 50])
def test_timeouts_that_are_none(given: Any) -> None:
    with pytest.raises(RequestError, match="is not a number of microseconds"):
        timeout_seconds(given)
