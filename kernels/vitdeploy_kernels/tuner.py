"""Finds the fastest configuration of every kernel at the shapes of given models, within a time budget.

Each candidate is checked against float64 on random inputs before it is timed. The timer, the clock and
what compiles ahead are arguments, so that the whole search runs without a GPU, too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from vitdeploy_kernels.candidates import candidates
from vitdeploy_kernels.config import Config, Entry, Route, Table, format_table, table_name
from vitdeploy_kernels.plans import Shape
from vitdeploy_kernels.problems import Problem, build
from vitdeploy_kernels.specs import Spec, flops, model_specs
from vitdeploy_kernels.support import UnsupportedError
from vitdeploy_kernels.timing import Timer, graph_timer, input_sets, median
from vitdeploy_kernels.vit import VitShape

Report = Callable[[str], None]
Build = Callable[[Spec, int], Problem]
"""Makes a set of inputs of a spec from a seed."""

UNFUSED: Mapping[str, Route] = {
    "layernorm_linear": "cublas",
    "linear_residual": "cublas",
    "layernorm_attention": "pair",
}
"""The other route of the kernels that have one."""


RATE = 7e14
"""FLOP per second of some large GPU."""
LEAST = 3e-6
"""Seconds that a launch takes there which has hardly anything to do."""

MODELS: Mapping[str, VitShape] = {
    "Ti/16": VitShape(width=192, heads=3, mlp_width=768),
    "S/16": VitShape(width=384, heads=6, mlp_width=1536),
    "B/16": VitShape(),
    "L/16": VitShape(width=1024, depth=24, heads=16, mlp_width=4096),
    "H/14": VitShape(patch=14, width=1280, depth=32, heads=16, mlp_width=5120),
}
"""Models by name whose shapes can be tuned for."""


@dataclass(frozen=True)
class Target:
    """The GPU that is tuned for; ``cache`` is its L2 cache in bytes."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    cache: int


@dataclass(frozen=True)
class Finding:
    """What was found for one spec.

    Attributes:
        spec: what was tuned.
        entry: the best configuration and route, None if every candidate was rejected.
        microseconds: medians by candidate, the unfused route included.
        rejected: why candidates were not timed.
    """

    spec: Spec
    entry: Entry | None
    microseconds: Mapping[str, float]
    rejected: Mapping[str, str]


