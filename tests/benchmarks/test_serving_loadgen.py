"""What LoadGen says is read as it says it; the summaries beside are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import environments
from benchmarks.serving.connections import whole_request
from benchmarks.serving.mlperf import ENVIRONMENT, accuracy_of, read_summary
from benchmarks.serving.subjects import Subject
from vitdeploy.bundle.folder import Bundle

SUMMARIES = Path(__file__).parent / "loadgen"


def summary(name: str) -> dict[str, Any]:
    return read_summary((SUMMARIES / f"{name}.txt").read_text(encoding="utf-8"))


def test_summaries_of_all_scenarios() -> None:
    assert summary("single_stream") == {
        "valid": True,
        "reasons": [],
        "per_s": 592.78,
        "latency_ms": {"50": 1.09, "90": 3.821, "99": 5.968},
    }
    assert summary("offline")["per_s"] == 1579.24
    assert summary("server") == {
        "valid": False,
        "reasons": ["performance constraints", "early stopping"],
        "per_s": 1306.88,
        "latency_ms": {"50": 586.952, "90": 1146.445, "99": 1256.912},
    }


def subject(bundle: Bundle) -> Subject:
    golden, artifact = bundle.golden(), bundle.artifact("fp32")
    return Subject("digits", bundle, artifact, golden["pixel_values"], golden["reference"])


def entry(index: int, data: bytes) -> dict[str, Any]:
    return {"seq_id": index, "qsl_idx": index, "data": data.hex().upper()}


def test_accuracy_is_held_against_the_reference(digits_onnx: Path) -> None:
    asked = subject(Bundle.open(digits_onnx))
    count = len(asked.pixels)
    binary = [entry(i, row.astype("<f4").tobytes()) for i, row in enumerate(asked.reference)]
    right = {"samples": count, "answered": count, "wrong": ""}
    assert accuracy_of(binary[::-1], asked) == right
    texts = [entry(i, f'{{"logits": {row.tolist()}}}'.encode()) for i, row in enumerate(asked.reference)]
    assert accuracy_of(texts, asked) == right
    off = np.roll(asked.reference[1], 1).astype("<f4").tobytes()
    wrong = accuracy_of([binary[0], entry(1, off), *binary[2:]], asked)
    assert "relative error" in wrong["wrong"]
    for nothing in (b"", b'{"labels": ["3"]}', b"no answer"):
        found = accuracy_of([entry(0, nothing), *binary[1:]], asked)
        assert found == {"samples": count, "answered": count - 1, "wrong": "1 not answered"}


def test_a_request_is_put_together_once() -> None:
    request = whole_request("127.0.0.1", 80, "/v2", {"Inference-Header-Content-Length": "2"}, b"{}data")
    head, _, body = request.partition(b"\r\n\r\n")
    assert body == b"{}data"
    assert head.splitlines() == [
        b"POST /v2 HTTP/1.1",
        b"Host: 127.0.0.1:80",
        b"Inference-Header-Content-Length: 2",
        b"Content-Length: 6",
    ]


@pytest.mark.parametrize("name", environments.NAMES)
def test_every_environment_is_pinned(name: str) -> None:
    lines = environments.requirements(name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert all("==" in line for line in lines[1:])
    assert ENVIRONMENT in environments.NAMES
