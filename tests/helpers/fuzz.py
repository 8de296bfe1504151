"""Requests that are nearly right: valid ones with a few mutations, and what they must come to.

The verdict is an independent, strict reading of the protocol with json, numpy and zlib.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.http import InferenceServerClient

from tests.helpers.bundles import LABELS, WEIGHT, answer
from tests.helpers.live_server import Reply

Array = np.ndarray[Any, Any]
LENGTH, ENCODING, ACCEPT = "Inference-Header-Content-Length", "Content-Encoding", "Accept-Encoding"
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, -0.0, "", "x", "\u0000", "NaN",
    "FP32", "FP64", "BYTES", "pixel_values", "logits", "a" * 3000, [], [[]], [1], [1, 2], {}, {"a": {}},
    [None], "ä\U0001f600", [[[[1.0]]]], [0, 2**62], [1, 3, 8, 8], [2, 3, 8, 8], "../..", 1e39,
]  # fmt: skip
CLIENTS_FAULT = {400, 404, 405, 413}
ASKED_FOR = ("NaN or infinite", "no session was free within", "no session will be free within")
"""Sums that overflow and deadlines of microseconds get the codes of a server that cannot."""


@dataclass
class Attempt:
    """One request of the fuzzer."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    touched: bool = False
    """Whether anything about it was mutated."""


class Wrong(Exception):
    """The request is not one that may be answered."""


def generated(rng: random.Random) -> Attempt:
    """A valid infer request, mutated a few times or not at all."""
    rows = rng.choice((1, 1, 2, 3, 8))
    pixels = np.random.default_rng(rng.getrandbits(32)).normal(size=(rows, 3, 8, 8)).astype("<f4")
    binary = rng.random() < 0.7
    document, tail = _valid(rng, pixels, binary)
    mutations = rng.choice((0, 1, 1, 1, 2, 3))
    structural = sum(rng.random() < 0.6 for _ in range(mutations))
    for _ in range(structural):
        _mutate(rng, document)
    text = json.dumps(document).encode()
    body, headers = text + tail, {}
    if binary or rng.random() < 0.1:
        headers[LENGTH] = str(len(text))
    path = rng.choice(("/v2/models/linear/infer", "/v2/models/linear/versions/1/infer"))
    attempt = Attempt("POST", path, body, headers, touched=bool(mutations))
    early = rng.random() < 0.5
    if early:
        _damage_all(rng, attempt, mutations - structural)
    if rng.random() < 0.2:
        encoding, pack = rng.choice((("gzip", lambda b: gzip.compress(b, 1)), ("deflate", zlib.compress)))
        attempt.body = pack(attempt.body)
        attempt.headers[ENCODING] = encoding
    if not early:
        _damage_all(rng, attempt, mutations - structural)
    if rng.random() < 0.2:
        attempt.headers[ACCEPT] = rng.choice(("gzip", "deflate", "br, gzip;q=0.5", "identity", "gzip;q=0"))
    return attempt


def _valid(rng: random.Random, pixels: Array, binary: bool) -> tuple[dict[str, Any], bytes]:
    tensor: dict[str, Any] = {"name": "pixel_values", "datatype": "FP32", "shape": list(pixels.shape)}
    if binary:
        tensor["parameters"] = {"binary_data_size": pixels.nbytes}
    else:
        tensor["data"] = pixels.tolist() if rng.random() < 0.3 else pixels.ravel().tolist()
    document: dict[str, Any] = {"inputs": [tensor]}
    if rng.random() < 0.5:
        document["id"] = str(rng.getrandbits(40))
    if rng.random() < 0.5:
        document["parameters"] = {"binary_data_output": rng.random() < 0.5}
    if rng.random() < 0.4:
        wanted: dict[str, Any] = {"name": "logits"}
        if rng.random() < 0.7:
            wanted["parameters"] = {
                "binary_data": rng.random() < 0.5,
                "classification": rng.choice((0, 0, 1, 3)),
            }
        document["outputs"] = [wanted]
    return document, pixels.tobytes() if binary else b""


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document, a few of each long list."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))[:6]
    else:
        return found
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found