def describe(config: Config) -> str:
    """``128x256x64 group 8, 8 warps, 3 stages``."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} group {config.group}, {config.warps} warps, {config.stages} stages"


def specs_of(shapes: Iterable[Shape], batches: Sequence[int], dtype: torch.dtype, table: Table) -> list[Spec]:
    """The specs of these models, those that take the largest share of their model's time first.

    ``add_layernorm`` comes before everything and ``layernorm_attention`` after: the cuBLASLt route needs the
    former, and what the latter is compared with is tuned before.
    """
    shares: dict[Spec, float] = {}
    norms: dict[Spec, float] = {}
    routes: tuple[Route, ...] = ("fused", "pair")
    for shape, batch, route in product(shapes, batches, routes):
        counts = model_specs(shape, dtype, batch, _with_route(table, route))
        times = {spec: count * _estimate(spec) for spec, count in counts.items()}
        total = sum(times.values())
        for spec, seconds in times.items():
            shares[spec] = max(shares.get(spec, 0.0), seconds / total)
        for tokens, width in shape.streams:
            norms[Spec("add_layernorm", (batch * tokens, width))] = 0.0
    last = "layernorm_attention"
    return [*norms, *sorted(shares, key=lambda spec: (spec.kernel == last, -shares[spec]))]


def _with_route(table: Table, route: Route) -> Table:
    """The table with one route for all of ``layernorm_attention``: plans with it and without."""
    name = "layernorm_attention"
    entries = tuple(replace(entry, route=route) for entry in table.kernels[name])
    return replace(table, kernels={**table.kernels, name: entries})


def _estimate(spec: Spec) -> float:
    """Seconds on some large GPU, and at least what the smallest launch takes; only for the order."""
    return flops(spec) / RATE + LEAST


def tune(
    specs: Sequence[Spec],
    target: Target,
    table: Table,
    *,
    build: Build,
    timer: Timer = graph_timer,
    budget: float = 240.0,
    clock: Callable[[], float] = time.monotonic,
    ready: Callable[[Spec, float], None] = lambda spec, seconds: None,
    keep: Callable[[Table], None] = lambda table: None,
    report: Report = lambda line: None,
) -> tuple[Table, list[Finding]]:
    """Tune specs in their order until the budget is spent.

    Args:
        specs: most valuable first.
        target: the GPU.
        table: where to start from; its choice for a shape is always among the candidates.
        build: makes problems.
        timer: times candidates.
        budget: seconds; a spec that was begun is finished.
        clock: seconds that have passed.
        ready: waits until a spec's candidates are compiled, at most so many seconds.
        keep: given the table after each spec, so that partial results are kept.
        report: told a line for each spec.

    Returns:
        The table with what was measured, and the findings.
    """
    start = clock()
    tuned = replace(table, gpu=target.name, measured=True)
    findings = []
    for done, spec in enumerate(specs):
        if clock() - start >= budget:
            report(f"the time is up: {done} of {len(specs)} shapes are tuned, the rest keep their defaults")
            break
        ready(spec, budget - (clock() - start))
        found = tune_one(spec, target, tuned, build=build, timer=timer)
        findings.append(found)
        if found.entry is not None:
            tuned = with_entry(tuned, spec.kernel, found.entry)
            keep(tuned)
        report(_line(found))
    return tuned, findings


def contestants_of(spec: Spec, target: Target, table: Table) -> list[Config]:
    """What is tried for a spec: what the table has for it, and the candidates."""
    found = candidates(spec, target.capability, target.multiprocessors)
    return list(dict.fromkeys([table.config(spec.kernel, spec.shape), *found]))


def tune_one(spec: Spec, target: Target, table: Table, *, build: Build, timer: Timer) -> Finding:
    """Check and time the candidates of one spec."""
    first = build(spec, 0)
    problems = [first, *(build(spec, i) for i in range(1, input_sets(first.size, target.cache)))]
    expected = first.expected()
    tried = contestants_of(spec, target, table)
    accepted: dict[str, tuple[Config, Route]] = {}
    rejected: dict[str, str] = {}
    contestants = {}
    for config in tried:
        runs = [problem.launch(config).run for problem in problems]
        wrong = _check(first, runs[0], expected)
        if wrong is None:
            accepted[describe(config)] = (config, "fused")
            contestants[describe(config)] = runs
        else:
            rejected[describe(config)] = wrong
    route = UNFUSED.get(spec.kernel)
    if route is not None and first.unfused is not None:
        runs = [problem.unfused(table) for problem in problems if problem.unfused is not None]
        wrong = _check(first, runs[0], expected)
        if wrong is None:
            accepted[route] = (tried[0], route)
            contestants[route] = runs
        else:
            rejected[route] = wrong
    if not accepted:
        return Finding(spec, None, {}, rejected)
    medians = {name: median(samples) for name, samples in timer(contestants).items()}
    best = min(medians, key=lambda name: medians[name])
    fused = {name: value for name, value in medians.items() if name != route}
    config = accepted[min(fused, key=lambda name: fused[name])][0] if fused else accepted[best][0]
    entry = Entry(spec.shape, config, accepted[best][1], round(medians[best], 2))
    return Finding(spec, entry, medians, rejected)


def _check(problem: Problem, run: Callable[[], None], expected: Tensor) -> str | None:
    """What is wrong with what a run writes; None if nothing is."""
    problem.output.fill_(float("nan"))
    try:
        with contextlib.redirect_stdout(None):  # Triton prints a failing kernel's whole assembly
            run()
        if problem.output.is_cuda:
            torch.cuda.synchronize(problem.output.device)
    except Exception as error:  # a candidate that does not compile or fit is a result, not a failure
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return problem.wrong(expected)


def with_entry(table: Table, kernel: str, entry: Entry) -> Table:
    """The table with one entry more, in place of one of the same shape."""
    others = [each for each in table.kernels.get(kernel, ()) if each.shape != entry.shape]
    return replace(table, kernels={**table.kernels, kernel: (*others, entry)})


def _line(found: Finding) -> str:
    if found.entry is None:
        return f"{found.spec}: every candidate was rejected: {next(iter(found.rejected.values()))}"
    entry = found.entry
    how = describe(entry.config) if entry.route == "fused" else entry.route
    others = f"best of {len(found.microseconds)}" + (
        f", {len(found.rejected)} rejected" * bool(found.rejected)
    )
    return f"{found.spec}: {entry.microseconds} us, {how} ({others})"


def write_table(table: Table, folder: Path) -> Path:
    """Write a GPU's table under its name, whole or not at all."""
    path = folder / table_name(table.gpu)
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        temporary.write_text(format_table(table), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def this_gpu(device: torch.device | None = None) -> Target:
    """The GPU of this machine.

    Raises:
        UnsupportedError: there is none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("needs an NVIDIA GPU, and PyTorch sees none")
    facts = torch.cuda.get_device_properties(device or torch.device("cuda"))
    return Target(facts.name, (facts.major, facts.minor), facts.multi_processor_count, facts.L2_cache_size)


def random_problems(dtype: torch.dtype, device: torch.device) -> Build:
    """Builds random problems on a device."""
    return lambda spec, seed: build(spec, dtype, device, seed)
