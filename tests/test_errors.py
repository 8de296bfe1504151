"""Errors that cross a process come out as they went in."""

from __future__ import annotations

import json

import pytest

from vitdeploy import errors
from vitdeploy.errors import MissingDependency, VitdeployError

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VitdeployError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_its_record(kind: type[VitdeployError]) -> None:
    if kind is MissingDependency:
        error: VitdeployError = MissingDependency("triton", extra="kernels", purpose="tuning")
    else:
        error = kind("what was wrong", hint="what to do")
    again = VitdeployError.from_dict(json.loads(json.dumps(error.as_dict())))
    assert type(again) is kind
    assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))
    assert again.exit_code == error.exit_code


@pytest.mark.parametrize("kind", ["ValueError", "difflib", "Mapping", ""])
def test_an_unknown_kind_is_a_plain_error(kind: str) -> None:
    error = VitdeployError.from_dict({"kind": kind, "message": "m", "hint": None})
    assert type(error) is VitdeployError
