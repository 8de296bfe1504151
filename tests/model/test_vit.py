"""The reference model against the paper's equations, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers.models import CONFIGS, SMALL, pixels, random_state, random_vit
from vitdeploy.config import ViTConfig
from vitdeploy.model import vit
from vitdeploy.model.positions import sincos2d
from vitdeploy.model.reference import forward_float64, state_of
from vitdeploy.model.registry import build_reference
from vitdeploy.model.vit import Attention, FusedAttention


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_streamed_float64_is_the_whole_model_in_float64(config: ViTConfig) -> None:
    vit, x = random_vit(config), pixels(config)
    whole = build_reference(config, {name: t.double() for name, t in random_state(config).items()})
    with torch.inference_mode():
        for output in config.outputs:
            torch.testing.assert_close(
                forward_float64(vit, x, output), whole(x.double(), output), rtol=0, atol=1e-13
            )


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_attention_is_the_same_function(config: ViTConfig) -> None:
    state = {name: t.double() for name, t in random_state(config).items()}
    plain, fused = (build_reference(config, state, fused_attention=fused) for fused in (False, True))
    assert {type(block.attn) for block in plain.blocks} == {Attention}
    assert {type(block.attn) for block in fused.blocks} == {FusedAttention}
    x = pixels(config).double()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def numpy_forward(config: ViTConfig, state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The paper's equations 1 to 4 on one image, written out with numpy, CLS pooling, learned positions."""

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        centred = v - v.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(v: np.ndarray, name: str) -> np.ndarray:
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    p, d = config.patch_size, config.head_width
    kernel = state["patch_embed.weight"].reshape(config.width, -1)
    tokens = [state["cls_token"]]
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p].reshape(-1)
            tokens.append(kernel @ patch + state["patch_embed.bias"])
    z = np.stack(tokens) + state["pos_embed"]
    erf = np.vectorize(math.erf)
    for i in range(config.depth):
        y = norm(z, f"blocks.{i}.norm1")
        q, k, v = (linear(y, f"blocks.{i}.attn.{name}") for name in "qkv")
        heads = []
        for h in range(config.heads):
            part = slice(h * d, (h + 1) * d)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        z = z + linear(np.concatenate(heads, -1), f"blocks.{i}.attn.proj")
        y = linear(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        z = z + linear(y * (1 + erf(y / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
    return linear(norm(z[0], "norm"), "head")


def test_the_papers_equations() -> None:
    config = CONFIGS["vit"]
    x = pixels(config, 1)
    state = {name: t.double().numpy() for name, t in random_state(config).items()}
    expected = numpy_forward(config, state, x[0].double().numpy())
    got = forward_float64(random_vit(config), x)[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)


def test_sinusoidal_table_by_its_formula() -> None:
    config = ViTConfig(**SMALL, position="sincos2d", position_prefix=0)
    table = sincos2d(config).numpy()
    rows, columns = config.grid
    quarter = config.width // 4
    for y, x, i in ((0, 0, 0), (1, 2, 3), (rows - 1, columns - 1, quarter - 1)):
        omega = 10_000 ** (-i / (quarter - 1))
        row = table[y * columns + x]
        expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
        assert [row[i + part * quarter] for part in range(4)] == pytest.approx(expected, abs=1e-14)


def test_building_shares_the_weights() -> None:
    state = random_state(CONFIGS["vit"])
    held = state_of(build_reference(CONFIGS["vit"], state))
    assert set(held) == set(state)
    assert all(held[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())


@pytest.mark.parametrize("name", ["dinov3", "eva02", "beit"])
def test_fused_attention_computes_positions_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    fused = build_reference(config, random_state(config), fused_attention=True)
    expected = fused(pixels(config))
    for function in ("rotation", "relative_positions"):
        monkeypatch.setattr(vit, function, None)
    assert torch.equal(fused(pixels(config)), expected)


def test_a_headless_model_has_no_logits() -> None:
    config = CONFIGS["no_head"]
    with pytest.raises(ValueError, match="no head"):
        random_vit(config)(pixels(config), "logits")
