"""Which cell is best; what is picked: the more exact where speeds are level, never what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.sample_results import SUBJECT, cell, failed_parity, parity, sample_results
from vitdeploy import predictor
from vitdeploy.backends.base import Availability
from vitdeploy.backends.openvino import OpenVino
from vitdeploy.benchmark.ranking import (
    best_by_batch,
    choice_of,
    eager,
    fastest,
    groups,
    members,
    pareto,
    pick,
    ranked,
    speedup,
)
from vitdeploy.benchmark.results import Cell
from vitdeploy.bundle.choices import write_choices
from vitdeploy.bundle.manifest import Choice
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.machine.identity import this_machine
from vitdeploy.predictor import Predictor

NAME = SUBJECT.name
EAGER = {"backend": "torch", "artifact": "weights"}


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
    write_choices(made, choice(batch=3))
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
    write_choices(made, choice().model_copy(update={"machine": ("another", "4 threads")}))
    with Predictor.open(made.root) as plain:
        assert (plain.session.facts.artifact, plain.note) == ("onnx-fp32", "")


def test_a_choice_that_does_not_run_any_more(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    write_choices(made, choice(backend="openvino"))
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


def test_the_fastest_right_cell_wins() -> None:
    slow, fast = cell(p50_ms=20.0), cell(backend="openvino", p50_ms=10.0)
    wrong = cell(backend="triton", p50_ms=1.0, parity=failed_parity())
    unproven = cell(backend="torch", p50_ms=1.0, parity=None)
    failed = cell(backend="tensorrt", status="failed", reason="gone")
    results = sample_results(cells=(wrong, slow, unproven, fast, failed))
    assert fastest(results, "vit-b16", 1) == fast
    assert ranked(results.cells) == (fast, slow)
    assert fastest(results, "vit-b16", 2) is None
    assert fastest(results, "another", 1) is None


def test_image_sizes_are_different_questions() -> None:
    small, large = cell(p50_ms=5.0, image_size=(160, 160)), cell(p50_ms=9.0)
    results = sample_results(cells=(large, small))
    assert [members(results, group) for group in groups(results)] == [(large,), (small,)]
    assert fastest(results, "vit-b16", 1, (224, 224)) == large
    assert fastest(results, "vit-b16", 1) == small


def test_speedup_is_over_eager_on_the_same_work() -> None:
    measured = cell(p50_ms=20.0, threads=2)
    other_work = [
        cell(**EAGER, p50_ms=60.0, threads=1),
        cell(**EAGER, p50_ms=60.0, threads=2, concurrency=2),
        cell(**EAGER, p50_ms=60.0, threads=2, batch=8),
        cell(**EAGER, p50_ms=60.0, threads=2, image_size=(160, 160)),
        cell(backend="torch", artifact="weights-bf16", precision="bf16", p50_ms=60.0, threads=2),
        cell(**EAGER, p50_ms=60.0, threads=2, parity=failed_parity("fp32")),
    ]
    assert eager(sample_results(cells=(measured, *other_work)), measured) is None
    base = cell(**EAGER, p50_ms=50.0, threads=2)
    over = eager(sample_results(cells=(measured, *other_work, base)), measured)
    assert over == base
    assert speedup(measured, over) == 2.5
    assert speedup(measured, None) is None
    assert speedup(cell(p50_ms=0.0), over) is None


def test_pareto() -> None:
    def point(name: str, p50: float, error: float | None, **changes: object) -> Cell:
        return cell(backend=name, p50_ms=p50, parity=parity(relative=error), **changes)

    best = point("fast", 1.0, 1e-3)
    exact = point("exact", 3.0, 1e-6)
    beaten = point("beaten", 4.0, 1e-5)
    level = point("level", 1.0, 2e-3)
    unknown = point("unknown", 0.5, None)
    other_batch = point("slow", 9.0, 1e-3, batch=8)
    assert pareto([beaten, exact, other_batch, best, level, unknown]) == (best, exact, other_batch)


def test_the_best_of_each_batch() -> None:
    results = sample_results()
    found = best_by_batch(results.cells, results)
    assert [(a.batch, a.cell.label if a.cell else None) for a in found] == [
        (1, "openvino onnx-bf16"),
        (8, "openvino onnx-bf16"),
        (32, "openvino onnx-bf16"),
    ]
    assert [a.factor for a in found] == pytest.approx([96 / 31, 655 / 187, 2700 / 742])
    # The wrong cell is the second fastest at batch 8.
    assert [a.runner_up.label if a.runner_up else None for a in found] == [
        "aotinductor aoti-bf16",
        "torch-compile weights-bf16",
        "aotinductor aoti-bf16",
    ]
