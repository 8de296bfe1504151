"""The record of quantisation says what holds of our claims, and the document says what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import optimised, quantisation
from benchmarks.peers import environments, quantisers
from benchmarks.peers.quantisers import QUANTISERS, QuantiserFailure
from benchmarks.real_images import TASKS
from vitdeploy.benchmark.loop import Array, Caller
from vitdeploy.benchmark.run import BenchPlan
from vitdeploy.bundle.folder import Bundle

TIMES = {"fp32": 100.0, "bf16": 50.0, "int8": 25.0, "int8-ort": 50.0}
ERRORS = {"fp32": 0.0, "int8": 0.03, "int8-ort": 0.03, "fp8": 0.05}


def contest(model: str, times: dict[str, float], int8: str = "chosen") -> dict[str, Any]:
    """A record of one; the times are of the second measurement, the chosen one first."""
    tried = [
        {
            "label": label,
            "precision": label.rsplit("-", 1)[-1],
            "backend": label.split()[0],
            "p50_ms": time,
            "verdict": int8 if "int8" in label else "chosen" if index == 0 else "slower",
            "why": "1.02x of it: less than the 1.15x that int8 must bring" if int8 == "refused" else "said",
        }
        for index, (label, time) in enumerate(times.items())
    ]
    return {"model": model, "batch": 1, "tried": tried, "again": times}


FIT = {"openvino onnx-int8": 4.0, "openvino onnx-bf16": 6.0, "onnxruntime onnx-fp32": 10.0}
UNFIT = {"openvino onnx-bf16": 1.0, "openvino onnx-int8": 0.98, "onnxruntime onnx-fp32": 1.2}


def record(**changes: float) -> dict[str, Any]:
    """Everything holds in it, but for the times and errors of the variants that are named."""
    cells = [
        {"model": model, "variant": name, "batch": batch, "ms": [(TIMES | changes).get(name, 30.0)] * 3}
        for model in (quantisation.SMALL, quantisation.BASE)
        for name in quantisation.VARIANTS
        for batch in quantisation.BATCHES
    ]
    judged = [
        {"variant": name, "task": task, "error": ERRORS.get(name, 0.07), "worst": 0.2, "top1": 80.0}
        for name in quantisation.VARIANTS
        for task in TASKS
    ]
    return {
        "environment": {"cpu": {"name": "a processor"}},
        "skipped": {},
        "threads": 2,
        "rounds": 3,
        "quantising": {"seconds": 200.0, "peak_gb": 6.0},
        "speed": cells,
        "accuracy": [cell | {"agreement": 98.0} for cell in judged],
        "optimised": [contest(quantisation.SMALL, FIT), contest("digits", UNFIT, "refused")],
    }


def test_what_holds_is_not_complained_of() -> None:
    assert quantisation.broken_claims(record()) == []


def test_speeds_that_do_not_hold_are_said() -> None:
    lines = quantisation.broken_claims(record(bf16=30.0, **{"int8-ort": 60.0}))
    assert lines == [
        "DINOv2-S/14, batch 8: int8 over bf16: 1.20 × instead of 1.4 ×",
        "DINOv2-S/14, batch 1: int8-ort over fp32: 1.67 × instead of 1.8 ×",
        "DINOv2-S/14, batch 8: int8-ort over fp32: 1.67 × instead of 1.7 ×",
    ]
    slow = quantisation.broken_claims(record(**{"nncf-plain": 24.0}))
    assert slow[0] == "DINOv2-S/14, batch 1: int8 over nncf-plain: 0.96 × instead of 1.0 ×"


def test_errors_that_do_not_hold_are_said() -> None:
    wrong = record()
    for cell in wrong["accuracy"]:
        if (cell["variant"], cell["task"]) == ("int8", "crops"):
            cell |= {"error": 0.041, "top1": 78.5}
        if cell["variant"] == "fp8":
            cell |= {"error": 0.061, "top1": 70.0}
    assert quantisation.broken_claims(wrong) == [
        "crops, int8: error 0.041 instead of 0.04",
        "crops, int8: 1.5 points of top-1 lost instead of 1.0",
        "crops, fp8: error 0.061 instead of 0.06",
        "crops, int8: error 0.041 instead of 0.5 × nncf-plain's 0.07",
        "digits, fp8: error 0.061 instead of 0.06",
    ]


def test_what_was_not_measured_is_no_success() -> None:
    assert quantisation.unmeasured(record()) == []
    lines = quantisation.unmeasured({})
    names = {quantisation.FIRST, *quantisation.MOST, *quantisation.NNCF}
    assert len(lines) == len(quantisation.LEAST) + len(TASKS) * len(names) + 3
    assert quantisation.broken_claims({}) == []
    assert quantisation.doubts({})[-3:] == [
        "ViT-B/16, the export: not measured",
        "optimize, DINOv2-S/14: not measured",
        "optimize, digits: not measured",
    ]


@pytest.mark.parametrize(
    "held, said",
    [
        (contest("DINOv2-S/14", UNFIT, "refused"), "chose openvino onnx-bf16 instead of int8"),
        (contest("digits", FIT), "int8 on OpenVINO is not refused for what it gains"),
        (
            contest("digits", UNFIT | {"onnxruntime onnx-fp32": 0.9}, "refused"),
            "chose openvino onnx-bf16, and measured again onnxruntime onnx-fp32 is the fastest",
        ),
        (
            contest("digits", UNFIT | {"openvino onnx-int8": 0.8}, "refused"),
            "chose openvino onnx-bf16, and measured again openvino onnx-int8 is the fastest",
        ),
        (
            contest("digits", UNFIT, "refused") | {"again": {}},
            "openvino onnx-bf16 was wrong when it was measured again",
        ),
    ],
)
def test_choices_that_do_not_hold_are_said(held: dict[str, Any], said: str) -> None:
    assert list(optimised.broken([held])) == [f"optimize, {held['model']}: {said}"]


def test_what_is_compared_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[BenchPlan] = []

    def run(plan: BenchPlan, **_: Any) -> int:
        plans.append(plan)
        return len(plans)

    monkeypatch.setattr(optimised, "run_plan", run)
    bf16, int8 = (SimpleNamespace(backend="openvino", artifact=f"onnx-{name}") for name in ("bf16", "int8"))
    clock: Any = optimised.Twice()
    assert clock(BenchPlan([bf16, bf16], (1,))) == 1  # type: ignore[list-item]
    assert (len(plans), clock.again) == (1, None)
    assert clock(BenchPlan([bf16, int8], (1,))) == 2  # type: ignore[list-item]
    assert (len(plans), clock.again) == (3, 3)


def test_errors_and_answers_of_features() -> None:
    random = np.random.default_rng(0)
    exact = random.standard_normal((8, 2 * quantisation.CLS), dtype=np.float32)
    weight, bias = random.standard_normal((5, exact.shape[1]), dtype=np.float32), np.zeros(5, np.float32)
    answers = [int((weight @ row).argmax()) for row in exact]
    same = quantisation.judged(exact, exact, weight, bias, answers)
    assert same == {"error": 0, "worst": 0, "cls": 0, "cls_worst": 0, "top1": 100, "agreement": 100}
    other = exact.copy()
    other[3, : quantisation.CLS] *= 1.5  # of the CLS token alone, of one image of eight
    found = quantisation.judged(other, exact, weight, bias, [(answers[0] + 1) % 5, *answers[1:]])
    assert found["cls_worst"] == pytest.approx(0.5, abs=1e-4)
    assert found["cls"] == pytest.approx(0.5 / 8, abs=1e-4)
    share = np.linalg.norm(exact[3, : quantisation.CLS]) / np.linalg.norm(exact[3])
    assert found["worst"] == pytest.approx(0.5 * share, abs=1e-4)
    assert found["top1"] <= 87.5


def test_every_variant_runs_once_unmeasured_and_then_measured_in_every_round() -> None:
    calls: list[str] = []

    def caller(name: str) -> Caller:
        def run(pixels: Array) -> tuple[Array, float | None]:
            calls.append(name)
            return pixels, None

        return run

    found = quantisation.taking_turns({"a": caller("a"), "b": caller("b")}, np.zeros((8, 1), np.float32), 4)
    assert {len(times) for cell in found.values() for times in cell.values()} == {4}
    rounds = ["".join(calls[i : i + 4]) for i in range(0, 16, 4)]
    assert set(rounds) <= {"aabb", "bbaa"}


def test_the_tables_have_a_row_for_what_was_measured() -> None:
    text = quantisation.tables(record())
    assert "| **int8**, 7-bit weights | ONNX Runtime | 0.030, 0.20, 80.0, 98.0 |" in text
    assert "| bf16 | OpenVINO | 2.00 × (2.00 to 2.00) |" in text
    assert "took 200 s" in text
    assert "| DINOv2-S/14 | openvino onnx-int8: said | openvino onnx-int8 4.00 ms, openvino onnx-bf16" in text
    assert text.endswith("less than the 1.15x that int8 must bring |")
    skipped = quantisation.tables(record() | {"skipped": {"nncf": "no network"}})
    assert skipped.endswith("Not measured: NNCF, its default (SmoothQuant) (no network).")
    assert "interleaved" not in quantisation.tables({**record(), "speed": []})


def test_a_record_has_a_line_for_each_cell() -> None:
    text = quantisation.dumped(record())
    assert json.loads(text) == record()
    assert sum(line.startswith('{"variant"') for line in text.splitlines()) == 2 * len(quantisation.VARIANTS)


def test_the_errors_of_other_tools_that_are_slower_are_larger_too() -> None:
    wrong = record(nncf=29.0)
    for cell in wrong["accuracy"]:
        cell["error"] = {"nncf": 0.06, "nncf-plain": 0.02}.get(cell["variant"], cell["error"])
    assert quantisation.broken_claims(wrong) == [
        f"{task}, int8: error 0.03 instead of 1 × nncf-plain's 0.02" for task in TASKS
    ]


def test_the_document_says_what_the_record_says() -> None:
    committed = json.loads(quantisation.RESULTS.read_text(encoding="utf-8"))
    assert quantisation.PART.read() == quantisation.tables(committed)


@pytest.mark.xfail(
    reason="NNCF by min and max is as fast, our error of crops .7 of its; a held-out image's KL fails int8"
)
def test_every_claim_holds() -> None:
    committed = json.loads(quantisation.RESULTS.read_text(encoding="utf-8"))
    assert quantisation.broken_claims(committed) == []


def test_what_does_not_hold_is_known() -> None:
    committed = json.loads(quantisation.RESULTS.read_text(encoding="utf-8"))
    broken = [line.partition(":")[0] for line in quantisation.broken_claims(committed)]
    assert broken == ["DINOv2-S/14, batch 8", "crops, int8", "optimize, DINOv2-S/14"]


def test_every_claim_was_measured() -> None:
    assert quantisation.unmeasured(json.loads(quantisation.RESULTS.read_text(encoding="utf-8"))) == []


def test_every_quantiser_has_a_file_and_an_environment() -> None:
    folder = Path(environments.__file__).parent
    for tool in QUANTISERS.values():
        assert (folder / f"{tool.module}.py").is_file()
        assert tool.environment is None or tool.environment in environments.NAMES


@pytest.mark.slow
def test_a_tool_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(QuantiserFailure, match=r"ort-dynamic ended with 1: .*none\.onnx"):
        quantisers.quantised("ort-dynamic", tmp_path / "none.onnx", tmp_path / "none.npy", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ort-static", "ort-dynamic"])
def test_onnx_runtimes_quantiser_takes_our_graph(name: str, digits_onnx: Path, tmp_path: Path) -> None:
    import onnx

    images = tmp_path / "images.npy"
    np.save(images, Bundle.open(digits_onnx).golden()["pixel_values"])
    file = quantisers.quantised(name, digits_onnx / "model.onnx", images, tmp_path / "made")
    graph = onnx.load(file).graph
    makers = {output: node for node in graph.node for output in node.output}
    if name == "ort-static":
        products = [node for node in graph.node if node.op_type == "MatMul"]
        read = [makers[node.input[1]].op_type for node in products if node.input[1] in makers]
        heads = len([node for node in graph.node if node.op_type == "Softmax"])
        assert len(read) - read.count("DequantizeLinear") == 2 * heads  # in attention
        assert read.count("DequantizeLinear") > 3 * heads  # the last block reads one token, and has fewer
    else:
        assert any(node.op_type.startswith("MatMulInteger") for node in graph.node)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
