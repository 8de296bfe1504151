"""KServe's unmodified clients get right answers: REST in JSON and binary, and gRPC."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import answer
from tests.helpers.kserve import in_kserve_python
from tests.helpers.live_server import Live

# Reads pixels (N, 3, 8, 8) as nested lists; prints what each way of asking gives.
_SCRIPT = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

url, grpc = sys.argv[1:]
pixels = np.array(json.load(sys.stdin), np.float32)

def request(binary_input, parameters=None, outputs=None):
    tensor = InferInput("pixel_values", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary_input)
    return InferRequest("linear", [tensor], "an id", parameters=parameters, request_outputs=outputs)

async def main():
    client, answers, seen = InferenceRESTClient(RESTConfig(protocol="v2")), {}, {}
    ways = {
        "json": request(False),
        "binary in": request(True),
        "binary in and out": request(True, {"binary_data_output": True}),
        "json in, binary out": request(False, outputs=[RequestedOutput("logits", {"binary_data": True})]),
    }
    for name, asked in ways.items():
        headers = {}
        answer = await client.infer(url, asked, model_name="linear", response_headers=headers)
        named = answer.model_name, answer.id  # the client itself drops the version
        assert named == ("linear", "an id"), named
        answers[name] = answer.outputs[0].as_numpy().tolist()
        seen[name] = headers["content-type"]
    try:
        await client.infer(url, ways["json"], model_name="nothing")
    except Exception as error:
        seen["unknown model"] = str(error)
    seen["ready"] = [
        await client.is_server_live(url),
        await client.is_server_ready(url),
        await client.is_model_ready(url, "linear"),
    ]
    async with InferenceGRPCClient(grpc) as remote:
        answer = await remote.infer(request(True))
        answers["gRPC"] = answer.outputs[0].as_numpy().tolist()
        seen["gRPC ready"] = [
            await remote.is_server_live(),
            await remote.is_server_ready(),
            await remote.is_model_ready("linear"),
        ]
    json.dump({"answers": answers, "seen": seen}, sys.stdout)

asyncio.run(main())
"""


@pytest.mark.slow
def test_kserve_s_clients(live: Live) -> None:
    pixels = np.random.default_rng(4).normal(size=(3, 3, 8, 8)).astype(np.float32)
    found: dict[str, Any] = in_kserve_python(_SCRIPT, live.url, live.grpc, stdin=json.dumps(pixels.tolist()))
    assert len(found["answers"]) == 5
    for way, logits in found["answers"].items():
        np.testing.assert_allclose(logits, answer(pixels), rtol=1e-5, atol=1e-5, err_msg=way)
    seen = found["seen"]
    assert seen["json"] == seen["binary in"] == "application/json"
    assert seen["binary in and out"] == seen["json in, binary out"] == "application/octet-stream"
    assert seen["ready"] == seen["gRPC ready"] == [True, True, True]
    assert "nothing" in seen["unknown model"]
    assert "404" in seen["unknown model"]
