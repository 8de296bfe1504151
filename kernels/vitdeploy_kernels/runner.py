"""Runs a model with the fused kernels: one plan per batch bucket, and on a GPU one CUDA graph per plan."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vitdeploy_kernels.config import Table, table_for
from vitdeploy_kernels.graphs import Turns, capture
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.planner import Plan, Readout, Step, Workspace
from vitdeploy_kernels.plans import Shape, Weights, build_plan
from vitdeploy_kernels.support import UnsupportedError, check_device, first_reason, require

Execute: TypeAlias = Callable[[Launch], None]
"""Queues a launch: :meth:`Launch.run`, or something that has compiled it before."""


def buckets(largest: int) -> tuple[int, ...]:
    """Powers of two below the largest batch, and the largest batch itself."""
    powers = [1 << i for i in range(largest.bit_length()) if 1 << i < largest]
    return (*powers, largest)


class VitRunner:
    """A model in memory, ready to run.

    A batch is padded to the next bucket; on a GPU its CUDA graph is replayed, so that the host queues one
    thing whatever the depth of the model. All memory is taken at the start.

    Threads may share a runner: their calls take turns. A call is queued on the caller's current stream of the
    runner's GPU, which need not be the current GPU, and waits there for the calls before it. Runners share
    nothing, so that two on one GPU run side by side. Autocast changes nothing: the weights' dtype is the
    model's.

    Args:
        shape: the model.
        weights: on the device to run on.
        batches: the buckets; a larger batch than the largest is an error.
        table: kernel configurations; the shipped table of the GPU when omitted.
        readout: what computes the output where the shape has no fused head (see :class:`Planner`).
        execute: queues a launch; the kernels are compiled at the first launch when omitted.

    Raises:
        UnsupportedError: the device cannot run the kernels.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        *,
        batches: Sequence[int],
        table: Table | None = None,
        readout: Readout | None = None,
        execute: Execute = Launch.run,
    ) -> None:
        self.shape = shape
        self._execute = execute
        device = weights.embedding.weight.device
        require(first_reason([check_device(weights.embedding.weight)]), "the runner")
        chosen = table or table_for(device)
        self._turns = Turns(device)
        workspace = Workspace(device)
        self.plans: dict[int, Plan] = {}
        for batch in sorted(set(batches), reverse=True):  # the largest first: the others share its memory
            self.plans[batch] = build_plan(shape, weights, batch, chosen, workspace, readout)
        self.batches = tuple(sorted(self.plans))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            with torch.no_grad():
                for batch, plan in self.plans.items():
                    self._graphs[batch] = capture(functools.partial(self._run, plan), device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute the output of a batch.

        Args:
            images: (N, C, H, W) float32, normalised, or (N, H, W, C) uint8, as the shape says; on any device.

        Returns:
            The first N rows of the output, a tensor of its own on the runner's device.

        Raises:
            UnsupportedError: a shape, dtype or batch size that was not prepared.
        """
        count = len(images)
        batch = next((b for b in self.batches if b >= count), None)
        if batch is None or not count:
            raise UnsupportedError(
                f"a batch of {count}, and the runner was prepared for 1 to {self.batches[-1]}"
            )
        plan = self.plans[batch]
        if images.shape[1:] != plan.image.shape[1:] or images.dtype != plan.image.dtype:
            wanted, given = (f"{tuple(t.shape[1:])} {t.dtype}" for t in (plan.image, images))
            raise UnsupportedError(f"images must be {wanted}, not {given}")
        with self._turns.turn():
            plan.image[:count].copy_(images, non_blocking=True)
            if batch in self._graphs:
                self._graphs[batch].replay()
            else:
                self._run(plan)
            return plan.output[:count].clone()

    def _run(self, plan: Plan) -> None:
        # What is left to torch is in the weights' dtype already, and writes into buffers of that dtype.
        with torch.autocast(plan.image.device.type, enabled=False):
            for step in plan.steps:
                if step.launch is not None:
                    self._execute(step.launch)
                elif step.call is not None:
                    step.call()

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and the output."""
        return next(iter(self.plans.values())).image.device

    @property
    def report(self) -> tuple[str, ...]:
        """The fusion report of the largest batch, a line for each part of the model."""
        return fusion_report(self.plans[self.batches[-1]].steps, self.shape)


def fusion_report(steps: Sequence[Step], shape: Shape) -> tuple[str, ...]:
    """What is fused, and what is not and why: "attention: 12/12 blocks fused (layernorm_linear, ...)"."""
    lines = []
    for title, pattern in (
        ("patch projection", r"embedding"),
        ("first norm", r"embedding\.pre_norm.*"),
        ("merging", r"blocks\.\d+\.merge.*"),
        ("order of windows", r"blocks\.\d+\.order"),
        ("attention", r"blocks\.\d+\.attn.*|blocks\.\d+\.first"),
        ("MLP", r"blocks\.\d+\.mlp.*"),
        ("head", r"head.*|readout"),
    ):
        part = [step for step in steps if re.fullmatch(pattern, step.site)]
        if part:
            lines += _part(title, part, shape)
    return tuple(lines)


def _part(title: str, steps: Sequence[Step], shape: Shape) -> list[str]:
    blocks = {step.site.split(".")[1] for step in steps if step.site.startswith("blocks.")}
    if not blocks:
        (first, *_) = steps
        unfused = [f"{step.operation} in torch: {step.reason}" for step in steps if step.reason]
        columns = f", {shape.classes} columns" if title == "head" and shape.classes else ""
        return [f"{title}: " + ("; ".join(unfused) if unfused else f"fused in {first.operation}{columns}")]
    reasons: dict[tuple[str, str, str], set[str]] = {}
    for step in steps:
        if step.reason:
            _, block, site = step.site.split(".", 2)
            reasons.setdefault((site, step.operation, step.reason), set()).add(block)
    apart = set().union(*reasons.values()) if reasons else set()
    fused = _kernels(steps)
    lines = [f"{title}: {len(blocks - apart)}/{len(blocks)} blocks fused" + (f" ({fused})" if fused else "")]
    for (site, operation, reason), where in sorted(reasons.items()):
        lines.append(f"  {site} of {len(where)} blocks: {operation} in torch: {reason}")
    return lines


def _kernels(steps: Sequence[Step]) -> str:
    return ", ".join(dict.fromkeys(step.operation for step in steps if not step.reason))
