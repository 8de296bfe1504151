"""How a model is measured: how long, how often, with how many clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

THREADS = 2
PARTS = ("closed", "open", "loadgen", "limits")
"""Of a measurement. Each can be made by itself; the record keeps the others."""
MLPERF_SECONDS = 600
"""What MLPerf's rules ask of a run at least; ours are shorter."""
MLPERF_PERCENTILE = 0.99
"""Of the latencies, which MLPerf's rules bound in the Server scenario for image models."""


@dataclass(frozen=True)
class Plan:
    """The settings of one model's measurement."""

    seconds: float
    """Of a closed-loop visit; an open-loop one takes twice that."""
    rounds: int
    image_rounds: int
    """Those with image files, where these take turns."""
    clients: int
    """Closed-loop: enough to keep batches full."""
    bound_ms: float
    """What p99 has to stay under."""
    overload: bool
    """Whether the session is the bottleneck, so that more than it can do fills the queue."""
    batches: tuple[int, ...] = (1, 4, 8)
    """That the sessions alone run."""
    optimized: bool = False
    """Whether what ``vitdeploy optimize`` picks is served, too."""
    loadgen_seconds: float = 3.0
    """Of a run of LoadGen, at least."""
    loadgen_percentile: float = MLPERF_PERCENTILE
    """Of the latencies in its Server scenario, which has to be within ``bound_ms``."""
    threads: int = THREADS
    """Processors that everything shares: of a session that is alone, and of peers' together."""
    seed: int = 0

    def rounds_of(self, kind: str) -> int:
        """How often requests of a kind are measured."""
        return self.image_rounds if kind == "image" else self.rounds

    def with_rounds(self, rounds: int) -> Plan:
        """The same with so many rounds of every kind."""
        return dataclasses.replace(self, rounds=rounds, image_rounds=rounds)


PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "digits": Plan(
            seconds=1.5,
            rounds=5,
            image_rounds=5,
            clients=64,
            bound_ms=25,
            overload=False,
            batches=(1, 8, 32),
        ),
        # Nothing of its images but their decoding differs from tensors, so they have few rounds. The 99th
        # percentile takes LoadGen 459 queries in time to believe in, more than a minute; the 90th takes 44.
        "vit_base_patch16_224": Plan(
            seconds=5,
            rounds=5,
            image_rounds=2,
            clients=16,
            bound_ms=1000,
            overload=True,
            optimized=True,
            loadgen_seconds=6,
            loadgen_percentile=0.9,
        ),
    }
)
