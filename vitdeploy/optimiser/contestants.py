"""What could win on a machine: the precisions to build, and what to run them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from vitdeploy.backends.base import all_backends, get_backend
from vitdeploy.backends.onnxruntime import available_providers
from vitdeploy.backends.onnxruntime_providers import PROVIDERS
from vitdeploy.benchmark.cases import BenchTarget, Case, Choices, cases_of, serves
from vitdeploy.benchmark.ranking import Goal
from vitdeploy.benchmark.results import SkippedCase
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.config import Precision
from vitdeploy.machine.gpus import Gpu

_INSTRUCTIONS: Mapping[Precision, tuple[str, ...]] = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "asimdhp"),
}
"""Of processors, any of which makes the precision one to compute in; without them it is widened to fp32."""
_MOST_SESSIONS: Final = 8
"""At the same time on the CPU; each has the weights once more."""

Split = tuple[int | None, int]
"""Threads of a session (None is the runtime's own choice), and sessions at the same time."""


def precisions_here(
    flags: Sequence[str], gpus: Sequence[Gpu]
) -> tuple[tuple[Precision, ...], dict[ArtifactPrecision, str]]:
    """The float precisions that this machine computes in, fp32 first, and why not the others.

    Args:
        flags: the processor's instructions, as ``machine.identity.Cpu`` has them.
    """
    missing: dict[ArtifactPrecision, str] = {}
    for precision, needed in _INSTRUCTIONS.items():
        if not gpus and not set(needed) & set(flags):
            missing[precision] = (
                f"this processor does not compute in {precision} ({' or '.join(needed)}), and there is no GPU"
            )
    return ("fp32", *(p for p in _INSTRUCTIONS if p not in missing)), missing


def splits(processors: int, goal: Goal) -> tuple[Split, ...]:
    """How the processors can be shared out: for latency all, half and one for one session; for throughput
    all of them at work, in one session, two, or one each (eight at most)."""
    if goal == "latency":
        return tuple((threads, 1) for threads in sorted({1, max(1, processors // 2), processors}))
    counts = sorted({1, min(2, processors), min(_MOST_SESSIONS, processors)})
    return tuple((processors // count, count) for count in counts)


def contestants(
    target: BenchTarget,
    goal: Goal,
    batch: int,
    *,
    processors: int,
    gpus: Sequence[Gpu],
    backends: Sequence[str] | None = None,
) -> tuple[list[list[Case]], list[SkippedCase]]:
    """Cases in groups of one artifact on one runtime, and what of them does not run here, and why.

    Args:
        batch: images that are computed together; what does not serve so many is left out.
        backends: names; those that could win when omitted. On the CPU these read an artifact's own files:
            PyTorch on the CPU has to be asked for by name.

    Raises:
        UsageError: an unknown backend.
    """
    names = [get_backend(name).name for name in backends or ()] or [b.name for b in all_backends()]
    asked = backends is not None
    cpu, gpu = splits(processors, goal), ((None, 1), *(((None, 2),) if goal == "throughput" else ()))
    found: list[Case] = []
    skipped: dict[tuple[str, str], SkippedCase] = {}
    for name in names:
        traits = get_backend(name).traits
        ways: list[tuple[Sequence[Split], Choices]] = []
        if not traits.needs_gpu and (asked or traits.formats):
            ways.append((cpu, Choices(spin=(False, True))))
        if gpus and traits.needs_gpu:
            ways.append((gpu, Choices()))
        elif gpus and traits.providers:
            here = available_providers()
            others = (p for p in traits.providers if p != "cpu" and PROVIDERS[p] in here)
            ways += [(gpu, Choices(backends=(name,), provider=provider)) for provider in others]
        elif gpus and "cuda" in traits.devices:
            ways.append((gpu, Choices(device="cuda")))
        for shares, choices in ways:
            cases, missing = _cases(target, name, shares, choices)
            found += [case for case in cases if serves(case, batch)]
            skipped |= {(one.backend, one.artifact): one for one in missing}
    groups: dict[tuple[str, str, object, str], list[Case]] = {}
    for case in found:
        groups.setdefault((case.backend, case.provider, case.job["device"], case.artifact), []).append(case)
    ran = {(case.backend, case.artifact) for case in found}
    return list(groups.values()), [one for key, one in skipped.items() if key not in ran]


def _cases(
    target: BenchTarget, backend: str, shares: Sequence[Split], choices: Choices
) -> tuple[list[Case], list[SkippedCase]]:
    """The cases of one backend, for each share of the processors."""
    threads, counts = (tuple(dict.fromkeys(column)) for column in zip(*shares, strict=True))
    cases, skipped = cases_of(target, replace(choices, threads=threads, concurrency=counts))
    mine = [
        case
        for case in cases
        if case.backend == backend and (case.threads, case.concurrency) in shares and _may_spin(case)
    ]
    return mine, [one for one in skipped if one.backend == backend]


def _may_spin(case: Case) -> bool:
    """False where spinning threads would only keep cores from one another's sessions, or there are none."""
    return not case.spin or (case.concurrency == 1 and case.threads != 1)
