"""What could win: precisions a machine computes in, shares of its processors, runtimes that work here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import write_bundle
from vitdeploy.backends.base import Availability
from vitdeploy.backends.openvino import OpenVino
from vitdeploy.benchmark.cases import BenchTarget, open_targets
from vitdeploy.config import BatchRange
from vitdeploy.errors import UsageError
from vitdeploy.machine.gpus import Gpu
from vitdeploy.optimiser.contestants import contestants, precisions_here, splits

GPU = Gpu(name="NVIDIA L4", capability=(8, 9))


@pytest.mark.parametrize(
    "flags, gpus, expected",
    [
        (("avx2",), (), ("fp32",)),
        (("avx512_bf16",), (), ("fp32", "bf16")),
        (("asimdhp", "bf16"), (), ("fp32", "bf16", "fp16")),
        ((), (GPU,), ("fp32", "bf16", "fp16")),
    ],
)
def test_precisions(flags: tuple[str, ...], gpus: tuple[Gpu, ...], expected: tuple[str, ...]) -> None:
    found, missing = precisions_here(flags, gpus)
    assert found == expected
    assert {*found, *missing} == {"fp32", "bf16", "fp16"}
    assert all("there is no GPU" in why for why in missing.values())


@given(st.integers(1, 512), st.sampled_from(("latency", "throughput")))
def test_no_split_takes_more_than_there_is(processors: int, goal: str) -> None:
    found = splits(processors, goal)  # type: ignore[arg-type]
    assert 1 <= len(found) <= 3
    assert len(set(found)) == len(found)
    assert all(threads and threads * sessions <= processors for threads, sessions in found)
    assert (processors, 1) in found, "all of them for one session"
    assert goal == "throughput" or {sessions for _, sessions in found} == {1}


@pytest.fixture
def target(tmp_path: Path) -> BenchTarget:
    bundle = write_bundle(tmp_path / "b", precisions=("fp32", "bf16"), batch=BatchRange(1, 2, 8))
    (found,) = open_targets([bundle])
    return found


def test_groups_are_an_artifact_on_a_runtime(target: BenchTarget) -> None:
    groups, skipped = contestants(target, "latency", 1, processors=4, gpus=())
    assert [(group[0].backend, group[0].artifact) for group in groups] == [
        ("onnxruntime", "onnx-fp32"),
        ("openvino", "onnx-fp32"),
        ("openvino", "onnx-bf16"),
    ]
    assert [[case.threads for case in group if not case.spin] for group in groups] == [[1, 2, 4]] * 3
    assert [[case.threads for case in group if case.spin] for group in groups] == [[2, 4], [], []]
    assert [(one.backend, one.artifact) for one in skipped] == [("onnxruntime", "onnx-bf16")]
    assert "no bf16 kernels" in skipped[0].reason
    shared, _ = contestants(target, "throughput", 8, processors=4, gpus=())
    assert [(case.threads, case.concurrency) for case in shared[0] if not case.spin] == [
        (4, 1),
        (2, 2),
        (1, 4),
    ]
    assert [(case.threads, case.concurrency) for case in shared[0] if case.spin] == [(4, 1)]


def test_a_runtime_that_is_missing_is_said(target: BenchTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "availability", lambda self: Availability(False, "it is not installed"))
    groups, skipped = contestants(target, "latency", 1, processors=1, gpus=())
    assert [(group[0].backend, len(group)) for group in groups] == [("onnxruntime", 1)]
    assert [(one.backend, one.reason) for one in skipped if one.backend == "openvino"] == [
        ("openvino", "it is not installed")
    ] * 2


def test_what_is_asked_for_by_name(target: BenchTarget) -> None:
    groups, _ = contestants(target, "latency", 1, processors=1, gpus=(), backends=("openvino",))
    assert {case.backend for group in groups for case in group} == {"openvino"}
    assert contestants(target, "latency", 9, processors=1, gpus=())[0] == [], "8 at most"
    with pytest.raises(UsageError, match="unknown backend 'openvin'; did you mean 'openvino'"):
        contestants(target, "latency", 1, processors=1, gpus=(), backends=("openvin",))
