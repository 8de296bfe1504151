"""A forward pass of a reference model that is watched: attention, tokens, and the gradient of a class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitdeploy.config import Output
from vitdeploy.explanation import measures
from vitdeploy.explanation.measures import Array, Float
from vitdeploy.model.reference import Reference, outputs_of
from vitdeploy.model.view import ModelView

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
"""Sees what a module gives."""


@dataclass
class Observation:
    """What one image made of a model."""

    view: ModelView
    outputs: dict[Output, Tensor] = field(default_factory=dict)
    """Those that were asked for, (1, ...)."""
    tokens: list[Tensor] = field(default_factory=list)
    """Behind each block, (T, D)."""
    weights: list[Tensor] = field(default_factory=list)
    """Of each block's attention as the model computed them, (1, [n,] h, A, A)."""
    pooled_by: Tensor | None = None
    """Of a probe's attention, (1, h, 1, T)."""

    def attention(self, block: int) -> Array:
        """The weights of a block's attention, (n, h, A, A); those of a row sum to one."""
        found: Array = _grouped(self.weights[block]).detach().numpy()
        return found

    @property
    def shares(self) -> Float:
        """How much of each last token is in the pooled vector, (T); by a probe, the mean of its heads."""
        if self.pooled_by is not None:
            shares: Float = self.pooled_by.detach().double().mean(dim=1).flatten().numpy()
            return shares
        assert self.view.reads is not None
        read: Float = self.view.reads.numpy()
        return read

    def rollout(self) -> Float:
        """:func:`measures.rollout`, (T); of a model whose blocks see the image as one group."""
        return measures.rollout(
            [weights.detach()[0].mean(dim=0).numpy() for weights in self.weights], self.shares
        )

    def relevance(self, index: int) -> Float:
        """:func:`measures.relevance` of a class, (T); of a model with logits, observed with gradients."""
        watched = [*self.weights, *(() if self.pooled_by is None else (self.pooled_by,))]
        score = self.outputs["logits"][0, index]
        gradients = torch.autograd.grad(score, watched, retain_graph=True)
        cams = [
            measures.cam(weights.detach()[0].numpy(), gradient[0].numpy())
            for weights, gradient in zip(watched, gradients, strict=True)
        ]
        if self.pooled_by is None:
            return measures.relevance(cams, self.shares)
        return measures.relevance(cams[:-1], self.shares, pooled_by=cams[-1][0])


def _grouped(weights: Tensor) -> Tensor:
    """One image's weights with the groups first: (n, h, A, A)."""
    return weights if weights.dim() == 4 else weights[0]


def observe(
    model: Reference,
    view: ModelView,
    pixel_values: Tensor,
    outputs: Sequence[Output],
    *,
    gradients: bool = True,
) -> Observation:
    """Run a reference on one image and keep what is inside.

    Args:
        model: with its parameters on the CPU, whose dtype everything is computed in.
        view: of this model.
        pixel_values: (1, C, H, W), normalised, in that dtype.
        outputs: which to compute.
        gradients: whether they are kept, for ``logits`` if they are among the outputs.
    """
    found = Observation(view)
    stages = dict(model.stages())

    def see_weights(_: nn.Module, __: tuple[Tensor, ...], weights: Tensor) -> None:
        found.weights.append(weights)

    def see_probe(_: nn.Module, __: tuple[Tensor, ...], weights: Tensor) -> None:
        found.pooled_by = weights

    def see_tokens(_: nn.Module, __: tuple[Tensor, ...], tokens: Tensor) -> None:
        found.tokens.append(tokens.detach()[0])

    watched: list[tuple[nn.Module, Hook]] = [(block.softmax, see_weights) for block in view.blocks]
    watched += [(stages[f"blocks.{number}"], see_tokens) for number in range(len(view.blocks))]
    if view.probe is not None:
        watched.append((view.probe, see_probe))
    wants_gradients = gradients and "logits" in outputs
    with _watching(watched), torch.set_grad_enabled(wants_gradients):
        # The weights are constants: what makes a graph is that the pixels are none.
        pixels = pixel_values.detach().requires_grad_(wants_gradients)
        found.outputs = outputs_of(model, pixels, outputs)
    return found


@contextlib.contextmanager
def _watching(watched: Sequence[tuple[nn.Module, Hook]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_bytes(view: ModelView) -> int:
    """What the weights of all blocks take in float32, and as much again for their gradients."""
    return sum(8 * block.heads * len(block.places) * block.places.shape[1] ** 2 for block in view.blocks)
