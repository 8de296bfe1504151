"""Engines, on TensorRT's double: held against the checkpoint where a GPU is, one line where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vitdeploy
from tests.fakes.machines import L4, NEW, RTX, go_to
from tests.helpers.bundles import LABELS, WEIGHT
from tests.helpers.engine_bundles import PLAN, engines
from vitdeploy.errors import BundleError, DeviceUnavailable
from vitdeploy.machine.gpus import Gpu

H100 = Gpu("NVIDIA H100", (9, 0))


class Linear(torch.nn.Module):
    """The classifier that the engines were built from."""

    def __init__(self, weight: np.ndarray = WEIGHT) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.flatten(1) @ self.weight


def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, gpu: Gpu | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    go_to(monkeypatch, version, gpu)
    module = "vitdeploy.verification.foreign.engine_file"
    monkeypatch.setattr(f"{module}.find_gpus", lambda: [gpu] if gpu else [])


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An engine for an L4, alone."""
    here(monkeypatch, tmp_path, NEW, L4)
    bundle = engines(tmp_path / "bundle")
    lone = tmp_path / "model.engine"
    lone.write_bytes((bundle.root / PLAN).read_bytes())
    return lone


def test_an_engine_is_held_against_its_checkpoint(plan: Path) -> None:
    report = vitdeploy.verify(plan, model=Linear())
    report.check()
    assert [(r.backend, r.batch) for r in report.parity] == [("tensorrt", size) for size in (1, 2, 8)]
    states = {f.check: f.state for f in report.findings}
    assert states["parity"] == states["batch invariance"] == "held"
    assert states["precision"] == states["weights"] == "not checked"
    # Nothing says that it is fp32: it is held against what fp16 may lose.
    assert {r.tolerance.relative for r in report.parity} == {1e-2}
    named = plan.rename(plan.with_name("model.fp32.plan"))
    assert {r.tolerance.relative for r in vitdeploy.verify(named, model=Linear()).parity} == {5e-5}


def test_an_engine_of_other_weights_fails(plan: Path) -> None:
    other = WEIGHT.copy()
    other[:, [0, 1]] = other[:, [1, 0]]
    report = vitdeploy.verify(plan, model=Linear(other))
    assert [f.check for f in report.findings if f.state == "failed"] == ["parity"]


def test_accuracy_of_an_engine(plan: Path, tmp_path: Path) -> None:
    from tests.helpers.bundles import answer_images, random_image

    images = [random_image(seed) for seed in range(8)]
    (tmp_path / "data").mkdir()
    for seed, best in enumerate(answer_images(images).argmax(axis=1)):
        images[seed].save(tmp_path / f"data/{best}_{seed}.png")
    report = vitdeploy.verify(plan, model=Linear(), data=tmp_path / "data", max_drop=0)
    report.check()
    assert [(a.model, a.correct) for a in report.accuracy] == [("reference", 8), ("model.engine", 8)]
    assert len(LABELS) == 5


@pytest.mark.slow
def test_an_engine_of_rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch, tmp_path, RTX, L4)
    bundle = engines(tmp_path / "bundle", RTX)
    path = next(bundle.root.glob("engines/*/model.fp32.plan"))
    vitdeploy.verify(path, model=Linear()).check()
    here(monkeypatch, tmp_path, RTX, H100)
    with pytest.raises(DeviceUnavailable, match="it is for sm_89, and the GPU here is sm_90"):
        vitdeploy.verify(path, model=Linear())


def test_what_is_missing(plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch, tmp_path, NEW, None)
    with pytest.raises(
        DeviceUnavailable, match=r"TensorRT 11\.4\.0\.106, which does not run here: no NVIDIA"
    ):
        vitdeploy.verify(plan, model=Linear())
    here(monkeypatch, tmp_path, NEW, H100)
    with pytest.raises(BundleError, match="does not take it"):
        vitdeploy.verify(plan, model=Linear())
