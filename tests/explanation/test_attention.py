"""The attention that is seen is transformers' own; what is made of it is computed again in plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.explanation.conftest import Pair
from tests.helpers.models import CONFIGS, pixels, random_vit
from vitdeploy.config import ViTConfig
from vitdeploy.explanation import measures
from vitdeploy.explanation.attention import Observation, attention_bytes, observe
from vitdeploy.model.registry import architecture_of, build_reference, expected_shapes


def watched(pair: Pair, size: int = 32) -> tuple[Observation, list[np.ndarray]]:
    """Ours, and their attentions."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    view = architecture_of(pair.ours.config).view(pair.ours)
    outputs = ("logits",) if pair.ours.config.classes else pair.ours.config.outputs[:1]
    return observe(pair.ours, view, image, outputs), [a.numpy() for a in pair.attentions(image)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "deit", "clip"])
def test_attention_is_theirs(pair: Callable[[str], Pair], kind: str) -> None:
    found, theirs = watched(pair(kind))
    assert len(found.weights) == len(theirs) == 2
    for block, expected in enumerate(theirs):
        np.testing.assert_allclose(found.attention(block), expected, atol=1e-6, rtol=0)
        assert expected.std() > 0.01  # far from even
    np.testing.assert_allclose(
        found.rollout(), rollout(theirs, (0, 1) if kind == "deit" else (0,)), atol=1e-6
    )
    prefix = 2 if kind == "deit" else 1
    for number, (block, expected) in enumerate(zip(found.view.blocks, theirs, strict=True)):
        got = measures.mean_distances(found.attention(number), block.places.numpy(), block.grid, block.step)
        np.testing.assert_allclose(got, distances(expected[0][:, prefix:, prefix:], 4, 8), rtol=1e-6)


def rollout(attentions: list[np.ndarray], rows: tuple[int, ...]) -> np.ndarray:
    """Every matrix in full, as Abnar and Zuidema write it."""
    tokens = attentions[0].shape[-1]
    whole = np.eye(tokens)
    for attention in attentions:
        mixed = attention[0].mean(axis=0) + np.eye(tokens)
        whole = (mixed / mixed.sum(axis=-1, keepdims=True)) @ whole
    return whole[list(rows)].mean(axis=0)


