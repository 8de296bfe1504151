"""Layers that stay float, until the answers are as near to the float model's as they are to be.

Errors of layers add in squares, so that one run with each of them alone quantised ranks them all: those go
first that cost the most squared error for the multiplications they make cheap. Enough is left out when the
probabilities of classes are as near as the outputs are: they decide where logits are large.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitdeploy.config import layer_of
from vitdeploy.model.deployed import DeployedMlp, DeployedModel, Linear, Scale, Shift
from vitdeploy.model.folds import parameter
from vitdeploy.quantisation.deviation import Deviation, deviation, relative_error
from vitdeploy.quantisation.layers import BATCH, Look, tensors_of, watching
from vitdeploy.quantisation.sites import QuantisedSite

MOST_FLOAT = 0.3
"""Share of the multiplications: with more of them in float, for whatever reason, 8 bits do not pay."""
_RANKED_WITH = 4
"""Images, evenly chosen."""


@dataclass(frozen=True)
class Place:
    """A layer of the model, and what it has as a float layer and as a quantised one.

    Attributes:
        mlp: whose last layer it is, with what comes before that.
    """

    linear: Linear
    weight: nn.Parameter
    bias: nn.Parameter | None
    site: QuantisedSite
    mlp: DeployedMlp | None = None
    before: Shift | Scale | None = None

    @property
    def fitted(self) -> Tensor:
        """What the weight of the site is the rounding of, (in, out)."""
        weight = self.weight.detach()
        return weight / self.before.value[:, None] if isinstance(self.before, Scale) else weight

    def use(self, *, quantised: bool) -> None:
        """Have the model compute with one of the two; a float layer keeps nothing before it."""
        bias = self.site.bias
        self.linear.weight = parameter(self.site.dequantised) if quantised else self.weight
        self.linear.bias = (None if bias is None else parameter(bias)) if quantised else self.bias
        if self.mlp is not None:
            self.mlp.before = self.before if quantised else None


def leave_out(
    model: DeployedModel,
    work: DeployedModel,
    places: Mapping[str, Place],
    macs: Mapping[str, int],
    pixel_values: Tensor,
    target: Deviation,
) -> tuple[tuple[str, ...], Deviation]:
    """Make layers of ``work`` float again until it is as near as the target, or too much is left out.

    Args:
        model: the float model.
        work: with all places quantised.
        macs: of every GEMM of the model.

    Returns:
        The names in the order of the model, and the deviation that remains.
    """
    batches = pixel_values.split(BATCH)
    reference = _joined(tensors_of(model(images)) for images in batches)

    def without(names: set[str]) -> Deviation:
        kept = {name: place for name, place in places.items() if name not in names}
        with watching(*_rounding(kept)):
            return deviation(work.outputs, _joined(tensors_of(work(images)) for images in batches), reference)

    left: set[str] = set()
    found = without(left)
    if found.excess(target) <= 1 or not places:
        return (), found
    squares = _alone(work, places, pixel_values)
    order = sorted(places, key=lambda name: squares[name] / macs[name], reverse=True)
    most = sum(macs[name] for name in places) - (1 - MOST_FLOAT) * sum(macs.values())
    total = sum(squares.values())
    while found.excess(target) > 1 and order:
        predicted = found.excess(target) ** 2
        share = predicted / max(total - sum(squares[name] for name in left), 1e-30)
        before = len(left)
        while order and (predicted > 1 or len(left) == before):
            name = order.pop(0)
            if sum(macs[other] for other in left) + macs[name] > most:
                continue
            predicted -= share * squares[name]
            left.add(name)
            places[name].use(quantised=False)
        if len(left) == before:
            break
        found = without(left)
    return tuple(name for name in places if name in left), found


def _alone(work: DeployedModel, places: Mapping[str, Place], pixel_values: Tensor) -> dict[str, float]:
    """The squared error of the outputs with one layer quantised and all others float, for each."""
    count = min(_RANKED_WITH, len(pixel_values))
    images = pixel_values[[i * len(pixel_values) // count for i in range(count)]]
    for place in places.values():
        place.use(quantised=False)
    reference = tensors_of(work(images))
    read = {*work.taps, *(layer_of(output) for output in work.outputs)}
    blocks = {id(module): i for i, block in enumerate(work.blocks) for module in block.modules()}
    squares: dict[str, float] = {}
    state, kept = work.embedding(images), dict[int, Tensor]()
    for number, block in enumerate(work.blocks):
        rest = _from_block(work, number, state, kept)
        for name, place in places.items():
            if blocks[id(place.linear)] != number:
                continue
            place.use(quantised=True)
            with watching(*_rounding({name: place})):
                squares[name] = relative_error(tensors_of(rest(images)), reference) ** 2
            place.use(quantised=False)
        state = block(state)
        if number in read:
            kept[number] = state
    for place in places.values():
        place.use(quantised=True)
    return squares


class _Held(nn.Module):
    """In the place of a part whose output is known, or read by nothing."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor | None) -> Tensor | None:
        return self.value


def _from_block(
    model: DeployedModel, number: int, state: Tensor, kept: Mapping[int, Tensor]
) -> DeployedModel:
    """The model from a block on.

    Args:
        state: what the block is given.
        kept: the outputs of earlier blocks that are read again, by their numbers.
    """
    part = copy.deepcopy(model, {id(module): module for module in model.modules() if module is not model})
    before = [state if i == number - 1 else kept.get(i) for i in range(number)]
    part.embedding = _Held(None if number else state)
    part.blocks = nn.ModuleList([*(_Held(value) for value in before), *list(model.blocks)[number:]])
    return part


def _rounding(places: Mapping[str, Place]) -> tuple[dict[str, Linear], Look]:
    """What :func:`watching` takes, so that each layer reads what is rounded."""
    linears = {name: place.linear for name, place in places.items()}
    return linears, lambda name, x: places[name].site.rounded(x)


def _joined(batches: Iterable[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Outputs of all images, of those of a few at a time."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
