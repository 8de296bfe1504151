"""What an exported ONNX file says of itself: other programs read these keys, so they are listed here."""

from __future__ import annotations

import re

import onnx
import pytest

from tests.helpers.exports import Exported
from tests.helpers.paths import ORACLES, ROOT

KEYS = ["vitdeploy.input", "vitdeploy.precision"]


@pytest.mark.slow
@pytest.mark.parametrize("name, precision", [("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")])
def test_keys_of_an_export(digits: Exported, name: str, precision: str) -> None:
    properties = onnx.load(digits.folder / name).metadata_props
    assert sorted((entry.key, entry.value) for entry in properties) == [
        *zip(KEYS, ("float", precision), strict=True)
    ]


def test_keys_of_recorded_bundles() -> None:
    files = sorted((ORACLES / "bundles").glob("*/model*.onnx"))
    assert files
    for path in files:
        assert sorted(entry.key for entry in onnx.load(path).metadata_props) == KEYS


def test_keys_are_documented() -> None:
    text = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(vitdeploy\.[a-z_]+)` \|", text, re.MULTILINE)) == KEYS
