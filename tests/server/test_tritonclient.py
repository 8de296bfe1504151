"""NVIDIA's unmodified tritonclient gets right answers: HTTP and gRPC, sync and asyncio, JSON and binary."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.helpers.bundles import LABELS, answer
from tests.helpers.live_server import Live
from vitdeploy.bundle.folder import Bundle
from vitdeploy.verification.parity import TOLERANCES, measure_parity, tolerance_failures

HTTP, GRPC = tritonclient.http, tritonclient.grpc
Array = np.ndarray[Any, Any]
CODECS = ("gzip", "deflate", None)


@pytest.fixture
def http(live: Live) -> Iterator[Any]:
    with HTTP.InferenceServerClient(live.address, concurrency=4) as client:
        yield client


@pytest.fixture
def grpc(live: Live) -> Iterator[Any]:
    with GRPC.InferenceServerClient(live.grpc) as client:
        yield client


@pytest.fixture
def golden(digits: Path) -> dict[str, Array]:
    return Bundle.open(digits).golden()


def pixels(seed: int, rows: int = 2) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, 3, 8, 8)).astype(np.float32)


def tensor(library: Any, array: Array, **how: bool) -> Any:
    return library.InferInput("pixel_values", list(array.shape), "FP32").set_data_from_numpy(array, **how)


def require_right(expected: Array, found: Array) -> None:
    tolerance = TOLERANCES["fp32"]
    assert found.dtype == np.float32
    assert tolerance_failures(measure_parity(expected, found, tolerance, "logits"), tolerance) == ()


def batches(golden: dict[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Golden inputs and their float64 reference, in batches of uneven sizes."""
    begin = 0
    for size in (1, 2, 5, 8):
        stop = min(begin + size, len(golden["reference"]))
        if begin < stop:
            yield golden["pixel_values"][begin:stop], golden["reference"][begin:stop]
        begin = stop


@pytest.mark.slow
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("binary_out", [True, False, None], ids=["to_binary", "to_json", "to_default"])
@pytest.mark.parametrize("request_codec", CODECS)
@pytest.mark.parametrize("response_codec", CODECS)
def test_golden_images_over_http(
    live_digits: Live,
    golden: dict[str, Array],
    binary_in: bool,
    binary_out: bool | None,
    request_codec: str | None,
    response_codec: str | None,
) -> None:
    wanted = None if binary_out is None else [HTTP.InferRequestedOutput("logits", binary_data=binary_out)]
    with HTTP.InferenceServerClient(live_digits.address) as client:
        for images, reference in batches(golden):
            result = client.infer(
                "digits",
                [tensor(HTTP, images, binary_data=binary_in)],
                outputs=wanted,
                request_compression_algorithm=request_codec,
                response_compression_algorithm=response_codec,
            )
            require_right(reference, result.as_numpy("logits"))
            sent_binary = "parameters" in result.get_output("logits")
            assert sent_binary == (binary_out is not False)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_golden_images_over_grpc(live_digits: Live, golden: dict[str, Array], codec: str | None) -> None:
    with GRPC.InferenceServerClient(live_digits.grpc) as client:
        for images, reference in batches(golden):
            result = client.infer("digits", [tensor(GRPC, images)], compression_algorithm=codec)
            require_right(reference, result.as_numpy("logits"))


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_golden_images_over_asyncio_http(
    live_digits: Live, golden: dict[str, Array], codec: str | None
) -> None:
    async def main() -> None:
        async with HTTP.aio.InferenceServerClient(live_digits.address) as client:
            assert await client.is_model_ready("digits")

            async def one(images: Array, reference: Array, binary: bool) -> None:
                result = await client.infer(
                    "digits",
                    [tensor(HTTP, images, binary_data=binary)],
                    request_compression_algorithm=codec,
                    response_compression_algorithm=codec,
                )
                require_right(reference, result.as_numpy("logits"))

            await asyncio.gather(
                *(one(*batch, binary) for batch in batches(golden) for binary in (True, False))
            )

    asyncio.run(main())


@pytest.mark.slow
def test_golden_images_over_asyncio_grpc(live_digits: Live, golden: dict[str, Array]) -> None:
    async def main() -> None:
        async with GRPC.aio.InferenceServerClient(live_digits.grpc) as client:
            assert await client.is_model_ready("digits")
            found = await asyncio.gather(
                *(client.infer("digits", [tensor(GRPC, images)]) for images, _ in batches(golden))
            )
            for (_, reference), result in zip(batches(golden), found, strict=True):
                require_right(reference, result.as_numpy("logits"))

            async def requests() -> Any:
                for number, (images, _) in enumerate(batches(golden)):
                    yield {
                        "model_name": "digits",
                        "inputs": [tensor(GRPC, images)],
                        "request_id": str(number),
                    }

            stream = client.stream_infer(requests())
            for number, (_, reference) in enumerate(batches(golden)):
                result, error = await anext(stream)
                assert error is None
                assert result.get_response().id == str(number)
                require_right(reference, result.as_numpy("logits"))

    asyncio.run(main())


def test_typed_grpc_contents(grpc: Any) -> None:
    """The protocol's own fields, which other clients use; tritonclient's tensors are raw."""
    from tritonclient.grpc import service_pb2

    array = pixels(3)
    given = tensor(GRPC, array)._get_tensor()
    given.contents.fp32_contents.extend(array.ravel().tolist())
    request = service_pb2.ModelInferRequest(model_name="linear", inputs=[given])
    response = grpc._client_stub.ModelInfer(request)
    found = np.frombuffer(response.raw_output_contents[0], "<f4").reshape(2, 5)
    require_right(answer(array), found)


