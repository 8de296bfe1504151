"""Many clients at once: everybody's own answer, and memory that stays where it is."""

from __future__ import annotations

import concurrent.futures
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image

from tests.helpers.live_server import Live, binary_request, json_request, logits_of, serving
from vitdeploy import load
from vitdeploy.predictor import Predictor
from vitdeploy.scores import softmax
from vitdeploy.verification.parity import TOLERANCES

CLIENTS, EACH = 64, 6
REQUESTS = 20_000
INFER, PREDICT = "/v2/models/digits/infer", "/v1/models/digits:predict"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def server(digits: Path) -> Iterator[Live]:
    with serving(digits, "--max-batch", 16, "--max-delay-ms", 2, "--max-queue", 1000) as made:
        yield made


@pytest.fixture(scope="module")
def predictor(digits: Path) -> Iterator[Predictor]:
    with load(digits) as made:
        yield made


def image(number: int) -> bytes:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def together(work: Callable[[int], None], count: int = CLIENTS) -> None:
    """Run all clients at once, each in its thread; they begin at the same moment."""
    barrier = threading.Barrier(count)

    def one(number: int) -> None:
        barrier.wait(60)
        work(number)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(one, number) for number in range(count)]:
            done.result()


def require_same(alone: Array, found: Array) -> None:
    """Company moves an answer by rounding at most, as the parity table has it."""
    difference = np.linalg.norm(found.astype(np.float64) - alone) / np.linalg.norm(alone)
    bound = TOLERANCES["fp32"].batch_invariance
    assert bound is not None
    assert difference <= bound


@pytest.fixture(scope="module")
def expected(predictor: Predictor) -> dict[int, tuple[bytes, Array, Array]]:
    """Per number: the file, its tensor (1, C, H, W), and its logits when it runs alone."""
    found = {}
    for number in range(CLIENTS * EACH):
        data = image(number)
        tensor = predictor.preprocess(data)[None]
        found[number] = data, tensor, predictor.logits(data)[0].astype(np.float64)
    apart = np.array([logits for *_, logits in found.values()])
    nearest = np.linalg.norm(apart[:, None] - apart[None], axis=2) + np.eye(len(apart)) * 1e9
    assert (nearest.min(axis=1) > 1e-2 * np.linalg.norm(apart, axis=1)).all()  # a mix-up would show
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["images", "binary", "json", "grpc", "all"])
def test_everybody_gets_their_own_answer(
    server: Live, expected: dict[int, tuple[bytes, Array, Array]], how: str
) -> None:
    def work(client: int) -> None:
        kind = how if how != "all" else ("images", "binary", "json", "grpc")[client % 4]
        numbers = range(client * EACH, (client + 1) * EACH)
        if kind == "grpc":
            over_grpc(numbers)
        else:
            over_http(numbers, kind)

    def over_http(numbers: range, kind: str) -> None:
        with server.client() as connection:
            for number in numbers:
                data, tensor, alone = expected[number]
                if kind == "images":
                    reply = connection.ask("POST", f"{PREDICT}?top_k=100", data)
                    assert reply.status == 200, reply
                    (found,) = json.loads(reply.body)["predictions"]
                    scores = np.empty(len(found))
                    scores[[p["index"] for p in found]] = [p["score"] for p in found]
                    require_same(softmax(alone), scores)
                else:
                    request = (binary_request if kind == "binary" else json_request)(tensor)
                    reply = connection.ask("POST", INFER, request.body, **request.headers)
                    require_same(alone, logits_of(reply)[0])

    def over_grpc(numbers: range) -> None:
        library = tritonclient.grpc
        with library.InferenceServerClient(server.grpc) as client:
            for number in numbers:
                _, tensor, alone = expected[number]
                given = library.InferInput("pixel_values", list(tensor.shape), "FP32")
                result = client.infer("digits", [given.set_data_from_numpy(tensor)])
                require_same(alone, result.as_numpy("logits")[0])

    before = executions(server)
    together(work)
    ran = executions(server) - before
    assert ran < CLIENTS * EACH * 0.9  # they really ran together


def executions(server: Live) -> int:
    reply = server.ask("GET", "/v2/models/digits/stats")
    return int(reply.document["model_stats"][0]["execution_count"])


@pytest.mark.slow
def test_memory_is_steady(linear: Path) -> None:
    """Over 20,000 requests, good and bad, of every kind, on connections that stay and that do not."""
    pixels = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    good, bad = binary_request(pixels, id="x"), json_request(pixels, name="nobody")
    text = json_request(pixels)
    file = image(0)

    with serving(linear, "--max-queue", 1000) as server:

        def ask(count: int) -> None:
            def work(client: int) -> None:
                with server.client() as connection:
                    for number in range(count // 8):
                        kind = number % 10
                        if kind == 9:
                            reply = connection.ask("POST", "/v2/models/linear/infer", bad.body)
                            assert reply.status == 400
                        elif kind == 8:
                            reply = connection.ask("POST", "/v1/models/linear:predict", file)
                            assert reply.status == 200
                        elif kind == 7:
                            reply = connection.ask("POST", "/v2/models/linear/infer", text.body)
                            assert reply.status == 200
                        elif kind == 6 and number % 100 == 6:
                            assert server.ask("GET", "/metrics").status == 200
                        else:
                            reply = connection.ask(
                                "POST", "/v2/models/linear/infer", good.body, **good.headers
                            )
                            assert reply.status == 200

            together(work, 8)

        ask(4000)
        warm = server.rss()
        ask(REQUESTS)
        grown = server.rss() - warm
        assert grown < 6 * 1024, f"{grown} KiB more after {REQUESTS} requests"
