"""When a reduced precision fails: which operation breaks first, and the fewest that must stay in fp32.

The search runs the deployed model in fp32 and rounds what a site reads and writes to the reduced dtype,
which is what hardware with fp32 accumulators does, at the speed of fp32. What it finds is only a
proposal: the exporter emits it and holds the real artifact against the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitdeploy.model.deployed import Add
from vitdeploy.model.precision import PrecisionPlan, sites

MOST_BRANCHES = 8
"""More sites than this beside the residual stream, and a wider dtype serves better than islands."""

Verdict = Callable[[tuple[Tensor, ...]], bool]


@dataclass(frozen=True)
class Proposal:
    """The fewest islands that pass, and why they are needed."""

    islands: frozenset[str]
    first: str
    """The first operation, in order of execution, that breaks."""
    reason: str


@dataclass
class _Search:
    model: nn.Module
    plan: PrecisionPlan
    inputs: Tensor
    accepts: Verdict
    verdicts: dict[frozenset[str], bool] = field(default_factory=dict)

    def passes(self, islands: frozenset[str]) -> bool:
        if islands not in self.verdicts:
            self.verdicts[islands] = self.accepts(
                emulate(self.model, self.plan.with_islands(islands), self.inputs)
            )
        return self.verdicts[islands]


@torch.inference_mode()
def smallest_islands(
    model: nn.Module, plan: PrecisionPlan, inputs: Tensor, accepts: Verdict
) -> Proposal | None:
    """Find the fewest islands with which ``plan`` gives an acceptable output.

    Args:
        model: the deployed model in fp32, made of sites.
        inputs: what the model reads, (K, ...).
        accepts: whether the outputs, each (K, ...), are close enough to the reference.

    Returns:
        None when not even a small set of islands helps.
    """
    search = _Search(model, plan, inputs, accepts)
    named = [(name, site) for name, site in sites(model) if not site.always_fp32]
    adds = [name for name, module in named if isinstance(module, Add)]
    others = [name for name, module in named if not isinstance(module, Add)]
    overflowing = _overflowing(model, plan.default)
    branches = _needed(search, others, frozenset(adds), frozenset(overflowing))
    if branches is None:
        return None
    stream = _stretch(search, adds, branches)
    islands = frozenset(stream) | branches
    order = [name for name, _ in named]
    first = min(islands, key=order.index) if islands else order[-1]
    if first in overflowing:
        reason = (
            f"{first} has a weight of {overflowing[first]:.6g}, beyond the dtype's {_limit(plan.default)}"
        )
    else:
        reason = _largest(model, inputs, first, plan.default)
    return Proposal(islands, first, reason)


def _overflowing(model: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """The sites with weights that ``dtype`` cannot hold, and their largest magnitude."""
    largest = {
        name: max((p.abs().max().item() for p in site.parameters(recurse=False) if p.numel()), default=0.0)
        for name, site in sites(model)
        if not site.always_fp32
    }
    return {name: value for name, value in largest.items() if torch.tensor(value).to(dtype).isinf()}


def _needed(
    search: _Search, names: list[str], residual: frozenset[str], must: frozenset[str]
) -> frozenset[str] | None:
    """The sites that cannot leave fp32 while the whole residual stream stays in it, ``must`` among them."""
    needed = must
    if len(needed) > MOST_BRANCHES:
        return None
    while not search.passes(residual | needed):
        if len(needed) >= MOST_BRANCHES or not search.passes(residual | frozenset(names)):
            return None
        # The least k with which the first k sites, reduced, fail: the k-th is what breaks.
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            good = search.passes(residual | needed | frozenset(names[middle:]))
            low, high = (middle, high) if good else (low, middle)
        needed |= {names[high - 1]}
    for name in sorted(needed - must):
        if search.passes(residual | (needed - {name})):
            needed -= {name}
    return needed


def _stretch(search: _Search, adds: list[str], branches: frozenset[str]) -> list[str]:
    """The shortest run of residual additions that must stay in fp32."""
    begin = _last(len(adds), lambda k: search.passes(branches | frozenset(adds[k:])))
    end = len(adds) - _last(
        len(adds) - begin, lambda k: search.passes(branches | frozenset(adds[begin : len(adds) - k]))
    )
    return adds[begin:end]


def _last(most: int, good: Callable[[int], bool]) -> int:
    """The largest k up to ``most`` that is good, where 0 is and goodness ends once."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


@torch.inference_mode()
def emulate(model: nn.Module, plan: PrecisionPlan, inputs: Tensor) -> tuple[Tensor, ...]:
    """Run an fp32 model in which every site that is no island rounds its weights, its inputs and its outputs.

    The model is the same afterwards; only one site's rounded weights exist at a time.

    Returns:
        All of its outputs.
    """
    exact: dict[nn.Parameter, Tensor] = {}

    def rounded(x: Tensor) -> Tensor:
        return x.to(plan.default).to(x.dtype) if x.is_floating_point() else x

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for parameter in module.parameters(recurse=False):
            exact[parameter] = parameter.data
            parameter.data = rounded(parameter.data)
        return tuple(rounded(x) for x in args)

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        restore()
        return rounded(output)

    def restore() -> None:
        while exact:
            parameter, data = exact.popitem()
            parameter.data = data

    handles = []
    for name, module in sites(model):
        if plan.dtype(name, module) == plan.default:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        outputs = model(inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    finally:
        restore()
        for handle in handles:
            handle.remove()


def _largest(model: nn.Module, inputs: Tensor, site: str, dtype: torch.dtype) -> str:
    """What the site writes in fp32, in words."""
    seen: list[float] = []

    def watch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.abs().max().item())

    module = dict(sites(model))[site]
    handle = module.register_forward_hook(watch)
    try:
        model(inputs)
    finally:
        handle.remove()
    relation = "beyond" if seen[0] > torch.finfo(dtype).max else "within"
    return f"{site} reaches {seen[0]:.6g}, {relation} the dtype's {_limit(dtype)}"


def _limit(dtype: torch.dtype) -> str:
    return f"{torch.finfo(dtype).max:.6g}"
