"""The Open Inference Protocol's REST document, asked of a server by schemathesis.

What it promises is written down here in words of our own: its paths, which fields an answer must have and of
which types. Its path parameters are a model that is served. Source:
github.com/kserve/open-inference-protocol, specification/protocol/open_inference_rest.yaml (Apache-2.0).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.live_server import Live

MODEL = "/v2/models/linear/versions/1"


def fields(required: str, **properties: Any) -> dict[str, Any]:
    """An object, and which of its fields must be there."""
    return {"type": "object", "properties": properties, "required": required.split()}


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, WHOLE, ANYTHING = {"type": "string"}, {"type": "integer"}, {"type": "object"}
DATA = several(
    {"anyOf": [{"$ref": "#/components/schemas/data"}, {"type": "number"}, TEXT, {"type": "boolean"}]}
)
TENSOR = {"name": TEXT, "datatype": TEXT, "shape": several(WHOLE)}
SENT = fields(
    "name shape datatype data", **TENSOR, parameters=ANYTHING, data={"$ref": "#/components/schemas/data"}
)
METADATA = several(fields("name datatype shape", **TENSOR))
SERVER = fields("name version extensions", name=TEXT, version=TEXT, extensions=several(TEXT))
DESCRIPTION = fields(
    "name platform", name=TEXT, versions=several(TEXT), platform=TEXT, inputs=METADATA, outputs=METADATA
)
REQUEST = fields(
    "inputs",
    id=TEXT,
    parameters=ANYTHING,
    inputs=several(SENT),
    outputs=several(fields("name", name=TEXT, parameters=ANYTHING)),
)
ANSWER = fields(
    "model_name outputs",
    model_name=TEXT,
    model_version=TEXT,
    id=TEXT,
    parameters=ANYTHING,
    outputs=several(SENT),
)
ERROR = fields("error", error=TEXT)


def json_of(schema: dict[str, Any], description: str = "as documented") -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def getting(answer: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"get": {"responses": {"200": answer, **others}}}


DOCUMENT = {
    "openapi": "3.0.0",
    "info": {"title": "Open Inference Protocol", "version": "2.0"},
    "paths": {
        "/v2/health/live": getting({"description": "it lives"}),
        "/v2/health/ready": getting({"description": "it is ready"}),
        f"{MODEL}/ready": getting({"description": "the model is ready"}),
        "/v2/": getting(json_of(SERVER), **{"400": json_of(ERROR)}),
        MODEL: getting(json_of(DESCRIPTION)),
        f"{MODEL}/infer": {
            "post": {
                "requestBody": {"content": {"application/json": {"schema": REQUEST}}},
                "responses": {"200": json_of(ANSWER), "400": json_of(ERROR)},
            }
        },
    },
    "components": {"schemas": {"data": DATA}},
}
# No schema can say which names, shapes and numbers of elements go together.
CONFIG = """
[[operations]]
include-path-regex = "/infer$"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400]
"""


@pytest.mark.slow
def test_schemathesis_finds_the_protocol(live: Live, tmp_path: Path) -> None:
    document, config = tmp_path / "protocol.json", tmp_path / "schemathesis.toml"
    document.write_text(json.dumps(DOCUMENT))
    config.write_text(CONFIG)
    program = Path(sys.executable).with_name("schemathesis")
    flags = ("--no-color", "--continue-on-failure", "--generation-database", "none", "--seed", "1")
    done = subprocess.run(
        [
            program,
            "--config-file",
            config,
            "run",
            document,
            "--url",
            live.url,
            *flags,
            "--max-examples",
            "60",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert re.search(r"Operations: +6 selected / 6 total", done.stdout), done.stdout
    live.require_well()


def test_the_server_s_name_with_and_without_a_slash(live: Live) -> None:
    replies = [live.ask("GET", path) for path in ("/v2", "/v2/")]
    assert [reply.status for reply in replies] == [200, 200]
    assert replies[0].document == replies[1].document
    assert replies[1].document["name"] == "vitdeploy"
    assert live.ask("POST", "/v2/").status == 405
