"""What one gets wrong about Swin: faults that are put into the reference, or into what is built by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from vitdeploy.model import swin


def shift_sign(patch: pytest.MonkeyPatch) -> None:
    """Maps are rolled down and to the right, not up and to the left."""
    for name in ("cut", "join"):

        def rolled(self: swin.Attention, x: Tensor, right: Callable[..., Tensor]) -> Tensor:
            there = self.shift
            self.shift = -there[0], -there[1]
            try:
                return right(self, x)
            finally:
                self.shift = there

        original = getattr(swin.Attention, name)
        patch.setattr(swin.Attention, name, lambda self, x, r=original, f=rolled: f(self, x, r))


def no_mask(patch: pytest.MonkeyPatch) -> None:
    """Tokens see their neighbours by the shift."""
    right = swin.mask_of
    patch.setattr(swin, "mask_of", lambda *args: torch.zeros_like(right(*args)))


def merge_order(patch: pytest.MonkeyPatch) -> None:
    """The four that are merged come row by row, not column by column."""
    right = swin.Merge.gather

    def wrong(self: swin.Merge, x: Tensor) -> Tensor:
        a, b, c, d = right(self, x).chunk(4, dim=-1)
        return torch.cat([a, c, b, d], dim=-1)

    patch.setattr(swin.Merge, "gather", wrong)


def column_major_windows(patch: pytest.MonkeyPatch) -> None:
    """Tokens of a window are read column by column."""
    cut, join = swin.windows_of, swin.map_of

    def windows_of(x: Tensor, window: tuple[int, int]) -> Tensor:
        return cut(x, window).unflatten(2, window).transpose(2, 3).flatten(2, 3)

    def map_of(x: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        turned = x.unflatten(2, (window[1], window[0])).transpose(2, 3).flatten(2, 3)
        return join(turned, size, window)

    patch.setattr(swin, "windows_of", windows_of)
    patch.setattr(swin, "map_of", map_of)


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault for fault in (shift_sign, no_mask, merge_order, column_major_windows)
}


def of_the_wrong_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the score biases of two blocks exchanged."""
    a, b = "layers.1.blocks.0.attn.score_bias.", "layers.1.blocks.1.attn.score_bias."
    exchanged = {name.replace(a, b): t for name, t in state.items() if name.startswith(a)}
    exchanged |= {name.replace(b, a): t for name, t in state.items() if name.startswith(b)}
    return {**state, **exchanged}
