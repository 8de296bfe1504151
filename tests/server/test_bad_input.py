"""What clients get wrong, on purpose or not: the protocol's error, the right status, and no harm."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.helpers.asgi import application
from tests.helpers.bundles import answer
from tests.helpers.live_server import (
    PATIENCE,
    Live,
    Request,
    binary_request,
    json_request,
    logits_of,
)

INFER = "/v2/models/linear/infer"
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
BAD_FLOATS = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(autouse=True)
def still_right(live: Live) -> Iterator[None]:
    """Whatever a test did to it, the server answers rightly."""
    yield
    for request in (json_request(PIXELS), binary_request(PIXELS)):
        reply = live.ask("POST", INFER, request.body, **request.headers)
        assert np.allclose(logits_of(reply), answer(PIXELS), rtol=1e-4, atol=1e-4)


def refused(live: Live, status: int, method: str, path: str, body: bytes = b"", **headers: str) -> str:
    """Ask for something wrong; returns the error."""
    reply = live.ask(method, path, body, **headers)
    assert reply.status == status, reply
    return reply.error


@pytest.mark.parametrize("body, words", [
    (b"", "failed to parse the request JSON"),
    (b"{", "failed to parse the request JSON"),
    (b"[1]", "not an object"),
    (b"null", "not an object"),
    (b"\xff\xfe\x00", "failed to parse the request JSON"),
    (b"{}", "no array 'inputs'"),
    (b'{"inputs": 7}', "no array 'inputs'"),
    (b'{"inputs": []}', "no array 'inputs'"),
    (b'{"inputs": [7]}', "inputs[0] is not an object"),
    (b'{"inputs": [{}]}', "inputs[0] has no name"),
    (b"[" * 100_000, "failed to parse the request JSON"),
])  # fmt: skip
def test_malformed_json(live: Live, body: bytes, words: str) -> None:
    assert words in refused(live, 400, "POST", INFER, body)


def changed(**fields: Any) -> bytes:
    document = json_request(PIXELS).document
    document["inputs"][0].update(fields)
    return json.dumps(document).encode()


@pytest.mark.parametrize("fields, words", [
    ({"name": "pixels"}, "has no input 'pixels'"),
    ({"name": "x" * 100_000}, "has no input"),
    ({"datatype": "FP64"}, "must be float32, not float64"),
    ({"datatype": "FP33"}, "datatype"),
    ({"datatype": "F" * 100_000}, "datatype"),
    ({"shape": [2, 192]}, "must have the shape"),
    ({"shape": [2, 3, 8, 9]}, "elements"),
    ({"shape": [2, 3, 8, -8]}, "not a list of sizes"),
    ({"shape": [0, 2**63], "data": []}, "shape"),
    ({"shape": [0, 3, 8, 8], "data": []}, "no rows"),
    ({"shape": [], "data": [1.0]}, "must have the shape"),
    ({"data": None}, "data is not an array"),
    ({"data": ["1"] * 384}, "does not fit the datatype"),
    ({"data": [1e39] * 384}, "outside the range"),
    ({"data": [True] * 384}, "does not fit the datatype"),
    ({"data": [1.0] * 383}, "elements"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_wrong_tensors(live: Live, fields: dict[str, Any], words: str) -> None:
    assert words in refused(live, 400, "POST", INFER, changed(**fields))


@pytest.mark.parametrize("rows, words", [(9, "a batch of 9, but at most 8"), (1000, "at most 8")])
def test_a_batch_above_the_limit(live: Live, rows: int, words: str) -> None:
    request = binary_request(np.zeros((rows, 3, 8, 8), np.float32))
    assert words in refused(live, 400, "POST", INFER, request.body, **request.headers)


@pytest.mark.parametrize("length", ["0", "-1", "+5", "x", "1e2", " ", "999999", "9" * 30, "0x10", "\xb2"])
def test_header_lengths_that_lie(live: Live, length: str) -> None:
    request = binary_request(PIXELS)
    headers = {"Inference_Header_Content_Length": length}
    assert refused(live, 400, "POST", INFER, request.body, **headers)


@pytest.mark.parametrize("off", [-1, 1, 100])
def test_header_lengths_off_by_some(live: Live, off: int) -> None:
    request = binary_request(PIXELS)
    length = int(request.headers["Inference_Header_Content_Length"]) + off
    refused(live, 400, "POST", INFER, request.body, Inference_Header_Content_Length=str(length))


@pytest.mark.parametrize("size", [0, 1, 1535, 1537, -1, 2**40, 2**70, "1536", None, True])
def test_binary_sizes_that_lie(live: Live, size: Any) -> None:
    request = binary_request(PIXELS)
    request.document["inputs"][0]["parameters"]["binary_data_size"] = size
    length = len(json.dumps(request.document))
    refused(live, 400, "POST", INFER, request.body, Inference_Header_Content_Length=str(length))


@pytest.mark.parametrize("extra", [-1, -1536, 1, 100_000])
def test_tails_that_are_too_short_or_too_long(live: Live, extra: int) -> None:
    request = binary_request(PIXELS)
    body = request.body[:extra] if extra < 0 else request.body + b"\0" * extra
    refused(live, 400, "POST", INFER, body, **request.headers)


@pytest.mark.parametrize("codec, pack", [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_damaged_compression(live: Live, codec: str, pack: Any) -> None:
    packed = pack(json_request(PIXELS).body)
    for body in (
        packed[:-5],
        packed[:10],
        b"",
        b"junk",
        packed + b"x",
        packed + packed,
        packed[:50] + packed[60:],
    ):
        error = refused(live, 400, "POST", INFER, body, Content_Encoding=codec)
        assert codec in error or "crc" in error.lower()


@pytest.mark.parametrize("codec", ["br", "zstd", "gzip, gzip", "x" * 1000])
def test_unknown_compression(live: Live, codec: str) -> None:
    assert "gzip and deflate are" in refused(live, 400, "POST", INFER, b"x", Content_Encoding=codec)


@functools.cache
def packed_zeros(window: int) -> bytes:
    """1 GiB of zeros, without the checksum at the end: nobody should come so far."""
    packer = zlib.compressobj(1, wbits=window)
    first, more = (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + 1023 * more


@pytest.mark.slow
@pytest.mark.parametrize("codec, window", [("gzip", 31), ("deflate", 15)])
@pytest.mark.parametrize("path", [INFER, "/v1/models/linear:predict", "/v2/repository/index"])
def test_a_compressed_bomb(live: Live, codec: str, window: int, path: str) -> None:
    """What is unpacked stays within the limit of a body."""
    bomb = packed_zeros(window)
    assert len(bomb) < 2**23
    before = live.rss()
    assert "more than 67108864 bytes" in refused(live, 413, "POST", path, bomb, Content_Encoding=codec)
    assert live.rss() - before < 200 * 1024


@pytest.mark.parametrize("method, path, status", [
    ("POST", "/v2/models/nope/infer", 404),
    ("POST", "/v2/models/linear/versions/2/infer", 404),
    ("POST", "/v2/models/linear/versions/01/infer", 404),
    ("POST", "/v2/models/linear/versions/latest/infer", 404),
    ("POST", f"/v2/models/{'n' * 10_000}/infer", 404),
    ("POST", "/v2/models/%00/infer", 404),
    ("POST", "/v2/models/%ff%fe/infer", 404),
    ("POST", "/v1/models/nope:predict", 404),
    ("POST", "/v1/models/linear/versions/2:predict", 404),
    ("GET", "/v2/models/nope", 404),
    ("GET", "/v2/models/nope/config", 404),
    ("GET", "/v2/models/nope/stats", 404),
    ("GET", "/v2/models/nope/ready", 400),
    ("GET", "/v2/models/linear/versions/9", 404),
    ("GET", "/v1/models/nope", 404),
    ("GET", "/v2/nothing", 404),
    ("GET", "/v2/models/linear/infer/", 404),
    ("GET", INFER, 405),
    ("DELETE", "/v2/models/linear", 405),
    ("PUT", "/v1/models/linear:predict", 405),
    ("POST", "/v2/repository/models/nope/load", 404),
    ("POST", "/v2/repository/models/..%2f..%2fetc%2fpasswd/load", 404),
    ("POST", "/v2/repository/models/%2e%2e/load", 404),
    ("POST", "/v2/repository/models/../../../tmp/load", 404),
    ("POST", "/v2/repository/models/%2ftmp%2fx.bundle/unload", 404),
    ("POST", "/v2/repository/models/linear%00/unload", 404),
    ("POST", "/v2/repository/models/LINEAR/unload", 404),
], ids=lambda value: str(value)[:50])  # fmt: skip
def test_unknown_places(live: Live, method: str, path: str, status: int) -> None:
    refused(live, status, method, path, b"{}" if method == "POST" else b"")


def test_load_takes_nothing_from_the_client(live: Live) -> None:
    path = "/v2/repository/models/linear/load"
    for body in (b'{"parameters": {"config": "{}"}}', b'{"parameters": {"file:1/model.onnx": "AAAA"}}'):
        assert "load takes no parameters" in refused(live, 400, "POST", path, body)
    assert "parse" in refused(live, 400, "POST", path, b"junk")


@pytest.mark.parametrize("value", BAD_FLOATS, ids=str)
def test_inputs_that_are_no_numbers(live: Live, value: float) -> None:
    array = PIXELS.copy()
    array[1, 2, 3, 4] = value
    request = binary_request(array)
    assert "NaN or infinite" in refused(live, 400, "POST", INFER, request.body, **request.headers)
    text = json_request(array).body  # NaN and Infinity, which are not JSON
    assert "parse" in refused(live, 400, "POST", INFER, text)
    with tritonclient.grpc.InferenceServerClient(live.grpc) as client:
        tensor = tritonclient.grpc.InferInput("pixel_values", [2, 3, 8, 8], "FP32")
        with pytest.raises(InferenceServerException, match="NaN or infinite") as caught:
            client.infer("linear", [tensor.set_data_from_numpy(array)])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_inputs_whose_outputs_are_no_numbers(live: Live) -> None:
    """Finite, but the sums overflow: an error of that request, not an answer with infinities."""
    request = binary_request(np.full((1, 3, 8, 8), 3e38, np.float32))
    reply = live.ask("POST", INFER, request.body, **request.headers)
    assert reply.status in (400, 500)
    assert "NaN or infinite" in reply.error


def test_one_clients_overflow_disturbs_no_other(linear: Path) -> None:
    """They share a batch: the session is given time to gather them."""

    async def main() -> None:
        async with application(linear, max_batch=8, max_delay=PATIENCE) as served:

            async def one(request: Request) -> Any:
                headers = {name.replace("_", "-"): value for name, value in request.headers.items()}
                return await served.ask("POST", INFER, request.body, headers)

            arrays = [np.random.default_rng(seed).normal(size=(1, 3, 8, 8)) for seed in range(8)]
            arrays[3] = np.full((1, 3, 8, 8), 3e38)
            replies = await asyncio.gather(*(one(binary_request(array)) for array in arrays))
            for number, (array, reply) in enumerate(zip(arrays, replies, strict=True)):
                if number == 3:
                    assert "NaN or infinite" in reply.error
                else:
                    expected = answer(array.astype(np.float32))
                    assert np.allclose(logits_of(reply), expected, rtol=1e-4, atol=1e-4)
            stats = (await served.ask("GET", "/v2/models/linear/stats")).document["model_stats"][0]
            assert stats["execution_count"] == 1

    asyncio.run(main())


def grpc_refused(live: Live, request: Any, metadata: Any = (), compression: Any = None) -> tuple[str, str]:
    """The code and the message of a refusal."""
    with grpc.insecure_channel(live.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: (
                message if isinstance(message, bytes) else message.SerializeToString()
            ),
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=PATIENCE, metadata=metadata, compression=compression)
        assert len(caught.value.details()) < 3000
        return caught.value.code().name, caught.value.details()


def grpc_request(**changes: Any) -> Any:
    fields = {"name": "pixel_values", "datatype": "FP32", "shape": [2, 3, 8, 8]} | changes
    tensor = service_pb2.ModelInferRequest.InferInputTensor(**fields)
    return service_pb2.ModelInferRequest(
        model_name="linear", inputs=[tensor], raw_input_contents=[PIXELS.tobytes()]
    )


@pytest.mark.parametrize("changes, words", [
    ({"name": "x" * 50_000}, "has no input"),
    ({"name": ""}, "has no input"),
    ({"datatype": ""}, "datatype"),
    ({"datatype": "x" * 50_000}, "datatype"),
    ({"datatype": "FP64"}, "bytes"),
    ({"shape": [2, 3, 8, 9]}, "bytes"),
    ({"shape": [-2, 3, 8, -8]}, "not a list of sizes"),
    ({"shape": [0, 2**62, 2**62]}, "shape"),
    ({"shape": [1] * 10_000}, "not a list of sizes"),
    ({"shape": []}, "bytes"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_wrong_tensors_over_grpc(live: Live, changes: dict[str, Any], words: str) -> None:
    code, message = grpc_refused(live, grpc_request(**changes))
    assert code == "INVALID_ARGUMENT"
    assert words in message


def test_wrong_requests_over_grpc(live: Live) -> None:
    fewer, more, both, name = grpc_request(), grpc_request(), grpc_request(), grpc_request()
    fewer.raw_input_contents[0] = PIXELS.tobytes()[:-1]
    more.raw_input_contents.append(b"")
    both.inputs[0].contents.fp32_contents.append(1.0)
    name.model_name = "n" * 50_000
    typed = service_pb2.ModelInferRequest(model_name="linear", inputs=grpc_request().inputs)
    output = grpc_request()
    output.outputs.add(name="o" * 50_000)
    for request, code, words in (
        (fewer, "INVALID_ARGUMENT", "1535 bytes"),
        (more, "INVALID_ARGUMENT", "2 raw contents for 1 inputs"),
        (both, "INVALID_ARGUMENT", "contents"),
        (name, "NOT_FOUND", "unknown model"),
        (typed, "INVALID_ARGUMENT", "0 elements"),
        (output, "INVALID_ARGUMENT", "unexpected inference output"),
        (service_pb2.ModelInferRequest(model_name="linear"), "INVALID_ARGUMENT", "no inputs"),
        (service_pb2.ModelInferRequest(), "INVALID_ARGUMENT", "no inputs"),
    ):
        found, message = grpc_refused(live, request)
        assert found == code, message
        assert words in message


@pytest.mark.slow
def test_messages_that_are_too_large_over_grpc(strict: Live) -> None:
    """As they come, and as a compressed bomb."""
    request = grpc_request()
    request.raw_input_contents[0] = bytes(2**25)
    for compression in (None, grpc.Compression.Gzip, grpc.Compression.Deflate):
        code, _ = grpc_refused(strict, request, compression=compression)
        assert code == "RESOURCE_EXHAUSTED"
    good = grpc_request()
    with grpc.insecure_channel(strict.grpc) as channel:
        from tritonclient.grpc import service_pb2_grpc

        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(good, timeout=PATIENCE)
    assert len(response.raw_output_contents[0]) == 2 * 5 * 4


def test_a_body_above_the_limit(strict: Live) -> None:
    for body in (bytes(2**20 + 1), bytes(2**26)):
        assert "more than 1048576 bytes" in refused(strict, 413, "POST", INFER, body)
    pixels = np.zeros((8, 3, 8, 8), np.float32)
    request = binary_request(pixels)
    reply = strict.ask("POST", INFER, request.body, **request.headers)
    assert logits_of(reply).shape == (8, 5)
