"""``vitdeploy package``: what it prints, its exit codes, and that a refusal leaves nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import Run, in_a_process
from tests.helpers.small_bundles import flip, siblings
from vitdeploy.bundle.folder import Bundle


def test_text(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    result = run("package", bundle.root, "--target", "triton-server", "-o", tmp_path / "out dir")
    assert (result.code, result.err) == (0, "")
    assert "models/linear/config.pbtxt" in result.out
    assert "onnx-fp32 of the bundle" in result.out
    head, _, tail = result.out.partition("next\n")
    assert head
    assert [line.split()[0] for line in tail.splitlines()] == ["docker", "vitdeploy"]
    assert f"'{tmp_path / 'out dir'}/compose.yaml'" in tail


def test_json(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("package", bundle.root, "--target", "docker", "-o", out, "--json", "--model-version", 3)
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert document["ok"] is True
    assert {key: document[key] for key in ("folder", "target", "name", "version", "artifact")} == {
        "folder": str(out),
        "target": "docker",
        "name": "linear",
        "version": 3,
        "artifact": "onnx-fp32",
    }
    for file in document["files"]:
        assert (out / file["path"]).stat().st_size == file["size"]
    assert document["next"]
    assert json.loads((out / "vitdeploy-package.json").read_text())["target"] == "docker"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, code, message",
    [
        ([], 2, "missing option '--target'"),
        (["--target", "triton"], 2, "did you mean 'triton-server'"),
        (["--target", "triton-server", "--name", "../up"], 2, "cannot be a model's name"),
        (["--target", "triton-server", "--name", "/etc"], 2, "cannot be a model's name"),
        (["--target", "triton-server", "--model-version", "0"], 2, "version 0"),
        (["--target", "triton-server", "--model-version", "x"], 2, "takes a whole number"),
        (["--target", "triton-server", "--device", "cuda"], 2, "unknown device 'cuda'"),
        (["--target", "triton-server", "--max-batch", "99"], 2, "verified up to 8"),
        (["--target", "triton-server", "--artifact", "int8"], 2, "has no artifact 'int8'"),
        (["--target", "triton-server", "--storage-uri", "s3://a"], 2, "takes no --storage-uri"),
        (["--target", "kserve"], 2, "needs --storage-uri"),
        (["--target", "kserve", "--storage-uri", "nowhere"], 2, "not an address"),
        (["--target", "docker", "--top-k", "3"], 2, "takes no --top-k"),
        (["--target", "docker", "--backend", "openvion"], 2, "did you mean 'openvino'"),
        (["--target", "docker", "--wheel", "none.whl"], 2, "no such file"),
    ],
)
def test_refusals(
    run: Run, bundle: Bundle, tmp_path: Path, flags: list[str], code: int, message: str
) -> None:
    result = run("package", bundle.root, "-o", tmp_path / "out", *flags)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert siblings(tmp_path / "out") == ["linear.bundle"]


def test_refusals_as_json(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("package", bundle.root, "-o", tmp_path / "out", "--target", "docker", "--json")
    assert result.code == 2
    assert result.document["ok"] is False
    assert result.document["error"]["hint"] == "--force replaces an earlier package"


def test_a_damaged_bundle(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    flip(bundle.root / "model.fp16.onnx", 100, 1)
    result = run("package", bundle.root, "-o", tmp_path / "out", "--target", "docker")
    assert result.code == 2
    assert "model.fp16.onnx changed after it was written" in result.err
    assert siblings(tmp_path / "out") == ["linear.bundle"]


def test_no_bundle(run: Run, tmp_path: Path) -> None:
    result = run("package", tmp_path, "-o", tmp_path / "out", "--target", "docker")
    assert result.code == 2
    assert "is not a bundle" in result.err


def test_a_missing_library(run: Run, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    result = run("package", bundle.root, "-o", tmp_path / "out", "--target", "triton-server")
    assert result.code == 3
    assert 'pip install "vitdeploy[package]"' in result.err
    assert siblings(tmp_path / "out") == ["linear.bundle"]


def test_a_foreign_name_is_said(run: Run, tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b.bundle", name="google/vit\x1b[31m")
    result = run("package", made.root, "-o", tmp_path / "out", "--target", "docker")
    assert result.code == 0
    assert "note: the model is named google_vit_31m" in result.out
    assert "\x1b" not in result.out


@pytest.mark.slow
def test_packaging_needs_no_torch(bundle: Bundle, tmp_path: Path) -> None:
    for target in ("triton-server", "docker"):
        result = in_a_process(
            "package", bundle.root, "-o", tmp_path / target, "--target", target, PYTHONPROFILEIMPORTTIME="1"
        )
        assert result.code == 0, result.err
        loaded = set(re.findall(r"\| +(\w+)$", result.err, re.MULTILINE))
        assert "numpy" in loaded
        assert loaded.isdisjoint({"torch", "onnxruntime", "transformers"})


def test_the_examples_are_in_the_help(run: Run) -> None:
    result = run("package", "--help")
    assert result.code == 0
    for target in ("triton-server", "kserve", "docker", "ray"):
        assert f"--target {target}" in result.out