def _mutate(rng: random.Random, document: dict[str, Any]) -> None:
    """Change one place of the JSON."""
    places = _places(document)
    if not places:
        return
    container, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("name", "data", "shape", "parameters", "classification", "timeout", "x"))] = (
            container.pop(key)
        )
    elif kind == 2 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 3 and isinstance(container[key], int):
        container[key] += rng.choice((-1, 1, 2, -2, 1000, 2**32))
    elif kind == 4:
        container[key] = [container[key]]
    else:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))


def _damage_all(rng: random.Random, attempt: Attempt, times: int) -> None:
    for _ in range(times):
        kind = rng.randrange(10)
        if kind < 6:
            attempt.body = damaged(rng, attempt.body)
        elif kind < 8:
            name = rng.choice((LENGTH, ENCODING))
            value = attempt.headers.get(name, "")
            attempt.headers[name] = rng.choice(
                (
                    f"{int(value) + rng.choice((-1, 1, 5))}" if value.isdecimal() else "3",
                    "0",
                    "-4",
                    "x",
                    "99999",
                )
                if name == LENGTH
                else ("gzip", "deflate", "br", "identity", "GZIP ", "")
            )
        elif kind == 8:
            attempt.path = rng.choice(
                ("/v2/models/nope/infer", "/v2/models/linear/versions/3/infer", "/v2/models/linear/infer/",
                 "/v2/models/linear", "/v1/models/linear:predict", "/v2/repository/index",
                 "/v2/models//infer", "/v2/repository/models/nope/load",
                 "/v2/models/linear/versions/-1/infer")
            )  # fmt: skip
        else:
            attempt.method = rng.choice(("GET", "PUT", "POST", "DELETE", "OPTIONS"))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, cut, repeated or made up."""
    if not data:
        return bytes([rng.randrange(256)])
    place, kind = rng.randrange(len(data)), rng.randrange(7)
    if kind == 5:
        return data[: -rng.randrange(1, 10)]
    if kind == 6:
        return data + rng.randbytes(rng.randrange(1, 10))
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    length = min(rng.choice((1, 4, 40)), len(data) - place)
    if kind == 2:
        return data[:place] + data[place + length :]
    if kind == 3:
        return data[:place] + data[place : place + length] + data[place:]
    return data[:place] + rng.randbytes(length) + data[place + length :]


def strict(attempt: Attempt) -> tuple[Array, dict[str, Any]]:
    """The tensor of an infer request and its whole document.

    Raises:
        Wrong: the protocol does not allow it, or the model does not take it.
    """
    if attempt.method != "POST" or attempt.path not in (
        "/v2/models/linear/infer",
        "/v2/models/linear/versions/1/infer",
    ):
        raise Wrong("place")
    body = _unpacked(attempt)
    length = len(body)
    if LENGTH in attempt.headers:
        if not attempt.headers[LENGTH].isdecimal():
            raise Wrong("header length")
        length = int(attempt.headers[LENGTH])
    if not 0 < length <= len(body):
        raise Wrong("header length")
    try:
        document = json.loads(body[:length].decode("utf-8"), parse_constant=_no_constant)
        (tensor,) = document["inputs"]
        if tensor["name"] != "pixel_values" or tensor["datatype"] != "FP32":
            raise Wrong("name or datatype")
        pixels = _tensor(tensor, body[length:])
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise Wrong(str(error)) from error
    if pixels.shape[1:] != (3, 8, 8) or not 1 <= len(pixels) <= 8 or not np.isfinite(pixels).all():
        raise Wrong("shape or values")
    return pixels, document


def _no_constant(name: str) -> None:
    raise Wrong(name)


def _unpacked(attempt: Attempt) -> bytes:
    encoding = attempt.headers.get(ENCODING, "").strip().lower()
    if encoding in ("", "identity"):
        return attempt.body
    if encoding not in ("gzip", "deflate"):
        raise Wrong("encoding")
    try:
        unpacker = zlib.decompressobj(31 if encoding == "gzip" else 15)
        body = unpacker.decompress(attempt.body)
    except zlib.error as error:
        raise Wrong(str(error)) from error
    if not unpacker.eof or unpacker.unused_data:
        raise Wrong("not one whole stream")
    return body


def _tensor(tensor: dict[str, Any], tail: bytes) -> Array:
    shape = tensor["shape"]
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) > 10_000:
        raise Wrong("shape")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None:
        if type(size) is not int or size != len(tail) or size != 4 * math.prod(shape) or "data" in tensor:
            raise Wrong("size")
        return np.frombuffer(tail, "<f4").reshape(shape)
    if tail:
        raise Wrong("tail")
    flat: list[float] = []
    _flatten(tensor["data"], shape, flat)
    if len(flat) != math.prod(shape):
        raise Wrong("elements")
    with np.errstate(over="ignore"):
        return np.array(flat, np.float64).astype(np.float32).reshape(shape)


def _flatten(data: Any, shape: list[int], flat: list[float]) -> None:
    """Flat, or nested exactly as the shape says."""
    if not isinstance(data, list):
        raise Wrong("data")
    if all(type(item) in (int, float) for item in data):
        flat += data
        return
    if len(data) != shape[0] or len(shape) < 2:
        raise Wrong("nesting")
    for item in data:
        if not isinstance(item, list) or (len(shape) == 2) != all(type(i) in (int, float) for i in item):
            raise Wrong("nesting")
        if len(shape) == 2 and len(item) != shape[1]:
            raise Wrong("nesting")
        _flatten(item, shape[1:], flat)


def judge(attempt: Attempt, reply: Reply) -> str:
    """Whether an answer is right; returns "answered" or "refused".

    Raises:
        AssertionError: a wrong 200, a 500 for what a client did, or an error without the protocol's shape.
    """
    if reply.status != 200:
        asked_for = any(words in reply.error for words in ASKED_FOR)
        assert reply.status in CLIENTS_FAULT or asked_for, (attempt, reply)
        assert attempt.touched, (attempt, reply)
        return "refused"
    if not attempt.path.endswith("/infer"):
        assert reply.document is not None
        return "answered"
    try:
        pixels, document = strict(attempt)
    except Wrong as error:
        raise AssertionError(f"a wrong 200: {error}: {attempt} {reply}") from error
    length = reply.headers.get(LENGTH.lower())
    result = InferenceServerClient.parse_response_body(
        reply.body,
        header_length=None if length is None else int(length),
        content_encoding=reply.headers.get("content-encoding"),
    )
    assert result.get_response().get("id", "") == document.get("id", "")
    expected, found = answer(pixels), result.as_numpy("logits")
    if result.get_output("logits")["datatype"] == "BYTES":
        _require_classes(found, expected)
    else:
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= rounding(pixels)).all(), (attempt, reply)
    return "answered"


def rounding(pixels: Array) -> Array:
    """How far from the float64 answer float32 may be: (N, 1), from the sizes of what is summed up."""
    wide = pixels.reshape(len(pixels), -1).astype(np.float64)
    return np.asarray(1e-5 * np.linalg.norm(WEIGHT) * np.linalg.norm(wide, axis=1, keepdims=True) + 1e-30)


def _require_classes(found: Array, expected: Array) -> None:
    for texts, logits in zip(found, expected, strict=True):
        for text in texts:
            score, index, label = (text.decode() if isinstance(text, bytes) else text).split(":")
            assert label == LABELS[int(index)]
            assert abs(float(score) - logits[int(index)]) <= 1e-4 * np.abs(logits).max() + 1e-5
        assert [
            int(t.decode().split(":")[1] if isinstance(t, bytes) else t.split(":")[1]) for t in texts
        ] == (np.argsort(-logits)[: len(texts)].tolist())


def image_files() -> list[bytes]:
    """Small valid files of each format that photographs come in."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    smooth = picture.resize((40, 30), Image.Resampling.BICUBIC)
    files = []
    for image in (picture, smooth):
        for format, how in (
            ("JPEG", {"quality": 80}),
            ("JPEG", {"quality": 60, "progressive": True}),
            ("PNG", {}),
            ("WEBP", {"quality": 70}),
            ("WEBP", {"lossless": True}),
            ("GIF", {}),
        ):
            buffer = io.BytesIO()
            image.save(buffer, format, **how)
            files.append(buffer.getvalue())
    buffer = io.BytesIO()
    smooth.save(buffer, "GIF", save_all=True, append_images=[smooth.rotate(90), smooth.rotate(180)])
    return [*files, buffer.getvalue()]


def mutated_image(rng: random.Random, files: list[bytes]) -> bytes:
    """A file with a few bits or bytes changed, cut short, or continued as another one."""
    data = rng.choice(files)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if rng.random() < 0.15:
            other = rng.choice(files)
            data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
        else:
            data = damaged(rng, data)
    return data
