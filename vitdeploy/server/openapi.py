"""The server's interface as an OpenAPI 3.1 document, for clients that are generated and tests that are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitdeploy._version import __version__
from vitdeploy.server.codec import WIRE

_Schema = dict[str, Any]
_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_ANY: _Schema = {"type": "object"}


def document(names: Sequence[str]) -> dict[str, Any]:
    """The document of a server.

    Args:
        names: of its models.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vitdeploy",
            "version": __version__,
            "description": "Vision Transformers behind the Open Inference Protocol v2. Tensors go to "
            "/v2/models/{model}/infer, image files to /v1/models/{model}:predict.",
        },
        "paths": {**_service(), **_models(names), **_images(names)},
        "components": {"schemas": _schemas()},
    }


def _service() -> dict[str, Any]:
    index = _object({"ready": {"type": "boolean"}})
    ready = _object({"ready": {"type": "boolean"}}, "ready")
    return {
        "/v2/health/live": _get("Is the process alive?", _ANY),
        "/v2/health/ready": {
            "get": {
                "summary": "Do all models take requests?",
                "responses": {"200": _json("Yes", ready), "503": _json("No", ready)},
            }
        },
        "/v2": _get("Name, version and extensions of the server", _ANY),
        "/v2/models/stats": _get("What all models have done", _ANY),
        "/v2/repository/index": _post(
            "All models and versions with their states",
            {"type": "array", "items": _ANY},
            index,
            (),
            400,
            408,
            413,
        ),
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "responses": {"200": {"description": "Text", "content": {"text/plain": {"schema": _TEXT}}}},
            }
        },
    }


def _models(names: Sequence[str]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    own = _path("model", names)
    numbered = [*own, *_path("version", ["1"])]
    for base, parameters in (
        ("/v2/models/{model}", own),
        ("/v2/models/{model}/versions/{version}", numbered),
    ):
        paths |= {
            base: _get("Inputs and outputs", _ANY, 404, 503, parameters=parameters),
            f"{base}/ready": _get("Does it take requests?", _ANY, 400, parameters=parameters),
            f"{base}/config": _get("Batching and limits", _ANY, 404, 503, parameters=parameters),
            f"{base}/stats": _get("What it has done", _ANY, 404, 503, parameters=parameters),
            f"{base}/infer": _post(
                "Run tensors", _ref("InferResponse"), _ref("InferRequest"), parameters, *_ERRORS
            ),
        }
    for verb, what in (("load", "Load it, again if it is"), ("unload", "Stop serving it")):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = _post(
            what, _ANY, _ANY, own, 400, 404, 408, 413, 503
        )
    return paths


def _images(names: Sequence[str]) -> dict[str, Any]:
    own = _path("model", names)
    numbered = [*own, *_path("version", ["1"])]
    top_k = {
        "name": "top_k",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": 5},
    }
    raw = {"type": "string", "format": "binary"}
    form = _object({"image": {"type": "array", "items": raw, "minItems": 1}}, "image")
    base64 = _object({"b64": {"type": "string", "contentEncoding": "base64"}}, "b64")
    instances = _object({"instances": {"type": "array", "items": base64, "minItems": 1}}, "instances")
    post = {
        "summary": "Classify image files",
        "requestBody": {
            "required": True,
            "content": {
                "image/jpeg": {"schema": raw},
                "image/png": {"schema": raw},
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": instances},
            },
        },
        "responses": {"200": _json("Labels and scores", _ref("Predictions")), **_errors(*_ERRORS)},
    }
    return {
        "/v1/models": _get("Names of all models", _ANY),
        "/v1/models/{model}": _get("Does it take requests?", _ANY, 404, 503, parameters=own),
        "/v1/models/{model}:predict": {"post": {**post, "parameters": [*own, top_k]}},
        "/v1/models/{model}/versions/{version}:predict": {"post": {**post, "parameters": [*numbered, top_k]}},
    }


_ERRORS = (400, 404, 408, 413, 429, 500, 503, 504)


def _schemas() -> dict[str, Any]:
    parameters = {"type": "object"}
    shape = {"type": "array", "items": _COUNT, "maxItems": 8}
    name = {"type": "string", "minLength": 1}
    tensor = {
        "name": name,
        "datatype": {"type": "string", "enum": [*WIRE.values(), "BYTES"]},
        "shape": shape,
        "parameters": parameters,
        "data": {"type": "array"},
    }
    wanted = _object({"name": name, "parameters": parameters}, "name")
    prediction = {"label": _TEXT, "index": _COUNT, "score": {"type": "number", "minimum": 0, "maximum": 1}}
    return {
        "Error": _object({"error": _TEXT}, "error"),
        "Tensor": _object(tensor, "name", "datatype", "shape"),
        "InferRequest": _object(
            {
                "id": _TEXT,
                "parameters": parameters,
                "inputs": {"type": "array", "items": _ref("Tensor"), "minItems": 1},
                "outputs": {"type": "array", "items": wanted},
            },
            "inputs",
        ),
        "InferResponse": _object(
            {
                "model_name": _TEXT,
                "model_version": _TEXT,
                "id": _TEXT,
                "outputs": {"type": "array", "items": _ref("Tensor")},
            },
            *("model_name", "model_version", "outputs"),
        ),
        "Predictions": _object(
            {
                "model_name": _TEXT,
                "model_version": _TEXT,
                "predictions": {
                    "type": "array",
                    "items": {"type": "array", "items": _object(prediction, *prediction)},
                },
            },
            *("model_name", "model_version", "predictions"),
        ),
    }


def _get(summary: str, schema: _Schema, *errors: int, parameters: Sequence[Any] = ()) -> _Schema:
    responses = {"200": _json("Yes", schema), **_errors(*errors)}
    return {"get": {"summary": summary, "parameters": list(parameters), "responses": responses}}


def _post(summary: str, schema: _Schema, body: _Schema, parameters: Sequence[Any], *errors: int) -> _Schema:
    return {
        "post": {
            "summary": summary,
            "parameters": list(parameters),
            "requestBody": {"content": {"application/json": {"schema": body}}},
            "responses": {"200": _json("Done", schema), **_errors(*errors)},
        }
    }


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): _json("Refused, and why", _ref("Error")) for status in statuses}


def _json(description: str, schema: _Schema) -> _Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object(properties: Mapping[str, Any], *required: str) -> _Schema:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str, examples: Sequence[str]) -> list[_Schema]:
    """A parameter in the path, with the values that there are as examples."""
    schema = {"type": "string", "minLength": 1, "examples": list(examples)}
    return [{"name": name, "in": "path", "required": True, "schema": schema}]
