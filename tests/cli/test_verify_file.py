"""``vitdeploy verify FILE -m CHECKPOINT``: exit codes, what is printed, JSON."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from PIL import Image

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from tests.helpers.strangers import LABELS, Strangers, change_weight, edit_json, edited
from vitdeploy.bundle.folder import Bundle
from vitdeploy.data import digits_folder, digits_heldout


@pytest.mark.slow
def test_a_plain_export(run: Run, strangers: Strangers) -> None:
    result = run("verify", strangers.torchscript(17), "-m", strangers.checkpoint)
    assert result.code == 0
    name = "torchscript_17.onnx"
    rows = [line for line in result.out.splitlines() if line.startswith(f"{name}  onnxruntime")]
    assert len(rows) == 2
    assert all(row.endswith("ok") for row in rows)
    assert f"not checked: {name}: labels: the file states none" in result.out
    assert f"not checked: {name}: preprocessing: the file states none" in result.out
    last = f"{strangers.torchscript(17)}: against {strangers.checkpoint}: 4 checks held, 2 not made"
    assert result.out.splitlines()[-1] == last


@pytest.mark.slow
def test_a_folder_with_a_fault(run: Run, strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.transformers_js(tmp_path / "js")
    edit_json(folder / "config.json", id2label=LABELS | {"3": "owl"})
    result = run("verify", folder, "--model", strangers.checkpoint, "--batch", "4")
    assert result.code == 5
    assert result.out.count("FAILED") == 3
    assert "onnx/model_quantized.onnx  labels" in result.out
    # What lies beside three files is one thing that is wrong.
    said = "onnx/model.onnx and 2 more: labels: id2label in config.json: class 3 is 'owl'"
    assert said in result.err.splitlines()[-1]
    assert "against" not in result.out.splitlines()[-1]
    document = run("verify", folder, "-m", strangers.checkpoint, "--json").document
    assert document["ok"] is False
    assert document["unproven"] == ["onnx/model_quantized.onnx"]
    assert document["error"]["kind"] == "ParityError"
    assert len(document["error"]["message"]) <= 400 + len(str(folder)) + len(str(strangers.checkpoint))
    assert {f["check"] for f in document["findings"] if f["state"] == "failed"} == {"labels"}


@pytest.mark.slow
def test_only_a_quantised_file_is_not_called_proven(run: Run, strangers: Strangers, tmp_path: Path) -> None:
    file = strangers.transformers_js(tmp_path / "js") / "onnx/model_quantized.onnx"
    result = run("verify", file, "-m", strangers.checkpoint)
    assert result.code == 0
    assert result.out.endswith("; quantised, so not proven: model_quantized.onnx\n")


@pytest.mark.slow
def test_accuracy(run: Run, digits: Exported, tmp_path: Path) -> None:
    """The digits model with a spoilt head, on images that its training has not seen."""
    pixels, labels = digits_heldout()
    (tmp_path / "data").mkdir()
    for index, label in enumerate(labels[:60]):
        Image.fromarray(pixels[index]).save(tmp_path / f"data/{label}_{index}.png")
    sound = digits.folder / "model.fp16.onnx"
    flags = ("-m", "digits", "--data", tmp_path / "data", "--max-drop", "1")
    result = run("verify", sound, *flags)
    assert result.code == 0
    assert "reference        torch" in result.out
    assert "accuracy" in result.out
    assert "within the 1 allowed" in result.out

    def spoil(model: onnx.ModelProto) -> None:
        change_weight(model, "head.bias", by=8, elements=3)

    weights = digits_folder() / "model.safetensors"
    assert run("verify", sound, "--checkpoint", weights).code == 0
    spoilt = edited(digits.folder / "model.onnx", tmp_path / "spoilt.onnx", spoil)
    result = run("verify", spoilt, *flags, "--json")
    assert result.code == 5
    failed = {f["check"]: f["detail"] for f in result.document["findings"] if f["state"] == "failed"}
    assert failed.keys() == {"parity", "weights", "accuracy"}
    assert "more than the 1 allowed" in failed["accuracy"]
    assert failed["weights"].startswith("differs: head.bias, 3 of 10 elements")
    reference, model = result.document["accuracy"]
    assert reference["top1_difference"] == 0 > model["top1_difference"]


@pytest.mark.parametrize(
    "flags, message, hint",
    [
        ((), "is no bundle; a file is held against the checkpoint that it was made from", "-m CHECKPOINT"),
        (("-m", "digits", "--backend", "openvino"), "--backend is about a bundle", "leave --backend out"),
        (("-m", "digits", "--provider", "cuda"), "--provider is about a bundle", "leave --provider out"),
        (("-m", "digits", "--max-drop", "1"), "--max-drop is measured on labelled images", "--data DIR"),
        (("-m", "digits", "--version", "1"), "--version is about a live server", "--url"),
        (
            ("--checkpoint", "x.safetensors", "--url", "http://a:1"),
            "--checkpoint is about how this machine",
            "--url",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    run: Run, bundle: Bundle, flags: tuple[str, ...], message: str, hint: str
) -> None:
    result = run("verify", bundle.root / "model.onnx", *flags)
    assert result.code == 2
    error, said = result.err.splitlines()
    assert message in error
    assert hint in said


def test_a_folder_of_files_without_a_checkpoint(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.onnx").write_bytes((bundle.root / "model.onnx").read_bytes())
    result = run("verify", tmp_path / "files")
    assert result.code == 2
    assert result.err.splitlines()[-1] == f"hint: vitdeploy verify {tmp_path / 'files'} -m CHECKPOINT"


def test_a_bundle_with_a_checkpoint(run: Run, tmp_path: Path) -> None:
    result = run("verify", write_bundle(tmp_path / "b").root, "-m", "digits")
    assert result.code == 2
    assert "is a bundle, which carries its own reference" in result.err


def test_a_drop_without_images(run: Run, bundle: Bundle) -> None:
    result = run("verify", bundle.root, "--max-drop", "0.5", "--json")
    assert result.code == 2
    assert result.document["error"]["hint"] == "--data DIR"
