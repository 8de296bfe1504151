"""The process of the control work: the same in every round, it says how fast the machine itself is meanwhile.

A shared or a hot machine is some per cent slower from one hour to the next, and so is everything on it.
Two measurements are compared after that has been taken out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, run_process

_WIDTH = 384
"""Of the square float32 matrices that are multiplied: what one core's cache holds. Memory stays out of it:
how fast it is depends on which cores a virtual machine happens to have, from minute to minute."""


def open_control(job: dict[str, Any]) -> LoadedModel:
    """A caller for each processor."""
    return LoadedModel([_caller(seed) for seed in range(job["callers"])], {})


def _caller(seed: int) -> Caller:
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal((_WIDTH, _WIDTH), np.float32) for _ in range(2))
    product = np.empty_like(a)

    def call(_: Array) -> tuple[Array, float | None]:
        np.matmul(a, b, out=product)
        np.matmul(b, a, out=product)
        return product[:1], None

    return call


if __name__ == "__main__":
    run_process(open_control)
