"""The OpenAPI document says what the server does: schemathesis asks everything it allows and forbids."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import vitdeploy
from tests.helpers.asgi import application
from tests.helpers.live_server import Live, serving
from vitdeploy.server import http
from vitdeploy.server.codec import WIRE

CONFIG = Path(__file__).with_name("schemathesis.toml")
PAGES = {"/", "/docs", "/openapi.json", "/favicon.ico"}
"""For people, and the document itself."""


@pytest.fixture
def own(linear: Path, twice: Path) -> Iterator[Live]:
    with serving(linear, f"both={linear}", f"both={twice}") as server:
        yield server


def schemathesis(server: Live, folder: Path, *flags: str) -> str:
    """Run it with valid and invalid data and all of its checks; returns what it said."""
    program = Path(sys.executable).with_name("schemathesis")
    general = ("--no-color", "--continue-on-failure", "--generation-database", "none", "--seed", "1")
    done = subprocess.run(
        [program, "--config-file", CONFIG, "run", f"{server.url}/openapi.json", *general, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    server.require_well()
    return done.stdout


@pytest.mark.slow
def test_schemathesis(own: Live, tmp_path: Path) -> None:
    said = schemathesis(own, tmp_path, "--max-examples", "30", "--exclude-path-regex", "unload$")
    assert re.search(r"Operations: +25 selected / 26 total", said), said
    generated = re.search(r"(\d+) generated", said)
    assert generated
    assert int(generated[1]) > 700
    assert own.ask("GET", "/v2/health/ready").status == 200


@pytest.mark.slow
def test_schemathesis_unloads(own: Live, tmp_path: Path) -> None:
    """By itself: what is unloaded is unavailable afterwards, as it should be."""
    schemathesis(own, tmp_path, "--max-examples", "50", "--include-path-regex", "unload$")


def test_every_path_is_documented(linear: Path, twice: Path) -> None:
    """The document is a file: every route is in it and no other; what only the code knows is filled in."""

    async def main() -> None:
        async with application(f"b={linear}", f"a={twice}", f"a={linear}") as served:
            document = (await served.ask("GET", "/openapi.json")).document
            routes = http.starlette_application(served.service).routes
        documented = {
            (method.upper(), path) for path, operations in document["paths"].items() for method in operations
        }
        assert documented == {
            (method, re.sub(r":name\b", "", route.path))
            for route in routes
            for method in route.methods - {"HEAD"}
            if route.path not in PAGES
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                named = [resolved(document, p) for p in operation.get("parameters", ())]
                assert re.findall(r"{(\w+)}", path) == [p["name"] for p in named if p["in"] == "path"]
        model = resolved(document, document["paths"]["/v2/models/{model}/infer"]["post"]["parameters"][0])
        assert model["schema"]["examples"] == ["a", "b"]
        assert document["info"]["version"] == vitdeploy.__version__

    asyncio.run(main())


def resolved(document: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a reference within the document refers to."""
    found: Any = document
    for key in part["$ref"].removeprefix("#/").split("/"):
        found = found[key]
    return dict(found)


def test_datatypes_are_those_of_the_codec() -> None:
    document = json.loads(resources.files("vitdeploy.server").joinpath("openapi.json").read_text())
    datatypes = document["components"]["schemas"]["Tensor"]["properties"]["datatype"]["enum"]
    assert datatypes == [*WIRE.values(), "BYTES"]
