"""The tables of vitdeploy against other tools: made right, true to the committed results, and up to date."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.peers import table
from benchmarks.peers.catalogue import PEERS
from vitdeploy.benchmark.results import Cell, Cpu, Environment, Parity, Results, Settings, Skipped, Subject
from vitdeploy.errors import UsageError

BATCHES = (1, 8)
ROUNDS = 5
OURS = {
    ("onnxruntime", "fp32"): 80.0,
    ("openvino", "fp32"): 75.0,
    ("openvino", "bf16"): 50.0,
    ("torch", "fp32"): 180.0,
    ("torch-compile", "fp32"): 81.0,
    ("aotinductor", "fp32"): 82.0,
}
Speeds = Callable[[str], float]


def cell(backend: str, precision: str, batch: int, ms: float, **more: object) -> Cell:
    """A cell whose rounds are 1 % apart, a slow machine slowing all cells alike in round 3."""
    samples = [ms * batch * (1 + 0.01 * i) * (2 if i == 3 else 1) for i in range(ROUNDS) for _ in range(2)]
    fields: dict[str, object] = {
        "subject": "vit",
        "backend": backend,
        "provider": "cpu",
        "artifact": f"onnx-{precision}",
        "precision": precision,
        "executes": precision,
        "batch": batch,
        "image_size": (224, 224),
        "threads": 2,
        "concurrency": 1,
        "status": "ok",
        "p50_ms": sorted(samples)[ROUNDS],
        "samples_ms": samples,
        "round_samples": 2,
        "parity": Parity(passed=True, relative=1e-6, tolerance=5e-5),
    }
    return Cell.model_validate(fields | more)


def measured(slower: Speeds, skipped: tuple[Skipped, ...] = (), model: str = table.FLAGSHIP) -> Results:
    """Results in which each peer takes ``slower(name)`` times as long as ours on the same runtime."""
    cells = [cell(*ours, batch, ms) for (ours, ms), batch in itertools.product(OURS.items(), BATCHES)]
    for (name, peer), batch in itertools.product(PEERS.items(), BATCHES):
        if peer.backend not in {one.backend for one in skipped}:
            ms = OURS[peer.runtime, peer.precision] * slower(name)
            at = {"provider": peer.runtime, "artifact": peer.artifact}
            cells.append(cell(peer.backend, peer.precision, batch, ms, **at))
    environment = Environment(
        vitdeploy="1",
        python="3.11",
        platform="Linux",
        cpu=Cpu(name="a processor", flags=(), threads=2, memory=None),
        libraries={},
    )
    return Results(
        created="2026-01-01T00:00:00Z",
        command="make bench-peers",
        environment=environment,
        settings=Settings(budget_s=1, seed=0, batches=BATCHES, threads=(2,), concurrency=(1,)),
        subjects=(Subject(name="vit", model=model, digest="0", image_size=(224, 224), parameters=1),),
        rounds=ROUNDS,
        cells=tuple(cells),
        skipped=skipped,
    )


def rows(results: Results) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in table.tables([results]).splitlines() if "|" in line]
    return {row[0]: row[1:] for row in cells}


def test_rows_hold_each_peer_against_ours_on_its_runtime() -> None:
    found = rows(measured(lambda name: 1.1))
    assert found["**vitdeploy** on ONNX Runtime, fp32"] == ["**81.6**", "**652.8**"]
    assert found["— optimum-onnx"] == ["89.8, 1.10 × (1.10 to 1.10)", "718.1, 1.10 × (1.10 to 1.10)"]
    last = found["**vitdeploy's fastest against the fastest other tool**"][0]
    assert last.startswith("**1.10 × (1.10 to 1.10)**: OpenVINO, bf16 against ")
    titles = [peer.title for peer in PEERS.values()]
    assert len(found) == 2 + len(OURS) + len(set(titles)) + 1


def test_the_summary_holds_plain_exports_against_ours_by_runtime() -> None:
    lines = table.summary(measured(lambda name: 1.1)).splitlines()
    assert "| ONNX Runtime, fp32: **vitdeploy** | **81.6** | **652.8** |" in lines
    assert "| — torch.onnx.export | 89.8, 1.10 × (1.10 to 1.10) | 718.1, 1.10 × (1.10 to 1.10) |" in lines
    assert sum(line.startswith("| — ") for line in lines) == 3
    assert lines[-1].endswith("| 1.10 × (1.10 to 1.10) | 1.10 × (1.10 to 1.10) |")


def test_rounds_that_were_measured_again_are_not_paired() -> None:
    ours, theirs = cell("a", "fp32", 1, 10.0), cell("b", "fp32", 1, 20.0)
    assert table.ratio(ours, theirs) == (2.0, 2.0, 2.0)
    again = table.ratio(ours, theirs.model_copy(update={"repeats": 1}))
    assert again.q1 < 2.0 < again.q3


def test_a_wrong_cell_is_struck_through_and_never_ranked() -> None:
    results = measured(lambda name: 1.1)
    wrong = Parity(passed=False, failures=("relative",), relative=1.0, tolerance=5e-5)
    cells = [
        c.model_copy(update={"parity": wrong, "p50_ms": 1.0}) if c.backend == "openvino" else c
        for c in results.cells
    ]
    results = results.model_copy(update={"cells": tuple(cells)})
    assert rows(results)["**vitdeploy** on OpenVINO, fp32"] == ["**~~1.0~~ wrong**"] * 2
    assert (
        "1.0"
        not in rows(results)["**vitdeploy's fastest against the fastest other tool**"][0].partition(":")[2]
    )
    assert any("OpenVINO, fp32, batch 1" in line for line in table.broken_claims(results))


def test_a_skipped_peer_is_said() -> None:
    lost = Skipped(subject="vit", backend="timm", artifact="onnx-fp32", reason="no disk space")
    results = measured(lambda name: 1.1, (lost,))
    assert "Not measured: timm onnx-fp32 (no disk space)." in table.tables([results])
    assert "— timm's export" not in rows(results)
    assert table.broken_claims(results) == [
        f"ONNX Runtime, fp32, batch {batch}, timm's export: not measured, or wrong" for batch in BATCHES
    ]


@pytest.mark.parametrize(
    "factor, broken", [(1.10, 0), (1.06, 5), (1.04, 10), (0.97, 12)], ids=["hold", "batch 8", "both", "all"]
)
def test_claims(factor: float, broken: int) -> None:
    """Three exporters on ONNX Runtime and one in each precision on OpenVINO; and the pick, per batch."""
    assert len(table.broken_claims(measured(lambda name: factor))) == broken


def test_claims_of_other_models_are_about_the_pick_alone() -> None:
    results = measured(lambda name: 1.0, model="vit_tiny_patch16_224")
    assert table.broken_claims(results) == []
    results = measured(lambda name: 0.9 if name == "timm" else 0.5, model="vit_tiny_patch16_224")
    assert len(table.broken_claims(results)) == len(BATCHES)


def test_partial_results_are_refused(tmp_path: Path) -> None:
    for name in table.SIZES:
        results = measured(lambda peer: 1.1, model=name).model_copy(update={"partial": True})
        (tmp_path / f"cpu-{name}.json").write_text(results.model_dump_json())
    with pytest.raises(UsageError, match="partial"):
        table.committed(tmp_path)


def test_the_documents_say_what_the_committed_results_say() -> None:
    results = table.committed()
    assert table.PART.read() == table.tables(results)
    assert table.SUMMARY.read() == table.summary(results[0])
    assert [line for one in results for line in table.broken_claims(one)] == []
