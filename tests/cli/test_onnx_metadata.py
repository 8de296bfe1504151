"""What an exported ONNX file says of itself: other programs read these keys, so they are listed here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import onnx
import pytest

from tests.helpers.bundles import WEIGHT, graph
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from tests.helpers.paths import ORACLES, ROOT
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Preprocess

FIRST = ["vitdeploy.input", "vitdeploy.precision"]
"""All that the first bundles had."""
MODEL = [*FIRST, "vitdeploy.labels", "vitdeploy.output", "vitdeploy.scores"]
IMAGES = [f"vitdeploy.{field.name}" for field in dataclasses.fields(Preprocess)]


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.slow
@pytest.mark.parametrize("name, precision", [("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")])
def test_keys_of_an_export(digits: Exported, name: str, precision: str) -> None:
    """The values that the manifest has, as any program may read them."""
    found = metadata(digits.folder / name)
    manifest = Bundle.open(digits.folder).manifest
    spec = manifest.preprocess
    assert spec is not None
    stated = [f"vitdeploy.{name}" for name, value in dataclasses.asdict(spec).items() if value is not None]
    assert sorted(found) == sorted([*MODEL, *stated])
    assert found["vitdeploy.precision"] == precision
    assert (found["vitdeploy.input"], found["vitdeploy.output"]) == ("float", "logits")
    assert found["vitdeploy.scores"] == "softmax"
    assert json.loads(found["vitdeploy.labels"]) == [str(digit) for digit in range(10)]
    assert json.loads(found["vitdeploy.size"]) == [32, 32]
    assert json.loads(found["vitdeploy.mean"]) == list(spec.mean)
    assert json.loads(found["vitdeploy.rescale"]) == spec.rescale
    assert found["vitdeploy.resample"] == spec.resample


@pytest.mark.slow
def test_a_lone_file_in_the_words_for_its_bundle(run: Run, digits: Exported, tmp_path: Path) -> None:
    lone = tmp_path / "model.onnx"
    lone.write_bytes((digits.folder / "model.onnx").read_bytes())
    ours, bundle = run("inspect", lone).out.splitlines(), run("inspect", digits.folder).out.splitlines()
    for word in ("labels", "scores", "resize", "rescale", "mean", "std", "input"):
        (said,) = [line.partition("  [from")[0] for line in bundle if line.startswith(f"{word} ")]
        assert said in ours
    assert not any(line.startswith("vitdeploy.") for line in ours)
    said = run("inspect", lone, "--json").document["said"]
    assert said["labels"] == [str(digit) for digit in range(10)]
    assert said["preprocess"]["size"] == [32, 32]


def test_somebody_else_s_keys(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "yolo.onnx"
    model = onnx.load_from_string(graph("fp32", "float", WEIGHT))
    said = {"names": "{0: 'cat', 1: 'dog'}", "task": "classify", "imgsz": "[8, x]", "args": "a" * 1000}
    onnx.helper.set_model_props(model, said)
    onnx.save(model, path)
    out = run("inspect", path).out
    assert "labels       2: cat, dog\n" in out
    assert "note         imgsz in its metadata is no height and width\n" in out
    assert "task         classify\n" in out
    assert f"args         {'a' * 200}...\n" in out


def test_keys_of_recorded_bundles() -> None:
    files = sorted((ORACLES / "bundles").glob("*/model*.onnx"))
    assert files
    for path in files:
        assert sorted(metadata(path)) == FIRST


def test_keys_are_documented() -> None:
    text = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    documented = [
        key
        for row in re.findall(r"^\| (`vitdeploy\.[^|]*) \|", text, re.MULTILINE)
        for key in re.findall(r"`(vitdeploy\.[a-z_]+)`", row)
    ]
    assert sorted(documented) == sorted([*MODEL, *IMAGES])
