"""A whole optimisation with a stand-in for the export and for the clock: what is kept, and what is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.bundles import golden_arrays, random_image, write_bundle
from tests.helpers.sample_results import failed_parity
from tests.helpers.small_bundles import siblings
from tests.helpers.stand_in_clock import StandInClock
from vitdeploy.benchmark.cases import Case
from vitdeploy.benchmark.ranking import fastest
from vitdeploy.benchmark.run import BenchPlan
from vitdeploy.bundle.folder import CALIBRATION, HELD_OUT, Bundle
from vitdeploy.bundle.quantisation import CalibrationRecord
from vitdeploy.errors import BundleError, ParityError, UsageError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.optimiser import run as optimiser
from vitdeploy.optimiser.record import OPTIMISATION, read_optimisation
from vitdeploy.optimiser.run import Aim, Optimised, run_optimise
from vitdeploy.predictor import Predictor
from vitdeploy.server.loading import ModelSettings, load_bundle

HASHES = ("0" * 64,)
Optimise = Callable[..., Optimised]


@pytest.fixture(autouse=True)
def _stand_in_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear classifier in fp32 and bf16; with calibration in what is called int8, too."""

    def export(request: ExportRequest, folder: Path, *, failures: dict[str, str], progress: Any) -> Bundle:
        quantised = "int8" in request.precisions
        bundle = write_bundle(folder, precisions=("fp32", "bf16", *(("fp16",) if quantised else ())))
        if not quantised:
            failures["bf16"] = "made up"
            return bundle
        manifest = bundle.manifest
        renamed = [
            a if a.precision != "fp16" else a.model_copy(update={"name": "onnx-int8", "precision": "int8"})
            for a in manifest.artifacts
        ]
        record = CalibrationRecord(images=HASHES, held_out=HASHES)
        with bundle.edit() as writer:
            for file in (HELD_OUT, CALIBRATION):
                arrays = {name: np.ascontiguousarray(a) for name, a in golden_arrays().items()}
                save_file(arrays, writer.file(file))
            writer.seal(manifest.model_copy(update={"artifacts": tuple(renamed), "calibration": record}))
            return writer.commit()

    monkeypatch.setattr(optimiser, "run_export", export)
    monkeypatch.setattr(optimiser, "processors", lambda: 2)
    monkeypatch.setattr(optimiser, "find_gpus", list)


@pytest.fixture
def optimise(tmp_path: Path) -> Optimise:
    def run(clock: StandInClock, aim: Aim | None = None, *, int8: bool = True, **more: Any) -> Optimised:
        request = ExportRequest(
            model="digits",
            precisions=("fp32", "int8") if int8 else ("fp32",),
            calibration=tmp_path if int8 else None,
        )
        return run_optimise(request, aim or Aim(), tmp_path / "out" / "b", measure=clock, **more)

    return run


def speeds(**times: float) -> Callable[[Case], float]:
    """By precision; OpenVINO takes half as long, and two threads take three quarters."""

    def time(case: Case) -> float:
        base = times[case.precision] * (0.5 if case.backend == "openvino" else 1)
        return base * (0.75 if case.threads == 2 else 1)

    return time


def files(found: Optimised) -> set[str]:
    return {path.name for path in found.bundle.root.iterdir()}


def test_int8_that_gains_nothing_is_refused_and_removed(optimise: Optimise) -> None:
    clock = StandInClock(speeds(fp32=10, bf16=6, int8=5.6))
    found = optimise(clock)
    choice = found.choice
    assert (choice.backend, choice.artifact, choice.threads) == ("openvino", "onnx-bf16", 2)
    said = {(t.backend, t.artifact, t.verdict): t.why for t in found.record.tried}
    lost = said["openvino", "onnx-int8", "refused"]
    assert lost == "1.07x of openvino onnx-bf16, 2 threads: less than the 1.15x that int8 must bring"
    assert "no bf16 kernels" in said["onnxruntime", "onnx-bf16", "not run"]
    assert files(found) == {
        "model.onnx",
        "model.bf16.onnx",
        "golden.safetensors",
        OPTIMISATION,
        "manifest.json",
    }
    assert found.bundle.manifest.calibration is None
    assert [a.name for a in found.bundle.manifest.artifacts] == ["onnx-fp32", "onnx-bf16"]
    opened = Bundle.open(found.bundle.root)
    opened.verify()
    assert read_optimisation(opened) == found.record
    assert siblings(found.bundle.root) == ["b"], "nothing is left of the trial"


def test_int8_that_pays_is_kept_with_what_it_is_proven_on(optimise: Optimise) -> None:
    found = optimise(StandInClock(speeds(fp32=10, bf16=6, int8=4)))
    assert found.choice.artifact == "onnx-int8"
    assert {HELD_OUT, CALIBRATION} < files(found)
    assert found.bundle.manifest.calibration is not None
    assert "model.bf16.onnx" not in files(found)


