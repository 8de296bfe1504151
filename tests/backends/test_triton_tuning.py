"""A tuned table lies in the bundle, and the triton backend takes it on the GPU it was made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import interpreter
from tests.helpers.weights_bundles import CONFIG, artifact, write_weights
from vitdeploy.backends.base import Availability
from vitdeploy.backends.triton import Triton, _Kernels
from vitdeploy.backends.triton_tuning import tune_bundle
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import DeviceUnavailable, UsageError

assert interpreter  # before anything imports Triton
GPU = "NVIDIA Test 100"
Run = Callable[..., Any]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that nothing runs on: the search itself is replaced, and what it was asked for returned."""
    from vitdeploy_kernels import tuner, warming

    asked: list[Any] = []

    class Idle:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Idle:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def submit(self, wanted: Any) -> None:
            asked.append(wanted)

        def ready(self, *_: Any) -> None:
            pass

    def search(specs: Any, target: Any, table: Any, **options: Any) -> Any:
        asked.append((specs, options["budget"]))
        options["report"]("a line")
        return replace(table, gpu=target.name, measured=True), [None, None]

    monkeypatch.setattr(Triton, "availability", lambda _: Availability(True))
    monkeypatch.setattr(tuner, "this_gpu", lambda: tuner.Target(GPU, (9, 0), 132, 50 * 2**20))
    monkeypatch.setattr(tuner, "tune", search)
    monkeypatch.setattr(warming, "Warmer", Idle)
    return asked


@pytest.mark.slow
def test_the_table_goes_into_the_bundle_and_is_used(
    tmp_path: Path, a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_weights(tmp_path / "b", artifacts=())
    report = tune_bundle(made, batches=[1, 4], budget=3)
    assert report.gpu == GPU
    assert report.table == made.root / "kernels/tuned/NVIDIA_Test_100.json"
    assert (report.tuned, report.lines) == (2, ("a line",))
    contestants, (specs, budget) = a_gpu
    assert set(contestants) == set(specs)
    assert len(specs) == report.shapes
    assert budget == 3
    rows = {spec.shape[0] for spec in specs if spec.kernel == "linear_residual"}
    assert {CONFIG.tokens, 4 * CONFIG.tokens} <= rows
    opened = Bundle.open(made.root)
    opened.verify()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    kernels = _Kernels.of(opened, None, "cuda:0")
    assert kernels.table is not None
    assert (kernels.table.gpu, kernels.table.measured) == (GPU, True)
    assert "as tuned for this GPU" in kernels.report
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Other")
    assert _Kernels.of(opened, artifact("fp16"), "cuda:0").table is None


@pytest.mark.slow
@pytest.mark.usefixtures("a_gpu")
def test_the_table_goes_into_a_folder(tmp_path: Path) -> None:
    made = write_weights(tmp_path / "b")
    report = tune_bundle(made, batches=[1], folder=tmp_path)
    assert report.table == tmp_path / "NVIDIA_Test_100.json"
    assert report.table.is_file()
    assert not [name for name in Bundle.open(made.root).manifest.files if "tuned" in name]


def test_bad_requests(tmp_path: Path) -> None:
    made = write_weights(tmp_path / "b")
    with pytest.raises(UsageError, match="fp16 or bf16, not in 'fp32'"):
        tune_bundle(made, precision="fp32")
    with pytest.raises(UsageError, match="not a folder"):
        tune_bundle(made, folder=tmp_path / "missing")


@pytest.mark.skipif(interpreter.ON_GPU, reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    made = write_weights(tmp_path / "b")
    with pytest.raises(DeviceUnavailable, match="nothing to tune for: no NVIDIA GPU answers"):
        tune_bundle(made)
    with interpreter.environment(), pytest.raises(DeviceUnavailable, match="nothing to tune for"):
        tune_bundle(made)