@pytest.mark.parametrize("library", [HTTP, GRPC], ids=["http", "grpc"])
@pytest.mark.parametrize("count", [1, 3, 5, 100])
def test_classification(live: Live, library: Any, count: int) -> None:
    """The likeliest classes as "score:index:label", the likeliest first."""
    array = pixels(4, rows=3)
    address = live.address if library is HTTP else live.grpc
    with library.InferenceServerClient(address) as client:
        wanted = [library.InferRequestedOutput("logits", class_count=count)]
        found = client.infer("linear", [tensor(library, array)], outputs=wanted).as_numpy("logits")
    assert found.shape == (3, min(count, len(LABELS)))
    for texts, logits in zip(found, answer(array), strict=True):
        parsed = [text.decode().split(":") for text in texts]
        order = np.argsort(-logits)[:count]
        assert [int(index) for _, index, _ in parsed] == order.tolist()
        assert [label for *_, label in parsed] == [LABELS[index] for index in order]
        assert np.allclose([float(score) for score, *_ in parsed], logits[order], rtol=1e-4, atol=1e-5)


def test_classification_as_json(http: Any) -> None:
    array = pixels(4, rows=2)
    wanted = [HTTP.InferRequestedOutput("logits", binary_data=False, class_count=2)]
    found = http.infer("linear", [tensor(HTTP, array, binary_data=False)], outputs=wanted).as_numpy("logits")
    order = np.argsort(-answer(array), axis=1)[:, :2]
    assert [[int(text.split(":")[1]) for text in row] for row in found] == order.tolist()


def test_request_ids_come_back(http: Any, grpc: Any) -> None:
    for name in ("1", "a b/ü", "x" * 1000):
        for library, client in ((HTTP, http), (GRPC, grpc)):
            result = client.infer("linear", [tensor(library, pixels(0))], request_id=name)
            response = result.get_response()
            assert (response["id"] if library is HTTP else response.id) == name
    assert "id" not in http.infer("linear", [tensor(HTTP, pixels(0))]).get_response()


def test_parameters_that_change_nothing(http: Any, grpc: Any) -> None:
    """A generous timeout, a priority, and a client's own."""
    for library, client in ((HTTP, http), (GRPC, grpc)):
        array = pixels(5)
        for timeout in (0, 30_000_000):
            result = client.infer(
                "linear",
                [tensor(library, array)],
                timeout=timeout,
                priority=1,
                parameters={"trace": "x", "n": 1},
            )
            require_right(answer(array), result.as_numpy("logits"))


def test_versions(http: Any, grpc: Any) -> None:
    """The highest where none is named; each answers for itself."""
    array = pixels(6)
    for library, client in ((HTTP, http), (GRPC, grpc)):
        for version, factor, told in (("", 2, "7"), ("7", 2, "7"), ("2", 1, "2")):
            result = client.infer("both", [tensor(library, array)], model_version=version)
            require_right(factor * answer(array), result.as_numpy("logits"))
            response = result.get_response()
            name, number = (
                (response["model_name"], response["model_version"])
                if library is HTTP
                else (response.model_name, response.model_version)
            )
            assert (name, number) == ("both", told)


@pytest.mark.slow
def test_async_http(http: Any) -> None:
    arrays = [pixels(seed, rows=1 + seed % 4) for seed in range(20)]
    waiting = [http.async_infer("linear", [tensor(HTTP, array)]) for array in arrays]
    for array, one in zip(arrays, waiting, strict=True):
        require_right(answer(array), one.get_result(timeout=600).as_numpy("logits"))
    with pytest.raises(InferenceServerException, match=r"\[404\] Request for unknown model: 'nope'"):
        http.async_infer("nope", [tensor(HTTP, arrays[0])]).get_result(timeout=600)


def test_async_grpc(grpc: Any) -> None:
    arrays = [pixels(seed, rows=1 + seed % 4) for seed in range(20)]
    found: dict[int, Any] = {}
    done = threading.Semaphore(0)
    for number, array in enumerate(arrays):

        def keep(result: Any, error: Any, number: int = number) -> None:
            found[number] = result if error is None else error
            done.release()

        grpc.async_infer("linear", [tensor(GRPC, array)], keep)
    for _ in arrays:
        assert done.acquire(timeout=600)
    for number, array in enumerate(arrays):
        require_right(answer(array), found[number].as_numpy("logits"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_grpc_stream_answers_in_order_and_survives_refusals(grpc: Any, codec: str | None) -> None:
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    grpc.start_stream(lambda result, error: arrived.put((result, error)), compression_algorithm=codec)
    arrays = [pixels(seed, rows=1 + seed % 4) for seed in range(20)]
    for number, array in enumerate(arrays):
        name = "nope" if number == 7 else "linear"
        grpc.async_stream_infer(name, [tensor(GRPC, array)], request_id=str(number))
    for number, array in enumerate(arrays):
        result, error = arrived.get(timeout=600)
        if number == 7:
            assert isinstance(error, InferenceServerException)
            assert "unknown model: 'nope'" in error.message()
            continue
        assert error is None
        assert result.get_response().id == str(number)
        require_right(answer(array), result.as_numpy("logits"))
    grpc.stop_stream()


def test_cancelling_a_grpc_request(grpc: Any) -> None:
    """The server goes on; what the client is told is the client's own doing."""
    over = threading.Event()
    call = grpc.async_infer("linear", [tensor(GRPC, pixels(1))], lambda result, error: over.set())
    call.cancel()
    assert over.wait(120)
    require_right(answer(pixels(2)), grpc.infer("linear", [tensor(GRPC, pixels(2))]).as_numpy("logits"))
