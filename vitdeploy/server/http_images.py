"""Image files in, labels out: ``POST /v1/models/{model}:predict``, with the bundle's own preprocessing."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from vitdeploy.config import size_name
from vitdeploy.errors import ImageError
from vitdeploy.server.codec import parse_json
from vitdeploy.server.http_io import json_response, read_body, until_disconnect
from vitdeploy.server.messages import RequestError
from vitdeploy.server.service import Service

_DEFAULT_TOP_K = 5
_ONLY_TOP_K = re.compile(rb"top_k=([1-9][0-9]{0,8})")
"""The usual query, which need not be taken apart."""
PATH = re.compile(r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>[^/:]+))?:predict")


async def predict(request: Request, service: Service) -> Response:
    """Classify one image file, or several."""
    name, version = request.path_params["model"], request.path_params.get("version", "")
    service.require_open()
    with service.repository.using(name, version) as model:
        top_k = _top_k(request)
        images = await images_of(request, service)
        results = await until_disconnect(request, model.classify([data for _, data in images], top_k))
        predictions, sizes = [], []
        for (title, _), result in zip(images, results, strict=True):
            if isinstance(result, ImageError):
                raise RequestError("invalid", f"{title}: {result.message}")
            rows = [{"label": p.label, "index": p.index, "score": p.score} for p in result.predictions]
            predictions.append(rows)
            sizes += [size_name(result.size)] if result.size else []
        document = {"model_name": model.name, "model_version": model.version, "predictions": predictions}
        if sizes:
            document["image_sizes"] = sizes
    return json_response(document)


def register_names() -> None:
    """Tell starlette what a model's name looks like in a path: it ends where ``:predict`` begins."""

    class Name(StringConvertor):
        regex = "[^/:]+"

    register_url_convertor("name", Name())


ROUTES = [
    ("POST", "/v1/models/{model:name}:predict", predict),
    ("POST", "/v1/models/{model:name}/versions/{version:name}:predict", predict),
]


def _top_k(request: Request) -> int:
    if only := _ONLY_TOP_K.fullmatch(request.scope["query_string"]):
        return int(only[1])
    text = request.query_params.get("top_k")
    if text is None:
        return _DEFAULT_TOP_K
    if not text.isdecimal() or not text.isascii() or not 0 < len(text) < 10 or int(text) < 1:
        raise RequestError("invalid", f"top_k {text[:40]!r} is not a positive number")
    return int(text)


async def images_of(request: Request, service: Service) -> list[tuple[str, bytes]]:
    """What to call each image of a request in an error, and its bytes.

    Raises:
        RequestError: the body has no images, or too many, or is not what its headers say.
    """
    body = await read_body(request, service.limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _parts(request, body, service.limits.images)
    elif kind == "application/json":
        images = _instances(parse_json(body), service.limits.images)
    else:
        images = [("the image", body)]
    if not images:
        raise RequestError("invalid", "the request has no image")
    return images


async def _parts(request: Request, body: bytes, most: int) -> list[tuple[str, bytes]]:
    """The files of a form."""

    class Parser(MultiPartParser):
        ended = False

        def on_end(self) -> None:
            self.ended = True

    async def stream() -> AsyncIterator[bytes]:
        yield body
        if not parser.ended:  # else its last file would be missing from the answer
            raise MultiPartException("it has no end")

    try:
        parser = Parser(request.headers, stream(), max_files=most, max_fields=most)  # type: ignore[arg-type]
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        reason = getattr(error, "message", "") or str(error)
        raise RequestError("invalid", f"the form cannot be read: {' '.join(reason.split())[:200]}") from error
    images = []
    for index, (_, value) in enumerate(form.multi_items()):
        if isinstance(value, UploadFile):
            title = f"file {index + 1} ({value.filename[:80]})" if value.filename else f"file {index + 1}"
            images.append((title, await value.read()))
    await form.close()
    return images


def _instances(document: dict[str, Any], most: int) -> list[tuple[str, bytes]]:
    """``{"instances": [{"b64": ...}, ...]}``, as KServe's protocol v1 sends bytes."""
    instances = document.get("instances")
    if not isinstance(instances, list):
        raise RequestError("invalid", 'the request has no array "instances"')
    if len(instances) > most:
        raise RequestError("invalid", f"{len(instances)} images, but a request may have {most}")
    images = []
    for index, instance in enumerate(instances):
        text = instance.get("b64") if isinstance(instance, dict) else None
        if not isinstance(text, str):
            raise RequestError("invalid", f'instances[{index}] is not {{"b64": "..."}}')
        images.append((f"instances[{index}]", bytes_of_base64(text, f"instances[{index}]")))
    return images


def bytes_of_base64(text: str, where: str, param: str | None = None) -> bytes:
    """What a client sent as base64.

    Raises:
        RequestError: it is none; ``where`` and ``param`` say what.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError("invalid", f"{where} is not base64: {error}", param=param) from error
