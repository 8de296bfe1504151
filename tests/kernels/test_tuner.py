"""The tuner, driven by a fake timer where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.paths import ROOT
from vitdeploy_kernels import warming
from vitdeploy_kernels.candidates import SPACES, candidates, shared_memory
from vitdeploy_kernels.config import Config, load_table, shipped_table, table_name
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.occupancy import LIMITS
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.problems import BUILDERS, Problem, build
from vitdeploy_kernels.specs import Spec
from vitdeploy_kernels.timing import Run, graph_timer, input_sets, median, spread
from vitdeploy_kernels.tuner import (
    Target,
    contestants_of,
    describe,
    specs_of,
    this_gpu,
    tune,
    tune_one,
    write_table,
)
from vitdeploy_kernels.vit import VitShape
from vitdeploy_kernels.warming import binary

HOPPER = Target("Fake GPU 9000", (9, 0), 132, 1000)
TABLE = shipped_table((9, 0))
LINEAR = Spec("layernorm_linear", (5, 48, 32), (("activation", "gelu"),))
PIXELS = {"nhwc": 1, "patch": 4, "channels": 3, "height": 8, "width": 8, "prefix": 1}
SPECS = (
    LINEAR,
    Spec("linear_residual", (5, 32, 48)),
    Spec("patch_embed", (10, 32, 48), tuple(PIXELS.items())),
    Spec("patch_embed", (10, 32, 48), tuple({**PIXELS, "nhwc": 0}.items())),
    Spec("head_linear", (2, 16, 32), (("heads", 3),)),
    Spec("add_layernorm", (5, 48)),
    Spec("attention", (6, 17, 16), (("heads", 3),)),
    Spec("attention", (6, 17, 16), (("heads", 3), ("biased", 1))),
    Spec("layernorm_attention", (6, 17, 48), (("heads", 3),)),
    Spec("layernorm_attention", (6, 17, 48), (("heads", 3), ("biased", 1))),
    Spec("absorbed_attention", (2, 17, 48), (("rows", 3),)),
)
TINY = VitShape(image_size=(16, 16), patch=8, width=48, depth=3, heads=3, mlp_width=96, classes=10)


class FakeTimer:
    """Says that everything takes 10 us, but for what it was told."""

    def __init__(self, times: Mapping[str, float]) -> None:
        self.times, self.seen = times, list[set[str]]()

    def __call__(self, contestants: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
        self.seen.append(set(contestants))
        return {name: [self.times.get(name, 10.0)] * 3 for name in contestants}


def problem(spec: Spec, seed: int) -> Problem:
    return build(spec, torch.float16, torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_problems_are_solved_by_their_kernel_and_its_other_route(spec: Spec, device: torch.device) -> None:
    made = build(spec, torch.float16, device, 3)
    expected = made.expected()
    made.output.fill_(float("nan"))
    assert "relative error inf" in str(made.wrong(expected))
    made.launch(TABLE.config(spec.kernel, spec.shape)).run()
    assert made.wrong(expected) is None
    assert (made.unfused is not None) == (
        spec.kernel in ("layernorm_linear", "linear_residual", "layernorm_attention")
    )
    if made.unfused is not None:
        made.output.fill_(float("nan"))
        made.unfused(TABLE)()
        assert made.wrong(expected) is None


def test_every_kernel_has_problems_and_candidates() -> None:
    assert {spec.kernel for spec in SPECS} == set(BUILDERS) == set(SPACES) == set(TABLE.kernels)


def test_the_fastest_candidate_is_chosen(device: torch.device) -> None:
    tried = contestants_of(LINEAR, HOPPER, TABLE)
    timer = FakeTimer({describe(tried[2]): 4.0, "cublas": 5.0})
    found = tune_one(LINEAR, HOPPER, TABLE, build=problem, timer=timer)
    assert timer.seen == [{*map(describe, tried), "cublas"}]
    assert found.entry is not None
    assert (found.entry.config, found.entry.route, found.entry.microseconds) == (tried[2], "fused", 4.0)
    assert not found.rejected


def test_the_other_route_is_chosen_where_it_is_faster(device: torch.device) -> None:
    tried = contestants_of(LINEAR, HOPPER, TABLE)
    timer = FakeTimer({describe(tried[1]): 4.0, "cublas": 3.0})
    found = tune_one(LINEAR, HOPPER, TABLE, build=problem, timer=timer)
    assert found.entry is not None
    assert (found.entry.config, found.entry.route, found.entry.microseconds) == (tried[1], "cublas", 3.0)


def test_a_wrong_candidate_is_never_timed(device: torch.device) -> None:
    tried = contestants_of(LINEAR, HOPPER, TABLE)
    wrong, broken = tried[1], tried[2]

    def faulty(spec: Spec, seed: int) -> Problem:
        good, other = problem(spec, seed), problem(spec, seed + 100)

        def launch(config: Config) -> Launch:
            if config == wrong:  # the right shape, from other inputs
                stranger = other.launch(config)
                return replace(stranger, arguments={**stranger.arguments, "out_ptr": good.output})
            made = good.launch(config)
            return replace(made, constants={}) if config == broken else made

        return replace(good, launch=launch)

    timer = FakeTimer({describe(wrong): 0.1, describe(broken): 0.1})
    found = tune_one(LINEAR, HOPPER, TABLE, build=faulty, timer=timer)
    assert not {describe(wrong), describe(broken)} & timer.seen[0]
    assert found.rejected[describe(wrong)].startswith("relative error")
    assert "missing" in found.rejected[describe(broken)]
    assert found.entry is not None
    assert found.entry.config not in (wrong, broken)


def test_nothing_is_recorded_if_every_candidate_is_wrong(device: torch.device) -> None:
    def useless(spec: Spec, seed: int) -> Problem:
        good = problem(spec, seed)
        return replace(good, expected=lambda: good.expected() + 1)

    lines: list[str] = []
    tuned, (found,) = tune([LINEAR], HOPPER, TABLE, build=useless, timer=FakeTimer({}), report=lines.append)
    assert found.entry is None
    assert tuned.kernels == TABLE.kernels
    assert "every candidate was rejected: relative error" in lines[0]


def test_the_budget_ends_the_search_and_what_was_found_is_kept(device: torch.device, tmp_path: Path) -> None:
    ticks = iter(range(0, 1000, 25))
    specs = [SPECS[5], SPECS[1], LINEAR]
    lines: list[str] = []
    kept = []
    tuned, findings = tune(
        specs,
        HOPPER,
        TABLE,
        build=problem,
        timer=FakeTimer({}),
        budget=100,
        clock=lambda: float(next(ticks)),
        keep=lambda table: kept.append(load_table(write_table(table, tmp_path))),
        report=lines.append,
    )
    assert len(findings) == 2
    assert "the time is up: 2 of 3" in lines[-1]
    assert [table.entry("add_layernorm", (5, 48)).microseconds for table in kept] == [10.0, 10.0]
    assert kept[-1].entry("linear_residual", (5, 32, 48)).microseconds == 10.0
    assert kept[-1].gpu == "Fake GPU 9000"
    assert kept[-1].measured
    assert set(tuned.kernels["layernorm_linear"]) == set(TABLE.kernels["layernorm_linear"])


def test_an_entry_of_the_same_shape_is_replaced(device: torch.device) -> None:
    tuned, _ = tune([SPECS[5]], HOPPER, TABLE, build=problem, timer=FakeTimer({}))
    again, _ = tune([SPECS[5]], HOPPER, tuned, build=problem, timer=FakeTimer({}))
    assert len(again.kernels["add_layernorm"]) == len(TABLE.kernels["add_layernorm"]) + 1


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(replace(TABLE, gpu="NVIDIA H200"), tmp_path)
    assert path.name == table_name("NVIDIA H200") == "NVIDIA_H200.json"
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_table(replace(TABLE, gpu="NVIDIA H200", measured=True), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_the_most_valuable_shapes_come_first() -> None:
    specs = specs_of([TINY], [1, 64], torch.float16, TABLE)
    names = [spec.kernel for spec in specs]
    assert names[:2] == ["add_layernorm"] * 2
    assert names[-2:] == ["layernorm_attention"] * 2
    assert set(names) == set(BUILDERS)
    assert len(set(specs)) == len(specs)
    big = specs_of([VitShape()], [64], torch.float16, TABLE)
    assert big[1].kernel in ("layernorm_linear", "linear_residual")
    assert max(big[1].shape) == 12608


@given(
    rows=st.integers(1, 60000),
    columns=st.integers(16, 6000),
    depth=st.integers(16, 6000),
    capability=st.sampled_from([*LIMITS, (9, 1), (12, 1)]),
    limit=st.integers(1, 20),
)
def test_candidates_are_few_and_fit(
    rows: int, columns: int, depth: int, capability: tuple[int, int], limit: int
) -> None:
    spec = Spec("linear_residual", (rows, columns, depth))
    found = candidates(spec, capability, 100, limit)
    memory = LIMITS[max(each for each in LIMITS if each <= capability)].shared_per_program
    assert 1 <= len(found) == len(set(found)) <= limit
    assert all(shared_memory(spec, config) <= memory for config in found)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("capability", LIMITS)
def test_every_kernel_has_candidates_everywhere(spec: Spec, capability: tuple[int, int]) -> None:
    assert len(candidates(spec, capability, 100)) > 1


def test_one_binary_serves_every_row_count() -> None:
    def key(rows: int, warps: int = 4) -> object:
        spec = Spec("linear_residual", (rows, 32, 48))
        made = build(spec, torch.float16, torch.device("meta"))
        return binary(made.launch(Config(16, 16, 16, 1, warps, 2)))

    assert len({key(1), key(16), key(17), key(48)}) == 1
    assert key(16) != key(16, warps=8)


def test_triton_compiles_nothing_apart_for_a_row_count() -> None:
    program = """
