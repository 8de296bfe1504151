"""Whether this machine has the memory for a model at a resolution, before any of it is taken."""

from __future__ import annotations

from vitdeploy.bundle.golden import GOLDEN_NAMES
from vitdeploy.config import ModelConfig
from vitdeploy.errors import UsageError
from vitdeploy.machine.memory import total_memory

_SHARE = 0.9
"""Of the machine's memory; the rest is for what is not counted: libraries, weights, pixels."""
_BESIDE = 4
"""How much more than that a size takes which is recommended: its artifacts are run in their largest batch."""
_LARGEST = 4096
"""Pixels that are tried for a size that would fit."""


def require_memory(config: ModelConfig) -> None:
    """Refuse a resolution whose proof cannot fit.

    What is counted is what the float64 reference holds at once for the golden images: a bound from below, so
    that nothing is refused that could work.

    Raises:
        UsageError: this machine, or its container, has less memory than that.
    """
    there = total_memory()
    if there is None or needed_bytes(config) <= _SHARE * there:
        return
    height, width = config.image_size
    raise UsageError(
        f"at {height}x{width} pixels the float64 reference takes {_gigabytes(needed_bytes(config))} at the "
        f"least, and this machine has {_gigabytes(there)}",
        hint=_hint(config, _SHARE * there / _BESIDE),
    )


def needed_bytes(config: ModelConfig) -> int:
    """The bytes that exporting a model takes, at the least."""
    return len(GOLDEN_NAMES) * config.reference_bytes


def _hint(config: ModelConfig, there: float) -> str:
    """The largest square that takes no more than that, of those that the model can be built for."""
    fitting = [
        pixels
        for pixels in range(config.step, _LARGEST, config.step)
        if needed_bytes(config.at_size((pixels, pixels))) <= there
    ]
    return f"--image-size {fitting[-1]} fits" if fitting else "export it on a machine with more memory"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count < 1e12 else f"{count / 1e12:,.1f} TB"
