"""``POST /v1/embeddings``: OpenAI's unmodified client and plain HTTP get what ``predict`` gives, to a bit."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.helpers.asgi import Application, application
from tests.helpers.bundles import LABELS, answer_images, random_image, write_bundle
from tests.helpers.fuzz import damaged, image_files
from tests.helpers.live_server import Live, Reply, serving
from tests.server.test_images import encoded
from vitdeploy import load
from vitdeploy.data import digits_images
from vitdeploy.server.messages import ErrorKind, RequestError
from vitdeploy.server.service import RequestLimits

PATH = "/v1/embeddings"
JSON = "application/json"
Vector = np.ndarray[Any, Any]


def png(seed: int = 0) -> bytes:
    return encoded(random_image(seed), "PNG")


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def body(*images: bytes, **fields: Any) -> bytes:
    urls: Any = [data_url(data) for data in images]
    return json.dumps({"input": urls[0] if len(urls) == 1 else urls, **fields}).encode()


def vectors_of(reply: Reply) -> Vector:
    """The vectors (n, columns) float32 of an answer, whose form is checked."""
    assert reply.status == 200, reply
    document = reply.document
    assert list(document) == ["object", "data", "model", "usage"]
    assert document["object"] == "list"
    assert document["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    for index, entry in enumerate(document["data"]):
        assert list(entry) == ["object", "index", "embedding"]
        assert (entry["object"], entry["index"]) == ("embedding", index)
    return np.stack([decoded(entry["embedding"]) for entry in document["data"]])


def decoded(embedding: Any) -> Vector:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
    return np.array(embedding, np.float32)


@dataclass(frozen=True)
class Refusal:
    status: int
    message: str
    type: str
    param: str | None
    code: str | None


def refusal(reply: Reply) -> Refusal:
    """An error in OpenAI's form, which is checked."""
    assert reply.status >= 400, reply
    assert list(reply.document) == ["error"]
    error = reply.document["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert 0 < len(error["message"]) <= 500
    assert "\n" not in error["message"]
    return Refusal(reply.status, **error)


def invalid(reply: Reply, param: str | None) -> str:
    """The message of a refusal that is the request's own fault."""
    found = refusal(reply)
    assert (found.status, found.type, found.param, found.code) == (400, "invalid_request_error", param, None)
    return found.message


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear classifier's logits under the name of features."""
    return write_bundle(tmp_path_factory.mktemp("f") / "features.bundle", output="features", labels=None).root


@pytest.fixture(scope="session")
def shared_embeddings(digits_embedding: Path, features: Path, linear: Path) -> Iterator[Live]:
    flags = ("--max-body", "64KiB", "--max-images", 4)
    with serving(f"digits={digits_embedding}", features, linear, *flags) as server:
        yield server


@pytest.fixture
def embeddings(shared_embeddings: Live) -> Iterator[Live]:
    """``digits`` gives embeddings, ``features`` features and ``linear`` logits; 64 KiB, four images."""
    with shared_embeddings.watched() as server:
        yield server


@pytest.fixture
def client(embeddings: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{embeddings.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_openai_s_client(client: openai.OpenAI, digits_embedding: Path) -> None:
    """As it asks by itself (base64), and for floats; the numbers are those of ``predict``, of length 1."""
    with load(digits_embedding) as predictor:
        for path in digits_images()[:3]:
            (expected,) = predictor.embed(path)
            url = data_url(path.read_bytes(), "image/jpeg" if path.suffix == ".jpg" else "image/png")
            for given in ({}, {"encoding_format": "float"}):
                response = client.embeddings.create(model="digits", input=url, **given)
                assert (response.object, response.model, response.usage.total_tokens) == ("list", "digits", 0)
                (found,) = response.data
                assert found.embedding == expected.astype(np.float64).tolist()
                assert np.linalg.norm(found.embedding) == pytest.approx(1, abs=1e-6)
            (found,) = client.embeddings.create(model="digits", input=url, encoding_format="base64").data
            assert np.array_equal(decoded(found.embedding), expected)


@pytest.mark.slow
def test_several_inputs(client: openai.OpenAI, digits_embedding: Path) -> None:
    paths = digits_images()[:4]
    response = client.embeddings.create(model="digits", input=[data_url(p.read_bytes()) for p in paths])
    assert [entry.index for entry in response.data] == [0, 1, 2, 3]
    with load(digits_embedding) as predictor:
        expected = predictor.embed(paths)
    np.testing.assert_allclose([entry.embedding for entry in response.data], expected, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="5 images, but a request may have 4") as caught:
        client.embeddings.create(model="digits", input=[data_url(png())] * 5)
    assert caught.value.param == "input"


@pytest.mark.slow
def test_openai_s_client_lists_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["digits", "features", "linear"]
    assert {model.object for model in models.values()} == {"model"}
    given = {name: (model.model_extra or {})["embedding"] for name, model in models.items()}
    assert given == {"digits": "embedding", "features": "features", "linear": None}
    one = client.models.retrieve("features")
    assert (one.id, one.owned_by) == ("features", "vitdeploy")
    assert one.created == 1795230000  # 2026-11-21T03:00:00Z
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert "'nothing' is not found" in caught.value.response.json()["error"]  # as on all paths but one


@pytest.mark.slow
def test_openai_s_client_is_told_what_is_wrong(client: openai.OpenAI) -> None:
    url = data_url(png())
    with pytest.raises(openai.NotFoundError, match="'digitz' is not found; did you mean 'digits'") as caught:
        client.embeddings.create(model="digitz", input=url)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="export --output embedding") as caught:
        client.embeddings.create(model="linear", input=url)
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="vectors of one length only") as caught:
        client.embeddings.create(model="digits", input=url, dimensions=8)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="is an address, and this server fetches nothing"):
        client.embeddings.create(model="digits", input="https://example.org/cat.jpg")
    with pytest.raises(openai.BadRequestError, match="input: image of 7 bytes is not an image"):
        client.embeddings.create(model="digits", input=data_url(b"nothing"))
    with pytest.raises(openai.BadRequestError, match="input is no image as data:image"):
        client.embeddings.create(model="digits", input="a photo of a cat")
    with pytest.raises(openai.BadRequestError, match=r"input\[0\] is no string"):
        client.embeddings.create(model="digits", input=[1, 2, 3])
    with pytest.raises(openai.APIStatusError, match="more than 65536 bytes") as caught:
        client.embeddings.create(model="digits", input=data_url(bytes(2**16)))
    assert caught.value.status_code == 413


