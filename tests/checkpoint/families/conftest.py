from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.exact import Exact
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.model.reference import forward_float64, outputs_float64
from vitdeploy.model.registry import build_reference

# Two float64 implementations add up in different orders; that is all they may differ by.
EXACT = 1e-10


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Give every parameter of a transformers model a random value, and save it; return the folder."""

    def save(model: Any, spread: float = 0.2) -> Path:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(spread * torch.randn(parameter.shape))
        model.eval().save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


@pytest.fixture
def agree() -> Callable[..., Checkpoint]:
    """Assert that a transformers model and what we read of its folder compute the same, in float64."""

    def agree(
        model: Any, folder: Path, size: tuple[int, int] | None = None, output: str = "logits", **keywords: Any
    ) -> Checkpoint:
        opened = open_model(str(folder), image_size=size)
        assert isinstance(opened, Checkpoint)
        pixels = torch.randn(2, opened.config.channels, *opened.config.image_size, dtype=torch.float64)
        # SDPA: transformers' eager attention computes its softmax in float32 whatever the model's dtype.
        model = model.double().eval()
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            answer = model(pixels, **keywords)
        theirs = answer.logits if output == "logits" else answer.last_hidden_state
        ours = forward_float64(build_reference(opened.config, opened.state), pixels, output)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= EXACT
        # Nothing is proven by outputs that do not depend on the image.
        assert (theirs[0] - theirs[1]).abs().max() > 1e-2
        return opened

    return agree


@pytest.fixture
def agree_in_all() -> Callable[..., Checkpoint]:
    """Assert that what we read of a folder returns, output for output, what the original does, in float64."""

    def agree(
        theirs: Callable[[Tensor], Mapping[str, Tensor]],
        folder: Path,
        size: tuple[int, int] | None = None,
        **keywords: Any,
    ) -> Checkpoint:
        """``theirs`` computes outputs for pixels, in a model that is already of float64."""
        opened = open_model(str(folder), image_size=size, **keywords)
        assert isinstance(opened, Checkpoint)
        config = opened.config
        pixels = torch.randn(2, config.channels, *config.image_size, dtype=torch.float64)
        with torch.inference_mode(), Exact():
            expected = theirs(pixels)
        found = outputs_float64(build_reference(config, opened.state), pixels, tuple(expected))
        for name, answer in expected.items():
            assert found[name].shape == answer.shape == (2, *(config.output_shape(name) or ())), name
            assert (found[name] - answer).abs().max() <= EXACT, name
            # Nothing is proven by outputs that do not depend on the image.
            assert (answer[0] - answer[1]).abs().max() > 1e-2, name
        return opened

    return agree
