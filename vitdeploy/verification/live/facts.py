"""Reads what a server says of itself and its models, trusting none of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitdeploy.verification.live.client import AnswerError, IndexEntry, LiveTensor, ModelFacts, ServerFacts


def read_server(said: Any) -> ServerFacts:
    """The answer to ``GET /v2``.

    Raises:
        AnswerError: it is no such answer.
    """
    name = _mapping(said, "its metadata").get("name")
    if not isinstance(name, str):
        raise AnswerError("its metadata has no name")
    extensions = said.get("extensions")
    known = tuple(map(str, extensions)) if isinstance(extensions, list) else ()
    return ServerFacts(name, str(said.get("version") or ""), known)


def read_index(said: Any) -> tuple[IndexEntry, ...]:
    """A repository's index: over HTTP a list, over gRPC one inside of an object.

    Raises:
        AnswerError: it is no index.
    """
    rows = said.get("models", []) if isinstance(said, Mapping) else said
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
        raise AnswerError("its repository index is not a list of models")
    return tuple(
        IndexEntry(
            name=str(row["name"]),
            version=str(row.get("version") or ""),
            ready=row.get("state") == "READY",
            reason=str(row.get("reason") or ""),
        )
        for row in rows
    )


def read_model(said: Any, configuration: Any) -> ModelFacts:
    """A model's metadata, and its configuration where there is one (empty where not).

    Raises:
        AnswerError: the metadata is none.
    """
    said = _mapping(said, "the model's metadata")
    versions = said.get("versions")
    configuration = configuration if isinstance(configuration, Mapping) else {}
    configuration = configuration.get("config", configuration)  # gRPC wraps it
    return ModelFacts(
        name=str(said.get("name") or ""),
        versions=tuple(map(str, versions)) if isinstance(versions, list) else (),
        platform=str(said.get("platform") or ""),
        inputs=_tensors(said.get("inputs"), "input"),
        outputs=_tensors(said.get("outputs"), "output"),
        max_batch=_max_batch(configuration),
        parameters={**_parameters(configuration), **_parameters(said)},
    )


def _mapping(said: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        raise AnswerError(f"{what} is not a JSON object")
    return said


def _tensors(rows: Any, kind: str) -> tuple[LiveTensor, ...]:
    try:
        return tuple(
            LiveTensor(str(row["name"]), str(row["datatype"]), tuple(int(n) for n in row.get("shape") or ()))
            for row in rows or ()
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise AnswerError(f"the model's metadata describes its {kind}s in a way of its own") from error


def _max_batch(configuration: Any) -> int | None:
    try:
        size = int(configuration["max_batch_size"])
    except (KeyError, OverflowError, TypeError, ValueError):
        return None
    return size if size > 0 else None


def _parameters(said: Any) -> dict[str, str]:
    """Those of our own metadata, or of a configuration, where each has a ``string_value``."""
    found = said.get("parameters") if isinstance(said, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {
        str(key): str(value.get("string_value", "") if isinstance(value, Mapping) else value)
        for key, value in found.items()
    }
