"""Builds with the full TensorRT, played by its double: which calls are made of each version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

from tests.fakes.machines import FULL, L4, NEW, OLD, Machine, MakeJob, MakeMachine, build, every_version
from tests.fakes.tensorrt_builds import attention
from vitdeploy.config import BatchRange
from vitdeploy.errors import (
    UsageError,
)
from vitdeploy.machine.cache import cache_folder
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt import builder
from vitdeploy.tensorrt.caches import TimingCache
from vitdeploy.tensorrt.engine_file import read_header

ONE = (BatchRange(1, 2, 8),)


def flags(here: Machine) -> list[str]:
    return [call["flag"].name for call in here.calls("set_flag")]


@pytest.mark.slow
@every_version
def test_an_engine_is_built_for_the_gpu_that_is_here(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    here, wanted = machine(version), job()
    result = build(wanted)
    assert (result.version, result.gpu) == (version, "NVIDIA L4")
    assert result.proof.ok
    assert {op.name for op in result.proof.ops} == {
        "norm",
        "attn.q",
        "attn/MatMul",
        "attn/Softmax",
        "attn/MatMul_2",
    }
    plan = Path(wanted.outputs[0]).read_bytes()
    assert read_header(plan, "plan").version_text == version
    assert result.engines[0].size == len(plan)
    assert [call["flag"].name for call in here.calls("clear_flag")] == ["TF32"]
    assert here.assigned("profiling_verbosity") == ["DETAILED"]
    assert flags(here) == []
    for untouched in (
        "builder_optimization_level=",
        "hardware_compatibility_level=",
        "set_memory_pool_limit",
    ):
        assert not here.calls(untouched)


@every_version
def test_the_network_is_strongly_typed_by_the_versions_own_number(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    here = machine(version)
    build(job())
    (made,) = here.calls("create_network")
    assert made["flags"] == {OLD: 2, "10.16.1.11": 2, NEW: 1}[version]


@pytest.mark.slow
@every_version
@pytest.mark.parametrize(
    "profiles", [ONE, (BatchRange(1, 1, 1), BatchRange(1, 4, 16), BatchRange(16, 32, 64))]
)
def test_profiles(version: str, profiles: tuple[BatchRange, ...], machine: MakeMachine, job: MakeJob) -> None:
    here = machine(version)
    build(job(profiles=profiles))
    shapes = [tuple(call[name][0] for name in ("min", "opt", "max")) for call in here.calls("set_shape")]
    assert shapes == [(batch.min, batch.opt, batch.max) for batch in profiles]
    assert len(here.calls("add_optimization_profile")) == len(profiles)
    assert {call["input"] for call in here.calls("set_shape")} == {"x"}
    assert {call["max"][1:] for call in here.calls("set_shape")} == {(3, 4)}


@pytest.mark.slow
@every_version
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"version_compatible": True}, ["VERSION_COMPATIBLE"]),
        ({"weights": "refit"}, ["REFIT"]),
        ({"weights": "stripped"}, ["REFIT", "STRIP_PLAN"]),
    ],
)
def test_flags(
    version: str, settings: dict[str, Any], expected: list[str], machine: MakeMachine, job: MakeJob
) -> None:
    here = machine(version)
    (engine,) = build(job(**settings)).engines
    assert flags(here) == expected
    assert (engine.fusion is None) == (settings.get("weights") == "stripped")


@every_version
def test_workspace_and_level(version: str, machine: MakeMachine, job: MakeJob) -> None:
    here = machine(version)
    build(job(workspace=1 << 28, level=5))
    (limit,) = here.calls("set_memory_pool_limit")
    assert (limit["pool"].name, limit["pool_size"]) == ("WORKSPACE", 1 << 28)
    assert here.assigned("builder_optimization_level") == [5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, hardware, known",
    [(version, "ampere_plus", True) for version in FULL]
    + [(version, "same_compute_capability", version != OLD) for version in FULL],
)
def test_hardware_compatibility(
    version: str, hardware: str, known: bool, machine: MakeMachine, job: MakeJob
) -> None:
    here = machine(version)
    if known:
        build(job(hardware=hardware))
        assert here.assigned("hardware_compatibility_level") == [hardware.upper()]
    else:
        with pytest.raises(UsageError, match="has no SAME_COMPUTE_CAPABILITY compatibility"):
            build(job(hardware=hardware))


@every_version
def test_progress_is_reported(version: str, machine: MakeMachine, job: MakeJob) -> None:
    machine(version)
    said: list[tuple[str, float]] = []
    builder.run_build_job(job(engines=2), lambda phase, fraction: said.append((phase, fraction)))
    fractions = [fraction for _, fraction in said]
    assert said[0] == ("parsing", 0.0)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {phase for phase, _ in said} == {"parsing", "Building engine"}


@pytest.mark.slow
@every_version
def test_what_was_measured_is_kept_for_the_next_build(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    machine(version)
    build(job())
    kept = TimingCache.of(version, "NVIDIA L4").file
    first = json.loads(kept.read())
    assert first["timed"]
    here = machine(version)
    build(job())
    (given, others) = (bytes(call["serialized_timing_cache"]) for call in here.calls("create_timing_cache"))
    assert json.loads(given) == json.loads(others) == first
    assert json.loads(kept.read())["builds"] == first["builds"] + 1


def test_each_version_and_gpu_has_measurements_of_its_own(machine: MakeMachine, job: MakeJob) -> None:
    for version, gpu in ((OLD, L4), (NEW, L4), (NEW, Gpu("NVIDIA L40S", (8, 9)))):
        machine(version, gpu)
        build(job())
    names = {path.name for path in (cache_folder() / "timing").iterdir() if not path.name.endswith(".lock")}
    assert names == {"10.8.0.43-NVIDIA_L4", "11.4.0.106-NVIDIA_L4", "11.4.0.106-NVIDIA_L40S"}


@every_version
def test_what_another_process_measured_meanwhile_stays(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    here = machine(version)
    kept = TimingCache.of(version, "NVIDIA L4").file

    def meanwhile(phase: str, fraction: float) -> None:
        if fraction == 1.0:
            origin = [list(map(int, version.split("."))), list(L4.capability)]
            kept.write(json.dumps({"origin": origin, "builds": 1, "timed": ["another layer"]}).encode())

    builder.run_build_job(job(), meanwhile)
    assert here.calls("combine")
    timed = json.loads(kept.read())["timed"]
    assert "another layer" in timed
    assert len(timed) > 1


@pytest.mark.slow
@every_version
@pytest.mark.parametrize("data", [b"junk", json.dumps({"origin": "elsewhere", "builds": 3}).encode()])
def test_a_damaged_or_foreign_timing_cache_is_replaced(
    version: str, data: bytes, machine: MakeMachine, job: MakeJob
) -> None:
    machine(version)
    kept = TimingCache.of(version, "NVIDIA L4").file
    kept.write(data)
    build(job())
    assert json.loads(kept.read())["builds"] == 1


@every_version
def test_without_a_timing_cache_nothing_is_kept(version: str, machine: MakeMachine, job: MakeJob) -> None:
    here = machine(version)
    build(job(timing_cache=False))
    assert not here.calls("create_timing_cache")
    assert not cache_folder().exists()


@every_version
def test_the_engine_itself_says_what_it_fuses(version: str, machine: MakeMachine, job: MakeJob) -> None:
    machine(version)
    result = build(job())
    assert result.fusion.source == "network"
    (engine,) = result.engines
    assert engine.fusion is not None
    assert engine.fusion.source == "engine"
    assert engine.fusion.lines() == ("1/1 attention fused", "1/1 LayerNorm fused", "1/1 GELU fused")


@pytest.mark.slow
@every_version
def test_single_precision_attention_is_not_fused(version: str, machine: MakeMachine, job: MakeJob) -> None:
    machine(version)
    (engine,) = build(job(attention(TensorProto.FLOAT), precision="fp32")).engines
    assert engine.fusion is not None
    assert engine.fusion.lines()[0] == "0/1 attention fused"
    assert any("half precision" in line for line in engine.fusion.lines())
