"""A precision that may be missing: the bundle is whole without it, and why it is missing is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.small_bundles import siblings
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.errors import ParityError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export

# An absolute bound that fp32 keeps and bf16 does not.
REQUEST = ExportRequest(
    model="digits", precisions=("fp32", "bf16"), formats=("onnx",), atol=1e-3, fallback=False, command="test"
)


@pytest.mark.slow
def test_what_fails_is_left_out_and_told(target: Path) -> None:
    failures: dict[ArtifactPrecision, str] = {}
    bundle = run_export(REQUEST, target, failures=failures)
    assert list(failures) == ["bf16"]
    assert failures["bf16"].startswith("bf16 does not compute what the checkpoint computes: ")
    assert [artifact.name for artifact in bundle.manifest.artifacts] == ["onnx-fp32"]
    assert {record.artifact for record in bundle.manifest.parity} == {"onnx-fp32"}
    assert {path.name for path in target.iterdir()} == {
        "manifest.json", "weights.safetensors", "golden.safetensors", "model.onnx"
    }  # fmt: skip
    bundle.verify()


@pytest.mark.slow
def test_where_it_must_be_there_nothing_is_left(target: Path) -> None:
    with pytest.raises(ParityError, match="bf16 does not compute"):
        run_export(REQUEST, target)
    assert not target.parent.exists() or siblings(target) == []


@pytest.mark.slow
def test_the_first_precision_must_not_fail(target: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ParityError, match="fp32 does not compute"):
        run_export(replace(REQUEST, atol=1e-12), target, failures={})