@pytest.mark.slow
def test_image_files_and_metrics(embeddings: Live, features: Path) -> None:
    """The body is the image; it went through the queue that all requests of the model go through."""
    with load(features) as predictor:
        for seed, kind in enumerate(
            ("image/png", "image/jpeg", "application/octet-stream", "IMAGE/PNG; x=y")
        ):
            data = png(seed)
            (expected,) = predictor.embed(data)
            for query in ("", "&encoding_format=base64", "&encoding_format=float"):
                path = f"{PATH}?model=features{query}"
                reply = embeddings.ask("POST", path, data, Content_Type=kind)
                assert np.array_equal(vectors_of(reply)[0], expected)
            np.testing.assert_allclose(expected, answer_images([random_image(seed)])[0], rtol=1e-4, atol=1e-4)
    text = embeddings.ask("GET", "/metrics").body.decode()
    labels = r'{(image_size="8x8",)?model="features",(outcome="ok",)?version="1"}'
    assert re.search(rf"^vitdeploy_requests_total{labels} 12\.0$", text, re.MULTILINE), text
    assert re.search(rf"^vitdeploy_images_total{labels} 12\.0$", text, re.MULTILINE), text
    reply = embeddings.ask("POST", PATH, png(), Content_Type="image/png")
    assert invalid(reply, "model") == "model is not one of digits, features, linear"
    reply = embeddings.ask("POST", f"{PATH}?model=nothing", bytes(2**15), Content_Type="image/png")
    assert refusal(reply).code == "model_not_found"


def asking(features: Path, one: Any, **settings: Any) -> None:
    """Run ``one`` on an application that serves ``features`` alone."""

    async def main() -> None:
        async with application(features, **settings) as served:
            await one(served)

    asyncio.run(main())


