"""The OpenAPI document says what the server does: schemathesis asks everything it allows and forbids."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.asgi import application
from tests.helpers.live_server import Live, serving
from vitdeploy.server import http

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
    assert re.search(r"Operations: +21 selected / 22 total", said), said
    generated = re.search(r"(\d+) generated", said)
    assert generated
    assert int(generated[1]) > 700
    assert own.ask("GET", "/v2/health/ready").status == 200


@pytest.mark.slow
def test_schemathesis_unloads(own: Live, tmp_path: Path) -> None:
    """By itself: what is unloaded is unavailable afterwards, as it should be."""
    schemathesis(own, tmp_path, "--max-examples", "50", "--include-path-regex", "unload$")


def test_every_path_is_documented(linear: Path) -> None:
    async def main() -> None:
        async with application(linear) as served:
            document = (await served.ask("GET", "/openapi.json")).document
            assert document["openapi"].startswith("3.1")
            documented = {
                (method.upper(), path)
                for path, operations in document["paths"].items()
                for method in operations
            }
            routes = {
                (method, re.sub(r":name\b", "", route.path))
                for route in http.routed(served.service).routes
                for method in route.methods - {"HEAD"}
                if route.path not in PAGES
            }
            assert documented == routes
            parameters = document["paths"]["/v2/models/{model}/infer"]["post"]["parameters"]
            assert parameters[0]["schema"]["examples"] == ["linear"]

    asyncio.run(main())
