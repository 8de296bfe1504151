"""10,000 generated requests and 1,000 mutated images: no crash, no hang, no wrong 200, no 500."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from tests.helpers.asgi import Application, application
from tests.helpers.bundles import answer
from tests.helpers.fuzz import (
    ASKED_FOR,
    HOSTILE,
    Attempt,
    damaged,
    generated,
    image_files,
    judge,
    mutated_image,
    rounding,
)
from tests.helpers.live_server import PATIENCE, Live, binary_request, logits_of, serving
from vitdeploy import load
from vitdeploy.errors import ImageError
from vitdeploy.images.decode import load_image
from vitdeploy.server.service import RequestLimits

pytestmark = pytest.mark.slow
PREDICT = "/v1/models/linear:predict"
MAX_PIXELS = 200_000
TOGETHER = 24
"""Requests in hand at once, so that what is mutated shares batches with what is not."""
BATCHES, PER_BATCH = 10, 920
CALL = "/inference.GRPCInferenceService/ModelInfer"


async def in_groups(count: int, one: Callable[[int], Awaitable[str]]) -> Counter[str]:
    """Run them, some at a time; none may hang."""
    found: Counter[str] = Counter()
    for begin in range(0, count, TOGETHER):
        async with asyncio.timeout(PATIENCE):
            numbers = range(begin, min(begin + TOGETHER, count))
            found.update(await asyncio.gather(*(one(number) for number in numbers)))
    return found


def require_alive(live: Live) -> None:
    live.require_well()
    pixels = np.ones((1, 3, 8, 8), np.float32)
    request = binary_request(pixels)
    reply = live.ask("POST", "/v2/models/linear/infer", request.body, **request.headers)
    assert np.allclose(logits_of(reply), answer(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(BATCHES))
def test_generated_requests(linear: Path, seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> Counter[str]:
        async with application(linear, limits=RequestLimits(body_bytes=100_000)) as served:

            async def one(number: int) -> str:
                attempt = generated(rng)
                reply = await served.ask(attempt.method, attempt.path, attempt.body, attempt.headers)
                return judge(attempt, reply)

            found = await in_groups(PER_BATCH, one)
            assert served.service.repository.busy == 0
            return found

    found = asyncio.run(main())
    assert found.total() == PER_BATCH
    assert found["answered"] > PER_BATCH / 6, found  # the generator says something
    assert found["refused"] > PER_BATCH / 4, found


def test_generated_requests_over_a_socket(linear: Path) -> None:
    rng = random.Random(1000)
    with serving(linear, "--max-body", 100_000) as server:
        client = server.client()
        found: Counter[str] = Counter()
        for _ in range(400):
            attempt = generated(rng)
            with server.client() if rng.random() < 0.1 else _kept(client) as connection:
                reply = connection.ask(attempt.method, attempt.path, attempt.body, **attempt.headers)
            found[judge(attempt, reply)] += 1
        require_alive(server)
    assert found["answered"] > 60
    assert found["refused"] > 100


class _kept:
    """A connection that outlives its block."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __enter__(self) -> Any:
        return self._client

    def __exit__(self, *_: object) -> None:
        pass


def grpc_attempt(rng: random.Random) -> tuple[bytes, bool]:
    """The bytes of a message, and whether they were mutated."""
    rows = rng.choice((1, 2, 8))
    pixels = np.random.default_rng(rng.getrandbits(32)).normal(size=(rows, 3, 8, 8)).astype("<f4")
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name="pixel_values", datatype="FP32", shape=pixels.shape
    )
    request = service_pb2.ModelInferRequest(model_name="linear", id=str(rng.getrandbits(30)), inputs=[tensor])
    if rng.random() < 0.7:
        request.raw_input_contents.append(pixels.tobytes())
    else:
        request.inputs[0].contents.fp32_contents.extend(pixels.ravel().tolist())
    mutations = rng.choice((0, 1, 1, 2))
    for _ in range(mutations):
        _mutate_message(rng, request)
    data = request.SerializeToString()
    if mutations and rng.random() < 0.3:
        data = damaged(rng, data)
    return data, bool(mutations)


def _mutate_message(rng: random.Random, request: Any) -> None:
    tensor = request.inputs[0] if request.inputs else request.inputs.add()
    text = rng.choice([value for value in HOSTILE if isinstance(value, str)])
    number = rng.choice((0, -1, 3, 9, 2**62, -(2**63)))
    kind = rng.randrange(12)
    if kind == 0:
        request.model_name = text
    elif kind == 1:
        request.model_version = rng.choice(("1", "2", text))
    elif kind == 2:
        tensor.name = text
    elif kind == 3:
        tensor.datatype = rng.choice(("FP16", "FP64", "UINT8", "BOOL", "INT64", text))
    elif kind == 4 and tensor.shape:
        tensor.shape[rng.randrange(len(tensor.shape))] = number
    elif kind == 5:
        tensor.shape.append(number)
    elif kind == 6 and request.raw_input_contents:
        request.raw_input_contents[0] = damaged(rng, request.raw_input_contents[0])
    elif kind == 7:
        request.raw_input_contents.append(b"x" * rng.choice((0, 1, 768)))
    elif kind == 8:
        request.inputs.add().CopyFrom(tensor)
    elif kind == 9:
        request.outputs.add(name=rng.choice(("logits", text))).parameters[
            "classification"
        ].int64_param = number
    elif kind == 10:
        request.parameters["timeout"].int64_param = number
    else:
        tensor.contents.fp32_contents.append(rng.choice((float("nan"), 1.0, 1e38)))