def test_the_winner_measured_again_is_the_fastest_verified_cell(optimise: Optimise) -> None:
    wrong = "openvino onnx-int8 2 threads"
    clock = StandInClock(speeds(fp32=10, bf16=6, int8=1), {wrong: {"parity": failed_parity()}})
    found = optimise(clock)
    cases = [case for plan in clock.plans[:-1] for case in plan.cases]
    again = clock(BenchPlan(cases, (1,)))
    best = fastest(again, cases[0].target.name, 1)
    assert best is not None
    assert (best.backend, best.artifact, best.threads) == ("openvino", "onnx-int8", 1)
    choice = found.choice
    assert (choice.backend, choice.artifact, choice.threads) == (best.backend, best.artifact, best.threads)
    (entry,) = [t for t in found.record.tried if t.verdict == "wrong"]
    assert (entry.label, entry.why) == (
        "openvino onnx-int8, 2 threads",
        "relative error 8.3e-01 above 1.0e-02",
    )


def test_the_budget_is_shared_out(optimise: Optimise) -> None:
    clock = StandInClock(speeds(fp32=10, bf16=6, int8=4))
    optimise(clock, Aim(budget=50.0))
    *looks, final = clock.plans
    assert [len(plan.cases) for plan in looks] == [3, 3, 2, 2, 2]
    assert sum(plan.budget for plan in clock.plans) == pytest.approx(50.0)
    assert final.budget == 35.0
    assert len({(case.backend, case.artifact) for case in final.cases}) == len(final.cases)


def test_without_calibration_int8_is_not_built_and_what_failed_is_said(optimise: Optimise) -> None:
    found = optimise(StandInClock(speeds(fp32=10, bf16=12)), int8=False)
    said = {t.precision: (t.verdict, t.why) for t in found.record.tried if not t.artifact}
    assert said["int8"][0] == "not built"
    assert "--calibration DIR" in said["int8"][1]
    assert said["bf16"] == ("failed", "made up")
    assert found.choice.artifact == "onnx-fp32"
    assert len(found.bundle.manifest.artifacts) == 1


def test_what_was_chosen_is_what_runs(optimise: Optimise, tmp_path: Path) -> None:
    clock = StandInClock(lambda case: 4.0 if (case.precision, case.concurrency) == ("bf16", 2) else 10.0)
    found = optimise(clock, Aim(goal="throughput"))
    assert (found.choice.batch, found.choice.concurrency, found.choice.threads) == (8, 2, 1)
    with Predictor.open(found.bundle.root) as predictor:
        assert (predictor.session.facts.backend, predictor.session.facts.artifact) == (
            "openvino",
            "onnx-bf16",
        )
        assert predictor.chunk == 8
        assert predictor.note.startswith("openvino onnx-bf16: picked for throughput")
        assert len(predictor.predict(random_image(0))) == 1
    for settings, count in ((ModelSettings(), 2), (ModelSettings(instances=1), 1)):
        loaded = load_bundle(found.bundle.root, settings)
        assert len(loaded.sizes[0].predictors) == count
        loaded.close()


def test_nothing_that_is_right(optimise: Optimise, tmp_path: Path) -> None:
    def wrong(case: Case) -> float:
        clock.faults = {**clock.faults, case.name: {"parity": failed_parity()}}
        return 1.0

    clock = StandInClock(wrong)
    with pytest.raises(
        ParityError, match="nothing that runs here is right: onnxruntime onnx-fp32, 1 thread:"
    ):
        optimise(clock)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_measurement_leaves_nothing(optimise: Optimise, tmp_path: Path) -> None:
    clock = StandInClock(speeds(fp32=10, bf16=6, int8=4))

    def interrupted(plan: BenchPlan, **more: Any) -> Any:
        return clock(plan).model_copy(update={"partial": len(clock.plans) == 3})

    with pytest.raises(KeyboardInterrupt):
        optimise(interrupted)
    assert not (tmp_path / "out").exists()


def test_an_existing_bundle_stays(optimise: Optimise, tmp_path: Path) -> None:
    clock = StandInClock(speeds(fp32=10, bf16=6, int8=4))
    write_bundle(tmp_path / "out" / "b")
    with pytest.raises(BundleError, match="already exists"):
        optimise(clock)
    assert clock.plans == [], "said before anything is built"
    assert optimise(clock, force=True).choice.artifact == "onnx-int8"


@pytest.mark.parametrize(
    "aim, message",
    [
        ({"goal": "speed"}, "unknown goal 'speed'"),
        ({"goal": "latencys"}, "unknown goal 'latencys'; did you mean 'latency'?"),
        ({"batch": 0}, "the batch must be at least 1 image, not 0"),
        ({"budget": 0.0}, "the budget must be positive"),
        ({"max_drop": 1.0}, "--max-drop is measured on labelled images"),
        ({"backends": ("tensorflow",)}, "unknown backend 'tensorflow'"),
    ],
)
def test_bad_aims(aim: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Aim(**aim)


def test_a_damaged_record_is_said(optimise: Optimise) -> None:
    bundle = optimise(StandInClock(speeds(fp32=10, bf16=6, int8=4))).bundle
    with bundle.edit() as writer:
        writer.file(OPTIMISATION).write_text('{"schema_version": 2}', encoding="utf-8")
        writer.seal(bundle.manifest)
        changed = writer.commit()
    with pytest.raises(BundleError, match="schema_version"):
        read_optimisation(changed)
