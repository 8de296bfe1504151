"""``vitdeploy optimize``: a bundle of what is fastest and right here, and what it says of all the others."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.commands import Run
from tests.helpers.paths import ROOT
from tests.helpers.stand_in_clock import StandInClock
from vitdeploy.benchmark import disturbances
from vitdeploy.benchmark.cases import Case
from vitdeploy.bundle.folder import Bundle
from vitdeploy.data import digits_heldout
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.machine.identity import this_machine
from vitdeploy.optimiser import run as optimiser
from vitdeploy.verification.parity import TOLERANCES

IMAGES = ROOT / "vitdeploy/data/digits/images"
MODULE = """
import torch
class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(3 * 8 * 8, 5)
    def forward(self, x):
        return self.head(x.flatten(1))
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandInClock]:
    """``clock(fp32=..., ...)``: optimisations take these times on any runtime, OpenVINO a little less."""

    def set_clock(**times: float) -> StandInClock:
        made = StandInClock(lambda case: _time(case, times))
        with_it = functools.partial(optimiser.run_optimise, measure=made)
        monkeypatch.setattr(optimiser, "run_optimise", with_it)
        monkeypatch.setattr(optimiser, "precisions_here", lambda flags, gpus: (("fp32", "bf16"), {}))
        return made

    return set_clock


def _time(case: Case, times: dict[str, float]) -> float:
    return times[case.precision] * (0.9 if case.backend == "openvino" else 1) * (1 + 0.1 * case.spin)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to calibrate with."""
    folder = tmp_path_factory.mktemp("photos")
    images, labels = digits_heldout()
    for place, (image, label) in enumerate(zip(images[:24], labels, strict=False)):
        Image.fromarray(image).save(folder / f"{label}_{place}.png")
    return folder


@pytest.fixture(scope="module")
def contestants(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model in every precision, as `optimize` exports it."""
    folder = tmp_path_factory.mktemp("trial") / "d"
    request = ExportRequest(
        model="digits", precisions=("fp32", "bf16", "int8"), formats=("onnx",), calibration=photos
    )
    return run_export(request, folder).root


@pytest.fixture
def exported(contestants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisations take a copy of that export, to save time."""

    def export(request: ExportRequest, folder: Path, **more: object) -> Bundle:
        return Bundle.open(shutil.copytree(contestants, folder))

    monkeypatch.setattr(optimiser, "run_export", export)


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_int8_without_gain_is_refused_on_digits(
    run: Run, tmp_path: Path, clock: Callable[..., StandInClock], photos: Path
) -> None:
    clock(fp32=1.0, bf16=0.8, int8=0.79)
    folder = tmp_path / "d.bundle"
    result = run("optimize", "-m", "digits", "--calibration", photos, "--data", photos, "-o", folder)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("model")] == [
        ["model.onnx", "fp32"],
        ["model.bf16.onnx", "bf16"],
    ]
    assert "  for latency: openvino onnx-bf16, batch 1, 1 thread: 0.72 ms, 1388.9 images/s" in lines
    refused = [line for line in lines if line.startswith("openvino onnx-int8") and " refused " in line]
    assert len(refused) == 1
    assert "1.01x of openvino onnx-bf16, 1 thread: less than the 1.15x that int8 must bring" in refused[0]
    assert not any(" slower " in line for line in lines), "for that there is --explain-choice"
    explained = run("inspect", folder, "--explain-choice")
    assert "choice       for latency: openvino onnx-bf16, batch 1, 1 thread" in explained.out
    assert " slower " in explained.out
    assert refused[0].split() in [line.split() for line in explained.out.splitlines()]
    document = run("inspect", folder, "--json").document
    assert document["optimisation"]["tried"][0]["verdict"] == "chosen"
    assert run("verify", folder).code == 0
    said = run("predict", folder, next(IMAGES.glob("*.png")))
    assert "openvino onnx-bf16, 1 thread: picked for latency on this machine" in said.err


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_int8_that_pays(run: Run, tmp_path: Path, clock: Callable[..., StandInClock], photos: Path) -> None:
    clock(fp32=1.0, bf16=0.8, int8=0.5)
    folder = tmp_path / "d.bundle"
    result = run("optimize", "-m", "digits", "--calibration", photos, "-o", folder, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["choice"]["artifact"] == "onnx-int8"
    assert document["choice"]["machine"] == list(this_machine())
    assert [artifact["name"] for artifact in document["artifacts"]] == ["onnx-fp32", "onnx-int8"]
    first = document["optimisation"]["tried"][0]
    assert (first["verdict"], first["why"]) == ("chosen", "2.00x of openvino onnx-fp32, 1 thread")
    Bundle.open(folder).verify()
    assert run("verify", folder).code == 0


@pytest.mark.slow
def test_a_module_of_ones_own_has_float_contestants_only(
    run: Run,
    tmp_path: Path,
    clock: Callable[..., StandInClock],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(fp32=1.0, bf16=2.0)
    (tmp_path / "own_linear.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--image-size", 8, "--calibration", photos, "--json")
    result = run("optimize", "-m", "own_linear:Linear", *flags)
    assert result.code == 0, result.err
    tried = result.document["optimisation"]["tried"]
    assert {entry["precision"] for entry in tried if entry["artifact"]} == {"fp32", "bf16"}
    (int8,) = [entry for entry in tried if entry["precision"] == "int8"]
    assert int8["verdict"] == "failed"
    assert "own_linear:Linear is exported as it is: int8 is for models that vitdeploy builds" in int8["why"]


@pytest.mark.slow
def test_with_the_real_clock(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbances.CounterReader, "read", lambda self, workers: disturbances.ZERO)
    folder = tmp_path / "d.bundle"
    flags = ("--goal", "throughput", "--batch", 4, "--backend", "onnxruntime", "--budget", "1s")
    result = run("optimize", "-m", "digits", *flags, "-o", folder)
    assert result.code == 0, result.err
    assert "ranges are taken from images: --calibration DIR" in result.out
    record = json.loads((folder / "optimisation.json").read_text(encoding="utf-8"))
    measured = [entry for entry in record["tried"] if entry["p50_ms"] is not None]
    assert measured[0]["verdict"] == "chosen"
    # What processors compute in halves themselves enters in fp16, too.
    assert all(entry["relative"] <= TOLERANCES[entry["precision"]].relative for entry in measured)
    (choice,) = Bundle.open(folder).manifest.choices
    assert (choice.goal, choice.batch, choice.backend) == ("throughput", 4, "onnxruntime")
    assert choice.images_per_s == measured[0]["images_per_s"]


def test_calibration_that_does_not_serve(run: Run, tmp_path: Path) -> None:
    for calibration, said in ((IMAGES / "nowhere", "nowhere"), (tmp_path / "one", "has 1 image: too few")):
        (tmp_path / "one").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
        result = run("optimize", "-m", "digits", "--calibration", calibration, "-o", tmp_path / "d.bundle")
        assert result.code == 2
        assert said in result.err
        assert not (tmp_path / "d.bundle").exists()