import importlib, pkgutil, vitdeploy_kernels
from triton.runtime.jit import JITFunction
names = [m.name for m in pkgutil.iter_modules(vitdeploy_kernels.__path__, "vitdeploy_kernels.")]
kernels = {
    value
    for name in names
    for key, value in vars(importlib.import_module(name)).items()
    if isinstance(value, JITFunction) and key.endswith("_kernel")
}
rows = [p for kernel in kernels for p in kernel.params if p.name == "rows"]
print(len(kernels), len(rows), sum(p.do_not_specialize for p in rows))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10", "6", "6"]


def test_each_binary_is_compiled_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[object, ...]] = []

    class Pool:
        def __init__(self, *_: object) -> None: ...

        def submit(self, *job: object) -> Future[None]:
            jobs.append(job)
            done: Future[None] = Future()
            done.set_exception(RuntimeError("does not compile")) if len(jobs) == 1 else done.set_result(None)
            return done

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(warming, "ProcessPoolExecutor", Pool)
    small, large = (Spec("linear_residual", (rows, 32, 48)) for rows in (17, 33))
    configs = [Config(16, 16, 16, 1, 4, 2), Config(16, 32, 16, 1, 4, 2)]
    with warming.Warmer(torch.float16, 2) as warmer:
        warmer.submit({small: configs, large: configs})
        assert [job[1:] for job in jobs] == [(small, torch.float16, config) for config in configs]
        warmer.ready(small, 60.0)
        warmer.ready(large, -1.0)
        warmer.submit_plan(TINY, 1, TABLE)
        distinct = {binary(launch) for _, launch in launches(TINY, torch.float16, 1, TABLE)}
        assert len(jobs) == 2 + len(distinct)
        warmer.finish(60.0)


def test_inputs_are_larger_than_the_cache() -> None:
    assert input_sets(10**6, 50 * 10**6) == 32
    assert input_sets(10**7, 50 * 10**6) == 10
    assert input_sets(10**9, 50 * 10**6) == 2


def test_median_and_spread() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([2.0]) == 0.0
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.5)


def test_without_a_gpu_there_is_one_clear_line() -> None:
    script = ROOT / "kernels" / "tune.py"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=hidden
    )
    assert done.returncode == 3
    assert done.stderr == "tune: needs an NVIDIA GPU, and PyTorch sees none\n"


@pytest.mark.gpu
def test_tuning_on_this_gpu(tmp_path: Path) -> None:
    target = this_gpu()
    spec = Spec("linear_residual", (1576, 768, 768))
    found = tune_one(spec, target, shipped_table(target.capability), build=problem, timer=graph_timer)
    assert found.entry is not None
    assert found.entry.microseconds is not None
    assert 0.5 < found.entry.microseconds < 1000
