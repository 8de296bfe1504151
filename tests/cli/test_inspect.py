"""``vitdeploy inspect``: a bundle, an ONNX file of ours, an ONNX file of somebody else's."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import vitdeploy
from tests.helpers.bundles import FEATURES, WEIGHT, graph, write_bundle
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from tests.helpers.quantised_bundles import record, write_quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import FactSource, Provenance
from vitdeploy.cli.summary import quantisation_line
from vitdeploy.config import Preprocess


def test_a_bundle(run: Run, digits: Exported) -> None:
    result = run("inspect", digits.folder)
    assert (result.code, result.err) == (0, "")
    for text in (
        "depth 4",
        "10: 0, 1, 2",
        "model.fp16.onnx",
        "absorb_last_block",
        "normalisations fp32 (declared)",
    ):
        assert text in result.out
    assert result.out.count(" ok\n") == len(Bundle.open(digits.folder).manifest.parity) >= 6
    assert "LayerNormalization" in result.out


def test_a_bundle_as_json(run: Run, digits: Exported) -> None:
    document = run("inspect", digits.folder, "--json").document
    assert document["ok"] is True
    assert document["manifest"]["name"] == "digits"
    assert document["operators"].keys() == {"onnx-fp32", "onnx-fp16"}
    nodes = {a["name"]: a["nodes"] for a in document["manifest"]["artifacts"]}
    assert {name: sum(counts.values()) for name, counts in document["operators"].items()} == nodes


def test_several_outputs(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b.bundle", features=FEATURES)
    report = vitdeploy.verify(bundle, backends=["onnxruntime"])
    lines = run("inspect", bundle.add(parity=report.parity).root).out.splitlines()
    assert "output       logits float32 (N, 5)" in lines
    assert "output       features float32 (N, 7)" in lines
    (heads,) = [line.split() for line in lines if line.startswith("artifact") and "relative" in line]
    assert heads[:4] == ["artifact", "backend", "batch", "output"]
    rows = [line.split()[:4] for line in lines if line.startswith("onnx-fp32") and line.endswith(" ok")]
    assert ["onnx-fp32", "onnxruntime", "8", "features"] in rows
    assert len(rows) == 6


def test_every_fact_with_its_origin(run: Run, tmp_path: Path) -> None:
    spec = Preprocess(size=(8, 8), resize="shortest_edge", resize_edge=9, mean=(0.1, 0.2, 0.3), exif=True)
    facts: dict[str, FactSource] = {"preprocess": "checkpoint", "mean": "user", "labels": "user"}
    made = Provenance(source="linear", family="test", facts=facts | {"scores": "default"})
    bundle = write_bundle(tmp_path / "b.bundle", preprocess=spec, provenance=made)
    lines = run("inspect", bundle.root).out.splitlines()
    for line in (
        "input        pixel_values float32 (N, 3, 8, 8)",
        "output       logits float32 (N, 5)",
        "scores       softmax  [from a default]",
        "turn         as the EXIF orientation says  [from the checkpoint]",
        "resize       shorter side to 9  [from the checkpoint]",
        "crop         8x8 from the middle, an odd margin rounded down  [from the checkpoint]",
        "resample     bilinear  [from the checkpoint]",
        "rescale      by 1/255  [from the checkpoint]",
        "mean         0.1, 0.2, 0.3  [from you]",
        "std          0.5, 0.5, 0.5  [from the checkpoint]",
    ):
        assert line in lines
    assert any(line.startswith("labels") and line.endswith("[from you]") for line in lines)


def test_an_onnx_file(run: Run, bundle: Bundle) -> None:
    out = run("inspect", bundle.root / "model.fp16.onnx").out
    assert "pixel_values float32 (N, 3, 8, 8)" in out
    assert "1 GEMM fp16" in out
    assert "opset        20" in out
    document = run("inspect", bundle.root / "model.fp16.onnx", "--json").document
    assert document["operators"] == {"Cast": 3, "Flatten": 1, "MatMul": 1}
    assert document["precision"] == [{"kind": "GEMM", "dtype": "fp16", "count": 1, "declared_island": False}]
    assert document["inputs"] == [{"name": "pixel_values", "dtype": "float32", "shape": ["N", 3, 8, 8]}]
    assert document["parameters"] == WEIGHT.size


def test_a_file_that_is_not_from_here(run: Run, tmp_path: Path) -> None:
    model = onnx.load_from_string(graph("fp32", "float", WEIGHT))
    model.producer_name = "somebody \x1b[31m"
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    out = run("inspect", path).out
    assert "somebody \\x1b[31m" in out
    assert "1 GEMM fp32" in out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.onnx", None, "does not exist"),
        ("text.txt", b"text", "neither a bundle nor an .onnx or .plan file"),
        ("junk.onnx", b"\xff\xff\xff", "ONNX file"),
        ("empty.onnx", b"", "ONNX file"),
    ],
)
def test_errors(run: Run, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run("inspect", path)
    assert result.code == 2
    assert message in result.err


def test_a_folder_that_is_no_bundle(run: Run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.code == 2
    assert "is not a bundle" in result.err


def test_what_is_quantised(run: Run, tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8", "fp8"))
    lines = run("inspect", made.root).out.splitlines()
    assert (
        "  model.int8.onnx: 1 of 1 GEMM in int8 (100.0 % of the multiplications), weights of 7 bits, "
        "the rest in fp32; calibrated with 24 images"
    ) in lines
    document = run("inspect", made.root, "--json").document
    assert [a.get("quantisation", {}).get("macs") for a in document["manifest"]["artifacts"]] == [
        None,
        1.0,
        1.0,
    ]


def test_what_is_left_out_of_quantisation() -> None:
    made = record(
        rest="fp16", weight_bits=8, sites=("a", "b"), left_out=("patch_embed",), macs=0.95, attention=True
    )
    assert quantisation_line("fp8", made) == (
        "2 of 3 GEMMs in fp8 (95.0 % of the multiplications), the products of attention, too, "
        "the rest in fp16; calibrated with 24 images; left in fp16: patch_embed"
    )