def test_the_only_model_need_not_be_named(features: Path) -> None:
    """Nor does its name matter in a body's place, gzip or an odd data URL."""
    expected = answer_images([random_image(0), random_image(1)])
    urls = [data_url(png(0), "image/PNG;name=a"), data_url(png(1)).replace("data:", "DATA:", 1)]
    odd = json.dumps({"input": urls, "user": "someone", "encoding_format": None, "dimensions": None}).encode()

    async def one(served: Application) -> None:
        for content, headers in (
            (body(png(0), png(1)), {"Content-Type": JSON}),
            (body(png(0), png(1), model="features"), {"Content-Type": f"{JSON}; charset=utf-8"}),
            (odd, {"Content-Type": JSON}),
            (gzip.compress(odd), {"Content-Type": JSON, "Content-Encoding": "gzip"}),
        ):
            reply = await served.ask("POST", PATH, content, headers)
            np.testing.assert_allclose(vectors_of(reply), expected, rtol=1e-4, atol=1e-4)
            assert reply.document["model"] == "features"

    asking(features, one)


@pytest.mark.slow
@pytest.mark.parametrize("content, param, words", [
    (b"junk", None, "failed to parse the request JSON"),
    (b"[]", None, "failed to parse the request JSON: not an object"),
    (b"{}", "input", "has no input"),
    (b'{"input": null}', "input", "has no input"),
    (b'{"input": []}', "input", "has no input"),
    (b'{"input": 5}', "input", "input is no string"),
    (b'{"input": [[1, 2]]}', "input", "input[0] is no string"),
    (b'{"input": ""}', "input", "input is no image as data:image/jpeg;base64,...: ''"),
    (b'{"input": "HTTP://example.org/x.png"}', "input", "this server fetches nothing"),
    (b'{"input": "file:///etc/passwd"}', "input", "input is no image as"),
    (b'{"input": "data:image/png,abc"}', "input", "input is no image as"),
    (b'{"input": "data:image/png;base64"}', "input", "input is no image as"),
    (b'{"input": "data:text/plain;base64,AAAA"}', "input", "a data URL of 'text/plain', not of an image"),
    (b'{"input": "data:;base64,AAAA"}', "input", "a data URL of '', not of an image"),
    (b'{"input": "data:image/png;base64,A"}', "input", "input is not base64"),
    (b'{"input": "data:image/png;base64,AA AA"}', "input", "input is not base64"),
    (b'{"input": "data:image/png;base64,\xc3\xa4"}', "input", "input is not base64"),
    (b'{"input": "data:image/png;base64,"}', "input", "input: image of 0 bytes is empty"),
    (b'{"input": "data:image/png;base64,AAAA"}', "input", "input: image of 3 bytes is not an image"),
    (body(png(), png()[:60], png()), "input", "input[1]: image of 60 bytes is damaged or cut short"),
    (body(png(), model=5), "model", "model is not one of features"),
    (body(png(), encoding_format="hex"), "encoding_format", "'hex' is neither float nor base64"),
    (body(png(), encoding_format=[1]), "encoding_format", "'[1]' is neither float nor base64"),
    (body(png(), dimensions=5), "dimensions", "leave dimensions out"),
], ids=range(24))  # fmt: skip
def test_what_is_wrong_with_a_request(features: Path, content: bytes, param: str, words: str) -> None:
    async def one(served: Application) -> None:
        reply = await served.ask("POST", PATH, content, {"Content-Type": JSON})
        assert words in invalid(reply, param)

    asking(features, one)


def test_media_types(features: Path) -> None:
    async def one(served: Application) -> None:
        for kind in (
            "",
            "text/plain",
            "multipart/form-data; boundary=x",
            "application/x-www-form-urlencoded",
        ):
            reply = await served.ask("POST", PATH, png(), {"Content-Type": kind})
            assert "is not application/json, nor image/jpeg" in invalid(reply, None)
        reply = await served.ask("POST", f"{PATH}?dimensions=5", png(), {"Content-Type": "image/png"})
        assert "leave dimensions out" in invalid(reply, "dimensions")

    asking(features, one)


def test_a_server_that_cannot_now(features: Path) -> None:
    """Limits, the queue and the end are those of the other routes; each in OpenAI's words."""

    async def one(served: Application) -> None:
        content = body(png(0), png(1))
        full = refusal(reply := await served.ask("POST", PATH, content, {"Content-Type": JSON}))
        assert (full.status, full.type, full.code) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert int(reply.headers["retry-after"]) >= 1
        served.service.draining = True
        ending = refusal(reply := await served.ask("POST", PATH, content, {"Content-Type": JSON}))
        assert (ending.status, ending.type, ending.code) == (503, "server_error", None)
        assert int(reply.headers["retry-after"]) >= 1

    asking(features, one, max_queue=1)


