from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from vitdeploy.checkpoint.opening import Checkpoint

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]


def tiny(**changes: Any) -> transformers.DeiTConfig:
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
    }
    return transformers.DeiTConfig(**(settings | changes))


@pytest.mark.parametrize("image_size", [32, [16, 40]])
@pytest.mark.parametrize(
    "kind,pool",
    [("DeiTForImageClassification", "cls"), ("DeiTForImageClassificationWithTeacher", "both_heads")],
)
def test_logits_equal_transformers(save: Save, agree: Agree, kind: str, pool: str, image_size: Any) -> None:
    model = getattr(transformers, kind)(tiny(image_size=image_size))
    opened = agree(model, save(model))
    assert opened.family == "deit"
    assert opened.config.pool == pool
    assert opened.config.distillation_token


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56)])
def test_interpolated_positions_equal_transformers(save: Save, agree: Agree, size: tuple[int, int]) -> None:
    model = transformers.DeiTForImageClassificationWithTeacher(tiny())
    agree(model, save(model), size, interpolate_pos_encoding=True)


def test_model_without_head(save: Save, agree: Agree) -> None:
    model = transformers.DeiTModel(tiny())
    opened = agree(model, save(model), output="tokens")
    assert opened.config.classes == 0