def distances(attention: np.ndarray, columns: int, patch: int) -> list[float]:
    """One pair of patches after the other."""
    found = []
    for head in attention:
        rows = []
        for query, weights in enumerate(head):
            apart = [
                math.hypot(query // columns - key // columns, query % columns - key % columns) * patch
                for key in range(len(weights))
            ]
            rows.append(sum(w * d for w, d in zip(weights, apart, strict=True)) / sum(weights))
        found.append(sum(rows) / len(rows))
    return found


@pytest.mark.slow
def test_windows_of_a_swin_are_theirs(pair: Callable[[str], Pair]) -> None:
    made = pair("swin")
    found, theirs = watched(made)
    assert [a.shape for a in theirs] == [(16, 2, 16, 16)] * 2 + [(4, 4, 16, 16)] * 2
    for number, (block, expected) in enumerate(zip(found.view.blocks, theirs, strict=True)):
        np.testing.assert_allclose(found.attention(number), expected, atol=1e-6, rtol=0)
        places = block.places.numpy()
        assert sorted(places.flatten()) == list(range(math.prod(block.grid)))
        # A window is 4x4 tokens, wherever it lies: what crosses its border is masked.
        got = measures.mean_distances(found.attention(number), places, block.grid, block.step)
        inside = [np.mean([distances(window[head : head + 1], 4, block.step) for window in expected])
                  for head in range(expected.shape[1])]  # fmt: skip
        np.testing.assert_allclose(got, inside, rtol=1e-6)
        # What a place receives, put where transformers' windows say that it is.
        maps = measures.looked_at(found.attention(number), places, block.grid)
        assert maps.shape == (expected.shape[1], *block.grid)
        np.testing.assert_allclose(maps.sum(axis=(1, 2)), math.prod(block.grid), rtol=1e-9)
        np.testing.assert_allclose(maps[0].flatten()[places[0]], expected[0, 0].sum(axis=0), atol=1e-6)
    assert not found.view.whole


def test_places_of_shifted_windows() -> None:
    """By the definition: the map is rolled up and left by two before it is cut."""
    from tests.helpers.swins import SWINS, random_swin

    model = random_swin(SWINS["v1"])
    shifted = architecture_of(model.config).view(model).blocks[1]
    numbers = np.arange(256).reshape(16, 16)
    rolled = np.roll(numbers, (-2, -2), (0, 1))
    windows = [rolled[y : y + 4, x : x + 4].flatten() for y in range(0, 16, 4) for x in range(0, 16, 4)]
    assert shifted.places.tolist() == np.array(windows).tolist()


def planted() -> ViTConfig:
    return ViTConfig(
        image_size=(32, 32), patch_size=8, width=16, depth=2, heads=2, mlp_width=8, classes=2, norm_eps=1e-6
    )


def planted_state() -> dict[str, torch.Tensor]:
    """A classifier written by hand: head 0 finds red patches for class 0, head 1 green ones for class 1."""
    state = {
        name: torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        for name, shape in expected_shapes(planted()).items()
    }
    for channel, column in ((0, 0), (1, 2)):  # how red and how green a patch is, around zero
        state["patch_embed.weight"][column, channel] = 1 / 64
        state["patch_embed.weight"][column + 1, channel] = -1 / 64
    state["cls_token"][4], state["cls_token"][5] = 1, -1
    for head, column in ((0, 0), (1, 2)):
        first = 8 * head
        state["blocks.0.attn.q.weight"][first, 4] = 2
        state["blocks.0.attn.k.weight"][first, column] = 1
        state["blocks.0.attn.v.weight"][first, column] = 1
        state["blocks.0.attn.proj.weight"][6 + head, first] = 1
        state["head.weight"][head, 6 + head] = 1
    return state


def test_relevance_finds_what_was_planted() -> None:
    model = build_reference(planted(), planted_state())
    image = torch.zeros(1, 3, 32, 32)
    image[0, 0, 8:16, 16:24] = 1  # red: row 1, column 2
    image[0, 1, 24:32, 0:8] = 1  # green: row 3, column 0
    view = architecture_of(planted()).view(model)
    found = observe(model, view, image, ("logits",))
    for index, place in ((0, (1, 2)), (1, (3, 0))):
        tokens = found.relevance(index)
        where = measures.on_the_grid(tokens, view.blocks[-1].tokens.numpy(), (4, 4))
        assert np.unravel_index(where.argmax(), where.shape) == place
        assert where.max() > 10 * np.sort(where, axis=None)[-2]
    # Rollout knows no class: both patches stand out of it.
    rolled = found.rollout()[1:].reshape(4, 4)
    assert {tuple(np.unravel_index(i, (4, 4))) for i in np.argsort(rolled, axis=None)[-2:]} == {
        (1, 2),
        (3, 0),
    }


@pytest.mark.parametrize("kind", ["vit", "distilled", "siglip", "dinov2", "mean"])
def test_relevance_is_the_whole_matrix_read_where_the_model_reads(kind: str) -> None:
    """R in full, its gradients by differences of the logit itself where attention is nudged."""
    config = CONFIGS[kind]
    model = random_vit(config).double()
    view = architecture_of(config).view(model)
    image = pixels(config, 1).double()
    found = observe(model, view, image, ("logits",))
    watched = [*found.weights, *(() if found.pooled_by is None else (found.pooled_by,))]
    gradients = torch.autograd.grad(found.outputs["logits"][0, 3], watched, retain_graph=True)
    whole = np.eye(config.tokens)
    for weights, gradient in zip(found.weights, gradients, strict=False):
        product = (weights * gradient).detach()[0].clamp(min=0).mean(dim=0).numpy()
        whole = whole + product @ whole
    if config.pool == "probe":
        last = (watched[-1] * gradients[-1]).detach()[0].clamp(min=0).mean(dim=0).numpy()
        expected = (last @ whole)[0]
    else:
        rows = {"cls": [0], "both_heads": [0, 1], "mean": range(config.prefix_tokens, config.tokens)}
        own = whole - np.eye(config.tokens)
        if config.pool == "cls_mean":
            expected = (own[0] + own[config.prefix_tokens :].mean(axis=0)) / 2
        else:
            expected = own[list(rows[config.pool])].mean(axis=0)
    np.testing.assert_allclose(found.relevance(3), expected, rtol=1e-9, atol=1e-12)
    nudge(model, view.blocks[1].softmax, image, float(gradients[1][0, 1, 2, 3]))


def nudge(model: torch.nn.Module, softmax: torch.nn.Module, image: torch.Tensor, slope: float) -> None:
    """The gradient of attention is what the logit does when one weight of it changes."""
    step, values = 1e-5, []
    for sign in (-1, 1):

        def change(_: object, __: object, weights: torch.Tensor, sign: int = sign) -> torch.Tensor:
            changed = weights.clone()
            changed[0, 1, 2, 3] += sign * step
            return changed

        handle = softmax.register_forward_hook(change)
        with torch.no_grad():
            values.append(float(model(image, "logits")[0, 3]))
        handle.remove()
    assert (values[1] - values[0]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_bytes_of_attention_are_what_is_held() -> None:
    model = random_vit(CONFIGS["distilled"])
    view = architecture_of(model.config).view(model)
    found = observe(model, view, pixels(model.config, 1), ("logits",))
    assert attention_bytes(view) == 2 * sum(weights.numel() * 4 for weights in found.weights)
