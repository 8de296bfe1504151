"""Images in, vectors out: ``POST /v1/embeddings`` in the form of OpenAI's API, and the models it is asked of.

The form: platform.openai.com/docs/api-reference/embeddings. An input is an image as a data URL (RFC 2397), or
the body is one image file. The server fetches nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vitdeploy.backends.base import Array
from vitdeploy.config import size_name
from vitdeploy.errors import ImageError, VitdeployError
from vitdeploy.server.codec import little_endian, parse_json
from vitdeploy.server.http_images import bytes_of_base64
from vitdeploy.server.http_io import error_response, json_response, parsed, read_body, until_disconnect
from vitdeploy.server.messages import ErrorKind, RequestError
from vitdeploy.server.served_model import ServedModel
from vitdeploy.server.service import Service

_FORM = "data:image/jpeg;base64,..."
_HEAD = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]*)*;base64", re.IGNORECASE)
"""Of a data URL, up to its comma."""
_FORMATS = ("float", "base64")

_TYPES: Mapping[ErrorKind, str] = {
    "overloaded": "rate_limit_error",
    "timeout": "server_error",
    "unavailable": "server_error",
    "internal": "server_error",
}
"""Of errors that are not the request's own."""
_CODES: Mapping[ErrorKind, str] = {"not found": "model_not_found", "overloaded": "rate_limit_exceeded"}

_Images = list[tuple[str, bytes]]
"""What to call each image in an error, and its bytes."""


async def _embeddings(request: Request, service: Service) -> Response:
    """Embed one image, or several."""
    try:
        return json_response(await _answer(request, service))
    except RequestError as error:
        return _refused(error)
    except VitdeployError as error:
        return _refused(RequestError("internal", error.message))


async def _answer(request: Request, service: Service) -> dict[str, Any]:
    service.require_open()
    query = dict(request.query_params)
    if "model" in query:
        service.repository.get(query["model"])  # before a long body is read for nothing
    body = await read_body(request, service.limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: Mapping[str, Any] = query
    if kind == "application/json":
        document, images = await parsed(_read, body, service.limits.images)
        fields = query | document
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images = [("the image", body)]
    else:
        raise RequestError(
            "invalid",
            f"Content-Type {kind[:40]!r} is not application/json, nor image/jpeg or another image's",
        )
    name, encoding = _model_name(fields, service), fields.get("encoding_format")
    if encoding not in (None, *_FORMATS):
        message = f"encoding_format {str(encoding)[:40]!r} is neither float nor base64"
        raise RequestError("invalid", message, param="encoding_format")
    with service.repository.using(name) as model:
        if fields.get("dimensions") is not None:
            message = f"model '{model.name}' gives vectors of one length only: leave dimensions out"
            raise RequestError("invalid", message, param="dimensions")
        results = await until_disconnect(request, model.embed([data for _, data in images]))
        data: list[dict[str, Any]] = []
        for (title, _), result in zip(images, results, strict=True):
            if isinstance(result, ImageError):
                raise RequestError("invalid", f"{title}: {result.message}", param="input")
            vector = _base64(result.vector) if encoding == "base64" else result.vector.tolist()
            data.append({"object": "embedding", "index": len(data), "embedding": vector})
            if result.size:
                data[-1]["image_size"] = size_name(result.size)
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _read(body: memoryview, most: int) -> tuple[dict[str, Any], _Images]:
    """The fields of a JSON body, and the images among them."""
    document = parse_json(body)
    given = document.pop("input", None)
    if isinstance(given, list):
        inputs: Sequence[tuple[str, Any]] = [(f"input[{index}]", text) for index, text in enumerate(given)]
    else:
        inputs = [("input", given)] if given is not None else []
    if not inputs:
        raise RequestError("invalid", f"the request has no input: an image as {_FORM}", param="input")
    if len(inputs) > most:
        message = f"{len(inputs)} images, but a request may have {most}"
        raise RequestError("invalid", message, param="input")
    return document, [(where, _image(text, where)) for where, text in inputs]


def _image(text: Any, where: str) -> bytes:
    """The bytes of an image that is sent as a data URL."""
    if not isinstance(text, str):
        raise RequestError("invalid", f"{where} is no string: send an image as {_FORM}", param="input")
    if re.match("https?:", text, re.IGNORECASE):
        message = f"{where} is an address, and this server fetches nothing: send the image itself, as {_FORM}"
        raise RequestError("invalid", message, param="input")
    head, comma, data = text.partition(",")
    found = _HEAD.fullmatch(head) if comma and len(head) < 256 else None
    if found is None:
        raise RequestError("invalid", f"{where} is no image as {_FORM}: {text[:40]!r}", param="input")
    if not found["kind"].lower().startswith("image/"):
        message = f"{where} is a data URL of {found['kind'][:40]!r}, not of an image"
        raise RequestError("invalid", message, param="input")
    return bytes_of_base64(data, where, "input")


def _model_name(fields: Mapping[str, Any], service: Service) -> str:
    """The model that is asked; who names none means the only one."""
    name = fields.get("model")
    if isinstance(name, str):
        return name
    names = sorted({model["name"] for model in service.repository.index()})
    if name is not None or len(names) > 1:
        raise RequestError("invalid", f"model is not one of {', '.join(names)}", param="model")
    return names[0]


def _base64(vector: Array) -> str:
    """The vector's float32 numbers, little-endian, as base64."""
    return base64.b64encode(little_endian(vector)).decode()


def _refused(error: RequestError) -> Response:
    """A refusal as OpenAI's API has it."""
    param = "model" if error.kind == "not found" else error.param
    content = {
        "message": error.message,
        "type": _TYPES.get(error.kind, "invalid_request_error"),
        "param": param,
        "code": _CODES.get(error.kind),
    }
    return error_response(error, content)


async def _models(request: Request, service: Service) -> Response:
    """The models that are ready: as OpenAI's API lists them, and as KServe's protocol v1 does."""
    names = sorted({model.name for model in service.repository.models})
    data = [_description(service.repository.get(name)) for name in names]
    return json_response({"object": "list", "data": data, "models": names})


async def _model(request: Request, service: Service) -> Response:
    """A model, as OpenAI's API has it, and whether it is ready, in the words of KServe's protocol v1."""
    model = service.repository.get(request.path_params["model"])
    return json_response({**_description(model), "name": model.name, "ready": True})


def _description(model: ServedModel) -> dict[str, Any]:
    """A model as OpenAI's API has it; and which of its outputs ``/v1/embeddings`` gives, if it does."""
    manifest = model.bundle.manifest
    return {
        "id": model.name,
        "object": "model",
        "created": int(datetime.fromisoformat(manifest.created).timestamp()),
        "owned_by": "vitdeploy",
        "embedding": manifest.vectors.name if manifest.vectors else None,
    }


ROUTES = [
    ("POST", "/v1/embeddings", _embeddings),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{model:name}", _model),
]
