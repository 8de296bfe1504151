"""Ranges are the least and the largest of all images, and refuse what says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.quantised_models import deployed, images_of
from vitdeploy.errors import UsageError
from vitdeploy.model.folds import parameter
from vitdeploy.progress import Progress, Stage
from vitdeploy.quantisation.layers import quantisable, watching
from vitdeploy.quantisation.ranges import Ranges, measure


@torch.no_grad()
def test_they_are_those_of_all_images_at_once() -> None:
    model, images = deployed("deit3"), images_of("deit3", 7)
    ranges = measure(model, images, Progress())
    seen: dict[str, Any] = {}
    with watching(quantisable(model), lambda name, x: seen.update({name: x.flatten(0, -2)})):
        model(images)
    assert list(ranges.low) == list(ranges.high) == list(seen)
    for name, x in seen.items():
        torch.testing.assert_close(ranges.low[name], x.amin(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ranges.high[name], x.amax(0), rtol=1e-3, atol=1e-4)


def test_they_survive_a_file() -> None:
    ranges = Ranges({"a.b": torch.tensor([-1.0])}, {"a.b": torch.tensor([2.0])})
    again = Ranges.from_tensors({**ranges.tensors(), "images": torch.zeros(1)})
    assert again == ranges


def test_images_that_are_alike_are_refused() -> None:
    with pytest.raises(UsageError, match="all 5 calibration images are alike") as caught:
        measure(deployed("vit"), images_of("vit", 1).expand(5, -1, -1, -1), Progress())
    assert caught.value.exit_code == 2


def test_images_of_which_nothing_remains_are_refused() -> None:
    model: Any = deployed("mean")
    for block in model.blocks:
        for site in (block.norm1, block.norm2):
            site.weight, site.bias = (parameter(torch.zeros_like(site.weight)) for _ in range(2))
        block.attn.qkv.bias = block.attn.proj.bias = block.mlp.fc1.bias = None
    with pytest.raises(UsageError, match="every activation is zero"):
        measure(model, images_of("mean"), Progress())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_named(number: float) -> None:
    model: Any = deployed("vit")
    weight = model.blocks[1].mlp.fc1.weight.clone()
    weight[0, 0] = number
    model.blocks[1].mlp.fc1.weight = parameter(weight)
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc2 reads is infinite or not a number") as caught:
        measure(model, images_of("vit"), Progress())
    assert caught.value.exit_code == 2


def test_ranges_of_another_model_are_refused() -> None:
    ranges = measure(deployed("vit"), images_of("vit"), Progress())
    ranges.check(quantisable(deployed("vit")))
    for other in ("mean", "dinov2", "swin v1"):
        with pytest.raises(UsageError, match="of another model"):
            ranges.check(quantisable(deployed(other)))


def test_progress_tells_the_image() -> None:
    told: list[str] = []

    class Told(Progress):
        def updated(self, stage: Stage) -> None:
            told.append(f"{stage.name}: {stage.detail}")

    measure(deployed("vit"), images_of("vit", 6), Told())
    assert told == ["calibration ranges: image 1 of 6", "calibration ranges: image 5 of 6"]
