"""``vitdeploy export``: what is printed, what every flag becomes, and that nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import COMMAND, Run, in_a_process
from tests.helpers.exports import Exported
from vitdeploy.bundle.folder import Bundle
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError
from vitdeploy.exporter import run as exporter
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.progress import Progress


@pytest.mark.slow
def test_a_real_export(digits: Exported) -> None:
    out, err = digits.result.out, digits.result.err
    for text in ("model.onnx", "model.fp16.onnx", "exact rewrites", "absorb_last_block"):
        assert text in out
    assert "GEMMs fp16, 9 normalisations fp32 (declared)" in out
    assert f"vitdeploy verify {digits.folder}" in out
    assert f"vitdeploy predict {digits.folder} IMAGE" in out
    about_engines = [line for line in err.splitlines() if "engine" in line]
    assert about_engines == [
        "  note: no engines for tensorrt and tensorrt-rtx: `vitdeploy engine BUNDLE` says what they need"
    ]
    stages = [line.split()[0] for line in err.splitlines() if "note:" not in line]
    assert stages[:5] == ["load", "reference", "weights", "onnx", "parity"]
    assert stages[-1] == "parity"
    assert "model.fp16.onnx" in err


def test_the_bundle_says_how_it_was_made(digits: Exported) -> None:
    manifest = Bundle.open(digits.folder).manifest
    assert manifest.provenance.command.startswith("vitdeploy ")
    assert "--fp32 --fp16" in manifest.provenance.command


# --- flags ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[ExportRequest, dict[str, Any]]]:
    """What the command asks the exporter for; a bundle comes back at once."""
    seen: list[tuple[ExportRequest, dict[str, Any]]] = []

    def export(request: ExportRequest, folder: Path | None = None, **options: Any) -> Bundle:
        seen.append((request, {"folder": folder, **options}))
        return write_bundle(tmp_path / f"made-{len(seen)}.bundle", precisions=("fp32", "fp16"))

    monkeypatch.setattr(exporter, "run_export", export)
    return seen


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ([], {"precisions": ("fp32",), "batch": BatchRange(1, 8, 32), "opset": 20, "input": "float"}),
        ([], {"model": None, "output": None, "fallback": True, "seed": 0, "formats": ("auto",)}),
        (["--fp16"], {"precisions": ("fp16",)}),
        (["--fp16", "--fp32"], {"precisions": ("fp32", "fp16")}),
        (["--fp32", "--precision", "bf16,fp32"], {"precisions": ("fp32", "bf16")}),
        (["--precision", "fp16, bf16"], {"precisions": ("fp16", "bf16")}),
        (["--batch", "8"], {"batch": BatchRange(8, 8, 8)}),
        (["--batch", "2,4,16"], {"batch": BatchRange(2, 4, 16)}),
        (["--image-size", "384"], {"image_size": (384, 384)}),
        (["--image-size", "224x320"], {"image_size": (224, 320), "further_sizes": ()}),
        (["--image-size", "224,384x320"], {"image_size": (224, 224), "further_sizes": ((384, 320),)}),
        (["--input", "uint8", "--output", "tokens"], {"input": "uint8", "output": "tokens"}),
        (["-m", "B/16", "--checkpoint", "w.npz"], {"model": "B/16", "checkpoint": Path("w.npz")}),
        (["--opset", "17", "--atol", "1e-3", "--seed", "7"], {"opset": 17, "atol": 1e-3, "seed": 7}),
        (["--scores", "sigmoid", "--heads", "3"], {"stated": Stated(scores="sigmoid", heads=3)}),
        (
            ["--labels", "l.txt", "--activation", "relu"],
            {"stated": Stated(labels="l.txt", activation="relu")},
        ),
        (["--preprocess", "clip", "--mean", "0.5"], {"stated": Stated(preprocess="clip", mean=0.5)}),
        (["--std", ".2,.3,.25", "--crop", "0.9"], {"stated": Stated(std=(0.2, 0.3, 0.25), crop=0.9)}),
        (["--resize", "256", "--crop", "224"], {"stated": Stated(resize=256, crop=224)}),
        (["--resize", "256x288", "--resample", "box"], {"stated": Stated(resize=(256, 288), resample="box")}),
        (["--resize", "exact", "--crop", "32x48"], {"stated": Stated(resize="exact", crop=(32, 48))}),
        (["--revision", "v1", "--cache-dir", "c"], {"revision": "v1", "cache_dir": Path("c")}),
        (["--no-fallback", "--format", "onnx"], {"fallback": False, "formats": ("onnx",)}),
        (
            ["--int8", "--calibration", "images", "--weight-bits", "8"],
            {"precisions": ("int8",), "calibration": Path("images"), "weight_bits": 8, "target": None},
        ),
        (
            ["--fp16", "--precision", "fp8", "--calibration", "c", "--for", "tensorrt", "--fp8-attention"],
            {"precisions": ("fp16", "fp8"), "target": "tensorrt", "fp8_attention": True, "weight_bits": 7},
        ),
    ],
    ids=str,
)
def test_flags(run: Run, asked: list[Any], flags: list[str], wanted: dict[str, Any]) -> None:
    assert run("export", *flags).code == 0
    ((request, _),) = asked
    assert {name: getattr(request, name) for name in wanted} == wanted


@pytest.mark.slow
def test_place_and_force(run: Run, asked: list[Any]) -> None:
    run("export", "--output-dir", "some/where", "--force")
    run("export", "-o", "there")
    assert [(options["folder"], options["force"]) for _, options in asked] == [
        (Path("some/where"), True),
        (Path("there"), False),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["-m", "digits", "--int8"], "int8 cannot be without images"),
        (["-m", "digits", "--int8", "--calibration", "nowhere"], "nowhere does not exist"),
        (["-m", "digits", "--int8", "--calibration", "x", "--weight-bits", "9"], "weights of 9 bits"),
        (["-m", "digits", "--fp8", "--calibration", "x", "--opset", "18"], "fp8 is not in opset 18"),
        (["-m", "digits", "--fp16", "--for", "tensorrt"], "--for is for --int8 and --fp8"),
        (["--precision", "fp23"], "unknown precision 'fp23'; did you mean 'fp32'?"),
        (["--format", "onxn"], "unknown format 'onxn'; did you mean 'onnx'?"),
        (["--batch", "8,1,32"], "batch sizes must rise"),
        (["--batch", "1,8"], "MIN,OPT,MAX"),
        (["--batch", "0"], "positive whole numbers"),
        (["--image-size", "big"], "--image-size big"),
        (["--image-size", "0"], "--image-size 0"),
        (["--image-size", "224,"], "--image-size 224,: not a size"),
        (["--image-size", "32,64,32x32"], "the image size 32x32 is named twice"),
        (["-m", "digits", "--image-size", "32,64x33"], "image size 64x33 is not divisible by the patch"),
        (["--opset", "12"], "opset 12"),
        (["--atol", "-1"], "atol"),
        (["-m", "vit_bass_patch16_224"], "did you mean 'vit_base_patch16_224'?"),
        (["-m", "digits", "--input", "unit8"], "did you mean 'uint8'?"),
        (["-m", "digits", "--output", "feature"], "did you mean 'features'?"),
        (["-m", "digits", "--scores", "sigmoyd"], "did you mean 'sigmoid'?"),
        (["-m", "digits", "--output", "tokens", "--scores", "none"], "--scores is what becomes of logits"),
        (["-m", "digits", "--mean", "x"], "--mean x: not numbers"),
        (["-m", "digits", "--mean", "0.1,0.2"], "mean and std must have a number for each channel"),
        (["-m", "digits", "--mean", "123.7,116.3,103.5"], "is of pixels from 0 to 255"),
        (["-m", "digits", "--resize", "big"], "--resize big: not a size in pixels"),
        (["-m", "digits", "--resize", "31"], "leaves less than the 32x32 pixels"),
        (["-m", "digits", "--crop", "1.5"], "--crop 1.5: not a size in pixels"),
        (["-m", "digits", "--crop", "28"], "the crop is what the model reads, 32x32 pixels"),
        (["-m", "digits", "--crop", "0.9", "--resize", "40"], "resize says it too"),
        (["-m", "digits", "--resample", "cubic"], "did you mean 'bicubic'?"),
        (["-m", "digits", "--preprocess", "imagenett"], "did you mean 'imagenet'?"),
        (["-m", "digits", "--labels", "nowhere.txt"], "cannot read nowhere.txt"),
        (["-m", "digits", "--heads", "5"], "width 96 is not divisible by 5 heads"),
        (["-m", "digits", "--activation", "gelu_tan"], "did you mean 'gelu_tanh'?"),
        (["-m", "digits", "--revision", "v1"], "a revision goes with a hub id, not with digits"),
        (["-m", "digits", "--image-size", "33"], "not divisible by the patch"),
        (["-m", "digits", "--checkpoint", "nowhere.safetensors"], "named variant"),
    ],
    ids=str,
)
def test_bad_values(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", *flags)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


# --- what is printed ------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def export(request: ExportRequest, *_: Any, progress: Progress, **__: Any) -> Bundle:
        print("a library says hello")
        progress.note("the weights are random")
        with progress.stage("load") as stage:
            stage.detail, stage.size = "small", 5
        return write_bundle(tmp_path / "made.bundle", precisions=("fp32", "fp16"))

    monkeypatch.setattr(exporter, "run_export", export)
    result = run("export", "--json")
    document = result.document
    assert document["ok"] is True
    assert [a["name"] for a in document["artifacts"]] == ["onnx-fp32", "onnx-fp16"]
    assert document["notes"] == ["the weights are random"]
    assert [(s["name"], s["size"]) for s in document["stages"]] == [("load", 5)]
    for text in ("a library says hello", "note: the weights are random", "load"):
        assert text in result.err


def test_a_fallback_says_why(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "made.bundle")
    half = made.manifest.artifacts[0].model_copy(
        update={
            "precision": "mixed",
            "requested": "fp16",
            "fallback": "fp16 failed: NaN",
            "islands": ("blocks.1.add2",),
        }
    )
    with made.edit() as writer:
        writer.seal(made.manifest.model_copy(update={"artifacts": (half,)}))
        mixed = writer.commit()
    monkeypatch.setattr(exporter, "run_export", lambda *_, **__: mixed)
    assert "model.onnx is mixed, not fp16: fp16 failed: NaN" in run("export", "--fp16").out


def test_parity_errors_exit_5(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> Bundle:
        raise ParityError("model.fp16.onnx is wrong", hint="--bf16")

    monkeypatch.setattr(exporter, "run_export", export)
    result = run("export", "--fp16", "--no-fallback")
    assert result.code == 5
    assert result.err == "error: model.fp16.onnx is wrong\nhint: --bf16\n"


@pytest.mark.slow
def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = in_a_process("export", "-m", "digits", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.code == 3
    assert 'hint: pip install "vitdeploy[export]"' in result.err


# --- dry run --------------------------------------------------------------------------------------------


def test_dry_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", "-m", "digits", "--fp32", "--fp16", "--dry-run")
    assert result.code == 0
    for text in (
        "digits.bundle",
        "model.fp16.onnx",
        "depth",
        "absorb_last_block",
        "pixel_values float32 (N, 3, 32, 32)",
    ):
        assert text in result.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_what_the_export_does(run: Run, digits: Exported, tmp_path: Path) -> None:
    plan = run(
        "export", "-m", "digits", "--fp32", "--fp16", "--dry-run", "--json", "-o", tmp_path / "x"
    ).document
    manifest = Bundle.open(digits.folder).manifest
    assert plan["dry_run"] is plan["ok"] is True
    assert plan["parameters"] == manifest.parameters
    assert plan["flops"] == manifest.flops
    assert plan["rewrites"] == [rewrite.model_dump(mode="json") for rewrite in manifest.rewrites]
    assert plan["files"].keys() == manifest.files.keys()
    for name, estimate in plan["files"].items():
        assert estimate == pytest.approx(manifest.files[name].size, rel=0.8)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_several_outputs(run: Run, tmp_path: Path) -> None:
    flags = ("--output", "logits,layers:0,3,embedding", "--dry-run", "--json", "-o", tmp_path / "x")
    plan = run("export", "-m", "digits", *flags).document
    assert plan["output"] == "logits float32, layer_0 float32, layer_3 float32, embedding float32"
    tokens = 8 * 8 * 2 * plan["config"]["width"] * 17  # 8 images in float64, two layers, CLS and 16 patches
    assert plan["files"]["golden.safetensors"] > tokens


@pytest.mark.slow
def test_random_weights_are_announced(run: Run, tmp_path: Path) -> None:
    result = run("export", "-m", "Ti/16", "--seed", 3, "--dry-run", "-o", tmp_path / "x")
    assert [line for line in result.err.splitlines() if "random" in line] == [
        "  note: no checkpoint: the weights of Ti/16 are random (seed 3)"
    ]


@pytest.mark.slow
def test_an_existing_folder_needs_force(run: Run, bundle: Bundle) -> None:
    before = sorted(path.stat().st_mtime_ns for path in bundle.root.iterdir())
    result = run("export", "-m", "digits", "-o", bundle.root)
    assert result.code == 2
    assert "hint: --force replaces it" in result.err
    # A dry run looks at everything else all the same, and says it.
    result = run("export", "-m", "digits", "-o", bundle.root, "--dry-run")
    assert result.code == 0
    assert f"would be refused: {bundle.root}: already exists (--force replaces it)" in result.err
    assert "would write" in result.out
    assert "refused" not in run("export", "-m", "digits", "-o", bundle.root, "--dry-run", "--force").err
    result = run("export", "-m", "digitz", "-o", bundle.root, "--dry-run")
    assert result.err.startswith("error: unknown model 'digitz'")
    assert sorted(path.stat().st_mtime_ns for path in bundle.root.iterdir()) == before
    assert [entry.name for entry in bundle.root.parent.iterdir()] == [bundle.root.name]


# --- the user's own module ------------------------------------------------------------------------------

MODULE = """
import torch
print("imported")
class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(3 * 8 * 8, 5)
    def forward(self, x):
        return self.head(x.flatten(1))
build = Linear
"""


@pytest.mark.slow
def test_a_module_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    result = in_a_process("export", "-m", "mine:build", "--image-size", 8, "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.document["bundle"] == "mine-build.bundle"
    assert "imported" in result.err
    assert (tmp_path / "mine-build.bundle" / "model.onnx").is_file()


# --- interruptions --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, number",
    [
        ("load", signal.SIGINT),
        ("reference", signal.SIGTERM),
        ("weights", signal.SIGTERM),
        ("onnx", signal.SIGINT),
    ],
)
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    folder = tmp_path / "made" / "digits.bundle"
    process = subprocess.Popen(
        [*COMMAND, "export", "-m", "digits", "-o", folder, "--fp32", "--fp16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell script has it ignored, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[0] == stage:
            break
    time.sleep(0.05)  # into the next stage
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"error: interrupted by {number.name}"
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_document_of_a_real_export(digits: Exported, run: Run) -> None:
    # What inspect and export say of the same bundle agrees.
    manifest = run("inspect", digits.folder, "--json").document["manifest"]
    assert json.loads((digits.folder / "manifest.json").read_text()) == manifest
    assert sys.version.split()[0] in manifest["provenance"]["platform"]