def strict_message(data: bytes) -> Any:
    """The pixels of a message that may be answered; None of one that may not."""
    request = service_pb2.ModelInferRequest.FromString(data)
    if request.model_name != "linear" or request.model_version not in ("", "1") or len(request.inputs) != 1:
        return None
    (tensor,) = request.inputs
    shape = tuple(tensor.shape)
    if tensor.name != "pixel_values" or tensor.datatype != "FP32":
        return None
    if len(shape) != 4 or shape[1:] != (3, 8, 8) or not 1 <= shape[0] <= 8:
        return None
    typed = np.array(tensor.contents.fp32_contents, np.float32)
    raw = request.raw_input_contents
    if raw and (len(raw) != 1 or len(raw[0]) % 4 or len(typed)):
        return None
    flat = np.frombuffer(raw[0], "<f4") if raw else typed
    if flat.size != 192 * shape[0] or not np.isfinite(flat).all():
        return None
    return flat.reshape(shape)


def test_generated_messages_over_grpc(linear: Path) -> None:
    rng = random.Random(7)
    found: Counter[str] = Counter()
    with serving(linear) as server, grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(CALL, response_deserializer=service_pb2.ModelInferResponse.FromString)
        for _ in range(25):
            attempts = [grpc_attempt(rng) for _ in range(20)]
            waiting = [call.future(data, timeout=PATIENCE) for data, _ in attempts]
            for (data, touched), one in zip(attempts, waiting, strict=True):
                found[_judge_message(data, touched, one)] += 1
        require_alive(server)
    assert found["answered"] > 100
    assert found["refused"] > 100


def _judge_message(data: bytes, touched: bool, one: Any) -> str:
    error = one.exception()
    if error is not None:
        assert touched, error
        try:
            service_pb2.ModelInferRequest.FromString(data)
        except DecodeError:  # no message at all: gRPC itself answers, with a code of its own
            return "refused"
        asked_for = any(words in error.details() for words in ASKED_FOR)
        assert error.code().name in ("INVALID_ARGUMENT", "NOT_FOUND") or asked_for, (data, error)
        return "refused"
    response = one.result()
    pixels = strict_message(data)
    assert pixels is not None, (data, response)
    request = service_pb2.ModelInferRequest.FromString(data)
    assert response.id == request.id
    if response.outputs[0].datatype == "FP32":
        expected = answer(pixels)
        logits = np.frombuffer(response.raw_output_contents[0], "<f4").reshape(expected.shape)
        assert (np.abs(logits - expected) <= rounding(pixels)).all()
    return "answered"


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return image_files()


@pytest.mark.parametrize("seed", range(4))
def test_mutated_images(linear: Path, files: list[bytes], seed: int) -> None:
    """What the library makes of the same bytes, the server says; what it cannot read is refused."""
    rng = random.Random(seed)

    async def main() -> Counter[str]:
        async with application(linear, max_pixels=MAX_PIXELS) as served:
            with load(linear) as predictor:

                async def one(number: int) -> str:
                    data = mutated_image(rng, files)
                    return await judge_image(served, predictor, data)

                return await in_groups(250, one)

    found = asyncio.run(main())
    assert found["answered"] > 20, found
    assert found["refused"] > 20, found


async def judge_image(served: Application, predictor: Any, data: bytes) -> str:
    reply = await served.ask("POST", PREDICT, data)
    try:
        image = load_image(data, MAX_PIXELS)
        (expected,) = predictor.predict(image)
    except ImageError:
        assert reply.status == 400, reply
        assert reply.error.startswith("the image: ")
        return "refused"
    assert reply.status == 200, (data, reply)
    (found,) = reply.document["predictions"]
    assert [p["index"] for p in found] == [p.index for p in expected]
    assert np.allclose([p["score"] for p in found], [p.score for p in expected], rtol=1e-4, atol=1e-7)
    return "answered"


@pytest.mark.parametrize("seed", range(2))
def test_mutated_forms(linear: Path, files: list[bytes], seed: int) -> None:
    """Multipart and base64 bodies with damage anywhere, headers included."""
    import base64
    import json

    rng = random.Random(seed)

    def attempt() -> Attempt:
        data = rng.choice(files)
        if rng.random() < 0.5:
            boundary = "frontier"
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
            body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
            kind = f"multipart/form-data; boundary={boundary}"
        else:
            body = json.dumps({"instances": [{"b64": base64.b64encode(data).decode()}]}).encode()
            kind = "application/json"
        for _ in range(rng.choice((1, 2))):
            if rng.random() < 0.8:
                body = body[:100] if rng.random() < 0.05 else damaged(rng, body[:200]) + body[200:]
            else:
                kind = damaged(rng, kind.encode()).decode("latin-1").replace("\r", "").replace("\n", "")
        return Attempt("POST", PREDICT, body, {"Content-Type": kind}, touched=True)

    async def main() -> Counter[str]:
        async with application(linear) as served:

            async def one(number: int) -> str:
                made = attempt()
                reply = await served.ask(made.method, made.path, made.body, made.headers)
                assert reply.status in (200, 400), (made, reply)
                if reply.status == 400:
                    assert reply.error
                return str(reply.status)

            return await in_groups(300, one)

    found = asyncio.run(main())
    assert found["400"] > 50, found
