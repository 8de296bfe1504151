"""Parity of a whole model: no planted fault passes in fp32, and honest rounding passes in its precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.helpers.models import pixels, random_state
from vitdeploy.backends.base import Array
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.config import ViTConfig
from vitdeploy.model.registry import build_reference
from vitdeploy.verification.parity import TOLERANCES, passes

CONFIG = ViTConfig(
    image_size=(32, 32), patch_size=8, width=96, depth=4, heads=3, mlp_width=192, classes=50, norm_eps=1e-6
)
STATE = random_state(CONFIG, spread=0.05)
IMAGES = pixels(CONFIG, 4)


def _computed(config: ViTConfig, state: dict[str, torch.Tensor]) -> Array:
    vit = build_reference(config, {name: tensor.double() for name, tensor in state.items()})
    with torch.inference_mode():
        outputs: Array = vit(IMAGES.double()).numpy()
    return outputs


@pytest.fixture(scope="module")
def reference() -> Array:
    """The outputs (4, 50) of the right model in float64."""
    return _computed(CONFIG, STATE)


def _changed(**changes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(STATE)
    for name, change in changes.items():
        state[name] = change(state[name])
    return state


def _swapped(one: str, other: str) -> dict[str, torch.Tensor]:
    return STATE | {one: STATE[other], other: STATE[one]}


def _flipped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0)


def _transposed_positions(table: torch.Tensor) -> torch.Tensor:
    patches = table[1:].reshape(4, 4, -1).transpose(0, 1).reshape(16, -1)
    return torch.cat([table[:1], patches])


FAULTS: dict[str, tuple[ViTConfig, dict[str, torch.Tensor]]] = {
    "query and key swapped": (CONFIG, _swapped("blocks.2.attn.q.weight", "blocks.2.attn.k.weight")),
    "no attention scale": (CONFIG, _changed(**{"blocks.1.attn.q.weight": lambda w: w * 32**0.5})),
    "tanh-GELU": (replace(CONFIG, activation="gelu_tanh"), STATE),
    "eps ten times larger": (replace(CONFIG, norm_eps=1e-5), STATE),
    "transposed positions": (CONFIG, _changed(pos_embed=_transposed_positions)),
    "no head bias": (CONFIG, _changed(**{"head.bias": torch.zeros_like})),
    "BGR": (CONFIG, _changed(**{"patch_embed.weight": lambda w: w.flip(1)})),
    "one NaN weight": (CONFIG, _changed(**{"blocks.0.mlp.fc1.weight": lambda w: w.clone().fill_(torch.nan)})),
    "value bias lost": (CONFIG, _changed(**{"blocks.1.attn.v.bias": torch.zeros_like})),
    "last MLP lost": (CONFIG, _changed(**{"blocks.3.mlp.fc2.weight": torch.zeros_like})),
    "classes permuted": (CONFIG, _changed(**{"head.weight": _flipped, "head.bias": _flipped})),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_do_not_pass(fault: str, reference: Array) -> None:
    config, state = FAULTS[fault]
    assert not passes(reference, _computed(config, state), TOLERANCES["fp32"], "logits")


ROUNDED = [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]


@pytest.mark.parametrize("precision, dtype", ROUNDED)
def test_honest_rounding_passes(precision: ArtifactPrecision, dtype: torch.dtype, reference: Array) -> None:
    vit = build_reference(CONFIG, {name: tensor.to(dtype) for name, tensor in STATE.items()})
    with torch.inference_mode():
        outputs = vit(IMAGES.to(dtype)).float().numpy()
    assert passes(reference, outputs, TOLERANCES[precision], "logits")
    if precision != "fp32":
        assert not passes(reference, outputs, TOLERANCES["fp32"], "logits")
