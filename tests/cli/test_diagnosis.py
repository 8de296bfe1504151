"""What ``vitdeploy doctor`` gathers."""

from __future__ import annotations

import json

from vitdeploy.backends.base import all_backends, backend_names
from vitdeploy.cli.diagnosis import diagnose
from vitdeploy.machine.identity import LIBRARIES


def test_this_machine() -> None:
    found = diagnose()
    assert [backend.name for backend in found.backends] == list(backend_names())
    assert all(backend.available or backend.reason for backend in found.backends)
    libraries = {library for backend in all_backends() for library in backend.traits.libraries}
    assert found.libraries.keys() == {*LIBRARIES, *libraries}
    assert {
        "onnxruntime",
        "torch",
        "openvino",
        "tensorrt",
        "tensorrt-rtx",
        "cuda-core",
        "triton",
    } <= libraries
    assert found.libraries["numpy"]
    assert "CPUExecutionProvider" in found.providers
    assert found.free_disk > 0
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["cpu"]["threads"] >= 1