@pytest.mark.parametrize("kind, status, type_of", [
    ("timeout", 504, "server_error"),
    ("internal", 500, "server_error"),
    ("unavailable", 503, "server_error"),
    ("too slow", 408, "invalid_request_error"),
])  # fmt: skip
def test_what_the_queue_refuses(
    features: Path, kind: ErrorKind, status: int, type_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(*_: object) -> None:
        raise RequestError(kind, "no session was free within 1 s")

    async def one(served: Application) -> None:
        monkeypatch.setattr("vitdeploy.server.batcher.Batcher.submit", refuses)
        reply = await served.ask("POST", PATH, png(), {"Content-Type": "image/png"})
        assert refusal(reply) == Refusal(status, "no session was free within 1 s", type_of, None, None)

    asking(features, one)


def test_limits(features: Path) -> None:
    async def one(served: Application) -> None:
        for size in (501, 10_000):
            found = refusal(await served.ask("POST", PATH, bytes(size), {"Content-Type": "image/png"}))
            assert (found.status, found.type) == (413, "invalid_request_error")
        many = json.dumps({"input": ["data:image/png;base64,AAAA"] * 3}).encode()
        reply = await served.ask("POST", PATH, many, {"Content-Type": JSON})
        assert invalid(reply, "input") == "3 images, but a request may have 2"

    asking(features, one, limits=RequestLimits(body_bytes=500, images=2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_mutated_requests(features: Path, seed: int) -> None:
    """What the library makes of the images that a damaged request still has, the server says; or refuses."""
    rng, files = random.Random(seed), image_files()
    found = Counter[str]()

    def strict(content: bytes) -> list[bytes]:
        """The files of a request that may be answered."""
        document = json.loads(content)
        given = document["input"]
        urls = given if isinstance(given, list) else [given]
        return [base64.b64decode(re.sub(r"(?i)^data:image/[^,]*;base64,", "", url, count=1)) for url in urls]

    async def one(served: Application) -> None:
        with load(features) as predictor:
            for _ in range(300):
                content = body(*rng.choices(files, k=rng.choice((1, 2))), model="features")
                for _ in range(rng.choice((0, 1, 2))):
                    content = (
                        damaged(rng, content[:80]) + content[80:]
                        if rng.random() < 0.5
                        else damaged(rng, content)
                    )
                reply = await served.ask("POST", PATH, content, {"Content-Type": JSON})
                if reply.status == 200:
                    expected = predictor.embed(strict(content))
                    np.testing.assert_allclose(vectors_of(reply), expected, rtol=1e-4, atol=1e-4)
                else:
                    assert refusal(reply).status in (400, 404), (content, reply)
                found[str(reply.status)] += 1

    asking(features, one)
    assert found["200"] > 60, found
    assert found["400"] > 60, found


@pytest.mark.slow
def test_models_that_cannot(linear: Path, tmp_path: Path) -> None:
    """Logits and tokens are no vectors, and without preprocessing there is no input."""
    features = write_bundle(tmp_path / "features.bundle", output="features").root
    tokens = write_bundle(tmp_path / "tokens.bundle", output="tokens").root
    blind = write_bundle(tmp_path / "blind.bundle", output="features", preprocess=None).root

    async def main() -> None:
        async with application(linear, tokens, blind, features) as served:
            for name, words in (
                ("linear", "gives logits, no vector of each image: vitdeploy export --output embedding"),
                ("tokens", "gives tokens, no vector of each image"),
                ("blind", "its bundle says nothing of preprocessing"),
            ):
                reply = await served.ask("POST", PATH, body(png(), model=name), {"Content-Type": JSON})
                assert words in invalid(reply, "model")
            reply = await served.ask("POST", "/v1/models/features:predict", png())
            assert "its vectors are at /v1/embeddings" in reply.error

    asyncio.run(main())


def test_a_model_says_what_it_gives(linear: Path, features: Path) -> None:
    async def main() -> None:
        async with application(linear, features) as served:
            document = (await served.ask("GET", "/v1/models")).document
            assert document["models"] == ["features", "linear"]  # as KServe's protocol v1
            one = (await served.ask("GET", "/v1/models/features")).document
            assert (one["name"], one["ready"]) == ("features", True)
            assert document["data"][0] == {key: one[key] for key in document["data"][0]}
            metadata = (await served.ask("GET", "/v2/models/features")).document
            assert [(o["name"], o["shape"]) for o in metadata["outputs"]] == [("features", [-1, len(LABELS)])]

    asyncio.run(main())
