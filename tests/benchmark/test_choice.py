"""What is picked: the best among what was measured and is right, the more exact where speeds are level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.sample_results import SUBJECT, cell, failed_parity, sample_results
from vitdeploy import predictor
from vitdeploy.backends.base import Availability
from vitdeploy.backends.openvino import OpenVino
from vitdeploy.benchmark.choice import choice_of, pick, write_choice
from vitdeploy.benchmark.results import Cell
from vitdeploy.bundle.manifest import Choice
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.machine.identity import this_machine
from vitdeploy.predictor import Predictor

NAME = SUBJECT.name


def picked(cells: list[Cell], goal: Any = "latency", limit: float | None = None) -> Cell:
    return pick(sample_results(cells=tuple(cells)), NAME, goal, limit)


def test_latency_is_of_the_smallest_batch() -> None:
    slow, fast = cell(p50_ms=20.0), cell(p50_ms=10.0, backend="openvino")
    bulk = cell(p50_ms=16.0, batch=8, backend="torch")
    assert picked([slow, fast, bulk]) == fast


def test_throughput_is_of_any_batch() -> None:
    one, eight = cell(p50_ms=10.0), cell(p50_ms=60.0, batch=8)
    assert picked([one, eight], "throughput") == eight
    assert picked([one, eight], "throughput", 30.0) == one


def test_callers_together_count() -> None:
    alone = cell(p50_ms=10.0)
    four = cell(p50_ms=25.0, concurrency=4)
    assert picked([alone, four], "throughput") == four
    assert picked([alone, four]) == alone


@pytest.mark.parametrize("fast, precision", [(10.0, "fp16"), (11.8, "fp32")])
def test_level_speeds_go_to_the_more_exact(fast: float, precision: str) -> None:
    exact = cell(p50_ms=12.0)
    assert picked([cell(p50_ms=fast, precision="fp16", artifact="onnx-fp16"), exact]).precision == precision


def test_noise_is_level() -> None:
    noise = np.random.default_rng(0).uniform(0.5, 1.5, 40)
    fp16 = cell(
        precision="fp16", artifact="onnx-fp16", p50_ms=10.0, samples_ms=tuple(10 * noise), round_samples=1
    )
    fp32 = cell(p50_ms=10.6, samples_ms=tuple(10.6 * noise[::-1]), round_samples=1)
    assert picked([fp16, fp32]) == fp32


def test_wrong_and_failed_ones_never() -> None:
    wrong = cell(p50_ms=0.1, parity=failed_parity())
    unproven = cell(p50_ms=0.1, parity=None)
    failed = cell(status="failed", reason="crashed")
    right = cell(p50_ms=50.0)
    for goal in ("latency", "throughput"):
        assert picked([wrong, unproven, failed, right], goal) == right
    with pytest.raises(ParityError, match="1 of 3 cells have wrong outputs"):
        picked([wrong, unproven, failed])
    with pytest.raises(UsageError, match="no cell stays within 5 ms"):
        picked([right], "throughput", 5.0)


def choice(**changes: Any) -> Choice:
    made = cell(p50_ms=10.0, **{"artifact": "onnx-fp16", "precision": "fp16", "threads": 1, **changes})
    results = sample_results(cells=(made,))
    return choice_of(made, results, "latency", None).model_copy(update={"machine": this_machine()})


def test_load_uses_it(tmp_path: Any) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    with Predictor.open(made) as plain:
        assert (plain.session.facts.artifact, plain.note) == ("onnx-fp32", "")
        assert plain.chunk == made.artifact("fp32").batch.opt
    write_choice(made, choice(batch=3))
    with Predictor.open(made.root) as best:
        assert best.session.facts.artifact == "onnx-fp16"
        assert best.chunk == 3
        assert best.note.startswith("onnxruntime onnx-fp16, 1 thread: picked for latency on this machine")
    with Predictor.open(made.root, artifact="fp32") as asked:
        assert (asked.session.facts.artifact, asked.note) == ("onnx-fp32", "")
    with Predictor.open(made.root, backend="onnxruntime") as asked:
        assert (asked.session.facts.artifact, asked.note) == ("onnx-fp32", "")


def test_a_choice_for_another_machine_is_not_used(tmp_path: Any) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    write_choice(made, choice().model_copy(update={"machine": ("another", "4 threads")}))
    with Predictor.open(made.root) as plain:
        assert (plain.session.facts.artifact, plain.note) == ("onnx-fp32", "")


def test_a_choice_that_does_not_run_any_more(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    write_choice(made, choice(backend="openvino"))
    monkeypatch.setattr(
        OpenVino, "availability", lambda self: Availability(False, "openvino is not installed")
    )
    with Predictor.open(made.root) as plain:
        assert plain.session.facts.artifact == "onnx-fp32"
        assert "picked for this machine, but does not run here now: openvino is not inst" in plain.note
    assert predictor.choice_for_this_machine(made) == (None, ""), "the bundle as it was opened had no choice"


def test_weights_and_providers() -> None:
    assert choice(artifact="weights.safetensors", backend="torch").artifact is None
    assert (choice().provider, choice(backend="openvino").provider) == ("cpu", None)
