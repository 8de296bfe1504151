"""Configurations that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import SMALL
from vitdeploy.config import BatchRange, Preprocess, ViTConfig
from vitdeploy.errors import ConfigError, UsageError


@pytest.mark.parametrize(
    "change, says",
    [
        ({"heads": 5}, "width 48 is not divisible by 5 heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"image_size": (30, 48)}, "30x48 is not divisible by the patch size 8"),
        ({"cls_token": False, "position_prefix": 0}, "'cls' needs a CLS token"),
        ({"position_prefix": 2}, "there are 1 prefix tokens"),
        ({"position": "none"}, "only a learned position table"),
        ({"pool": "both_heads"}, "a CLS and a distillation token"),
        ({"position": "sincos2d", "position_prefix": 0, "width": 6, "heads": 3}, "divisible by 4"),
    ],
)
def test_impossible_configurations_say_why(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ViTConfig(**{**SMALL, **change})


@pytest.mark.slow
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 32), st.integers(0, 8))
def test_tokens_are_prefix_and_grid(rows: int, columns: int, patch: int, registers: int) -> None:
    config = ViTConfig(image_size=(rows * patch, columns * patch), patch_size=patch, registers=registers)
    assert config.grid == (rows, columns)
    assert config.tokens == 1 + registers + rows * columns


@given(st.integers(-2, 64), st.integers(-2, 64), st.integers(-2, 64))
def test_batch_ranges_rise_from_one(least: int, optimal: int, most: int) -> None:
    if 1 <= least <= optimal <= most:
        sizes = BatchRange(least, optimal, most).sizes
        assert sizes == tuple(sorted(set(sizes)))
    else:
        with pytest.raises(UsageError, match="batch sizes must rise"):
            BatchRange(least, optimal, most)


def test_preprocessing_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="std"):
        Preprocess(std=(0.5, 0.0, 0.5))
