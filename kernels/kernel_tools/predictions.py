"""What was predicted before anything ran: ``kernels/predictions.json``, which ``roofline.py`` writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from vitdeploy_kernels.specs import Spec

PREDICTIONS = Path(__file__).parents[1] / "predictions.json"


def foretold(gpu: str, spec: Spec) -> float | None:
    """Microseconds of a kernel at a shape on a GPU, as the driver calls it; None where nothing was said."""
    return _all().get((gpu, spec.kernel, spec.shape))


@functools.cache
def _all() -> Mapping[tuple[str, str, tuple[int, ...]], float]:
    document = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return {
        (document["gpu"], row["kernel"], tuple(row["shape"])): row["predicted_us"]
        for row in document["kernels"]
    }
