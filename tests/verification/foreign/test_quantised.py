"""Our own quantised files, looked at as anybody's: what they say of themselves is no float precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.quantised_bundles import held_out, quantised_graph
from vitdeploy.backends.onnxruntime import open_file
from vitdeploy.verification.foreign.audit import audit_precision
from vitdeploy.verification.foreign.onnx_file import OnnxFile, claim_of_name


def written(folder: Path, kind: Any, metadata: dict[str, str]) -> OnnxFile:
    model = onnx.load_from_string(quantised_graph(kind))
    onnx.helper.set_model_props(model, metadata)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return OnnxFile(path, path.name)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("says", [True, False])
def test_what_a_file_claims(tmp_path: Path, kind: str, says: bool) -> None:
    file = written(tmp_path, kind, {"vitdeploy.precision": kind} if says else {})
    assert file.said.precision == (kind if says else None)
    assert file.claim == ("quantised", "its metadata" if says else "its operators")
    finding = audit_precision(file)
    assert finding.state == "not checked"
    assert "2 DequantizeLinear, 1 QuantizeLinear" in finding.detail
    assert file.has_fp8 == (kind == "fp8")
    session = open_file(file.path, 1, fp8=file.has_fp8)
    (logits,) = session.run(None, {"pixel_values": held_out()["pixel_values"]})
    assert logits.shape == (6, 5)


def test_names() -> None:
    for name in ("model.int8.onnx", "model.fp8.onnx", "model_float8e4m3.onnx", "model.int8-fp16.onnx"):
        assert claim_of_name(Path(name)) == "quantised"
    assert claim_of_name(Path("model.fp16.onnx")) == "fp16"
