"""Measures of attention, tokens and weights: functions of arrays, each with its source.

Shapes: L blocks, h heads, n groups of tokens, A tokens of a group, T tokens, P patches, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitdeploy.config import Size

Float = NDArray[np.float64]
Array = NDArray[Any]

FILTERS = 28
"""Principal components that are shown, as in Dosovitskiy et al. 2021, figure 7."""


def rollout(means: Sequence[Array], shares: Array) -> Float:
    """How much of each input token reaches the pooled vector by attention and the residual stream alone.

    Abnar and Zuidema 2020 (https://arxiv.org/abs/2005.00928): the product over the blocks of 0.5 A + 0.5 I,
    where A is a block's attention, the mean of its heads. Only the rows that are pooled are computed.

    Args:
        means: of each block from the first to the last, (T, T); rows sum to one.
        shares: of each last token in the pooled vector, (T).

    Returns:
        (T), which sums to what ``shares`` do.
    """
    row = np.asarray(shares, np.float64)
    for mean in reversed(means):
        row = 0.5 * (row @ np.asarray(mean, np.float64)) + 0.5 * row
    return row


def relevance(cams: Sequence[Array], shares: Array, *, pooled_by: Array | None = None) -> Float:
    """How relevant each input token is to one class.

    Chefer, Gur and Wolf 2021 (https://arxiv.org/abs/2103.15679), equations 5 and 6: R begins as I and becomes
    R + cam R in every block; the rows that are pooled are read. What they have of themselves, the I, is left
    out, since it is the same for every image.

    Args:
        cams: of each block from the first to the last, :func:`cam` of its attention, (T, T).
        shares: of each last token in the pooled vector, (T).
        pooled_by: in place of ``shares``, where the model pools by attention: the cam of that, (T).

    Returns:
        (T).
    """
    begin = np.asarray(shares if pooled_by is None else pooled_by, np.float64)
    row = begin
    for block in reversed(cams):
        row = row + row @ np.asarray(block, np.float64)
    return row if pooled_by is not None else row - begin


def cam(weights: Array, gradients: Array) -> Float:
    """The mean over the heads of attention times its gradient, where that is positive: (h, ...) to (...).

    Chefer, Gur and Wolf 2021, equation 5.
    """
    product = np.asarray(gradients, np.float64) * np.asarray(weights, np.float64)
    found: Float = product.clip(min=0).mean(axis=0)
    return found


def mean_distances(weights: Array, places: Array, grid: Size, step: float) -> Float:
    """How far each head looks: the distance between patches, weighted by attention, mean of all queries.

    Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929), figure 7 on the right. Tokens that have no
    place in the image are left out, and the rest of each row is scaled to one.

    Args:
        weights: (n, h, A, A).
        places: the number of each token in the grid, row by row; negative is none, (n, A).
        grid: its rows and columns.
        step: pixels between neighbours.

    Returns:
        (h), in pixels.
    """
    heads = weights.shape[1]
    sums, queries = np.zeros(heads), 0
    for group, numbers in zip(weights, places, strict=True):
        there = np.flatnonzero(numbers >= 0)
        if not len(there):
            continue
        points = np.stack(np.divmod(numbers[there], grid[1]), axis=1).astype(np.float64)  # (P, 2)
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1) * step  # (P, P)
        seen = np.asarray(group[:, there][:, :, there], np.float64)  # (h, P, P)
        total = seen.sum(axis=-1)
        far = (seen * apart).sum(axis=-1) / np.where(total > 0, total, 1)
        sums += far.sum(axis=-1)
        queries += len(there)
    return sums / max(queries, 1)


def looked_at(weights: Array, places: Array, grid: Size, shares: Array | None = None) -> Float:
    """Where each head looks, as a map over the image, (h, rows, columns).

    Args:
        weights: (n, h, A, A).
        places: as :func:`mean_distances`.
        shares: of the rows that are looked from, (A); None is every token of a group that is in the image
            alike, so that the map is what each token receives, 1 being its even share.
    """
    heads = weights.shape[1]
    found = np.zeros((heads, grid[0] * grid[1]))
    for group, numbers in zip(weights, places, strict=True):
        there = np.flatnonzero(numbers >= 0)
        if shares is None:
            seen = np.asarray(group[:, there], np.float64).sum(axis=1)  # (h, A)
        else:
            seen = np.einsum("a,hab->hb", np.asarray(shares, np.float64), group)
        found[:, numbers[there]] = seen[:, there]
    return found.reshape(heads, *grid)


def on_the_grid(values: Array, places: Array, grid: Size) -> Float:
    """Of one number for each token, those in the image as a map: (T) to (rows, columns)."""
    found = np.zeros(grid[0] * grid[1])
    there = places >= 0
    found[places[there]] = values[there]
    return found.reshape(grid)


class Norms(NamedTuple):
    """The lengths of one block's tokens."""

    median: float
    """Of the patches."""
    largest: float
    """Of the patches."""
    prefix: tuple[float, ...]
    """Of the tokens that are no patches, in their order."""
    activation: float
    """The largest magnitude of a single number in any token: massive activations stand in a few columns and
    tokens (Sun et al. 2024, https://arxiv.org/abs/2402.17762)."""
    column: int
    """Where it is."""
    token: int


def token_norms(tokens: Array, places: Array) -> tuple[Norms, Float]:
    """Lengths of the tokens behind a block, and in figures what of them stands out.

    Large ones are what Darcet et al. 2024 (https://arxiv.org/abs/2309.16588) put registers in for.

    Args:
        tokens: (T, D).
        places: of each token in the image, (T); negative is none.

    Returns:
        The figures, and the length of every token, (T).
    """
    wide = np.asarray(tokens, np.float64)
    lengths: Float = np.linalg.norm(wide, axis=1)
    patches = lengths[places >= 0]
    token, column = np.unravel_index(np.abs(wide).argmax(), wide.shape)
    return (
        Norms(
            float(np.median(patches)),
            float(patches.max()),
            tuple(map(float, lengths[places < 0])),
            float(abs(wide[token, column])),
            int(column),
            int(token),
        ),
        lengths,
    )


def position_similarity(positions: Array) -> Float:
    """The cosine of every two positions, (P, D) to (P, P).

    Dosovitskiy et al. 2021, figure 7 in the middle.
    """
    wide = np.asarray(positions, np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(lengths > 0, lengths, 1)
    found: Float = unit @ unit.T
    return found


def principal_filters(filters: Array, count: int = FILTERS) -> tuple[Float, Float]:
    """The principal components of the first projection's filters.

    Dosovitskiy et al. 2021, figure 7 on the left.

    Args:
        filters: (filters, C, rows, columns).

    Returns:
        The components, the largest first, (k, C, rows, columns), each of length 1 and with its largest number
        positive; and the share of the filters' variance that each has, (k).
    """
    rows = np.asarray(filters, np.float64).reshape(len(filters), -1)
    _, values, vectors = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    kept = vectors[:count]
    largest = kept[np.arange(len(kept)), np.abs(kept).argmax(axis=1)]
    kept = kept * np.sign(largest)[:, None]
    power = values**2
    return kept.reshape(len(kept), *filters.shape[1:]), power[:count] / max(power.sum(), 1e-300)


def relative_error(got: Array, exact: Array) -> float | None:
    """||got - exact|| / ||exact|| of whole tensors; None where ``got`` has NaN or is infinite."""
    if not np.isfinite(got).all():
        return None
    size = float(np.linalg.norm(exact))
    error = float(np.linalg.norm(np.asarray(got, np.float64) - exact))
    return error / size if size else (0.0 if error == 0 else None)
