"""The charts of a page: for each block, how far heads look, how long tokens are, what precisions cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vitdeploy.benchmark.plots import (
    Plot,
    Style,
    drawn,
    drawn_png,
    scale,
    scale_errors,
    series_gid,
    swatch,
    unit_above,
)
from vitdeploy.explanation.measures import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, Sequence[float | None]]
"""By name, a number for each block; None is none."""

_ON_WHITE = ("#0072b2", "#c24e00", "#00845f", "#a8548a", "#b07a00", "#3f8fc4", "#6b7280", "#7a7000")
"""As ``report.css`` has them for light pages."""


@dataclass(frozen=True)
class Chart:
    """For the page and as a picture of its own."""

    plot: Plot
    png: bytes
    legend: Mapping[str, str]
    """By a series' name, its line and marker."""


def distances_chart(distances: Sequence[Array]) -> Chart:
    """A point for each head.

    Args:
        distances: of each block, (h) in pixels.
    """

    def paint(axes: Axes, coloured: bool) -> None:
        places = [block for block, heads in enumerate(distances) for _ in heads]
        values = [float(far) for heads in distances for far in heads]
        axes.plot(
            places, values, "o", color=_colour(0, coloured), markersize=4, gid=series_gid("mark", Style(0, 0))
        )
        axes.set_ylim(0, max(values) * 1.08 or 1)
        _blocks(axes, len(distances))
        unit_above(axes, "pixels")

    return _chart("Mean attention distance of each head", "distance", paint, {})


def lines_chart(
    title: str, name: str, series: Series, *, unit: str = "", errors: bool = False
) -> Chart | None:
    """A line for each series, of what is above zero; None where nothing is.

    Args:
        errors: whether they are relative errors.
    """
    shown = {key: values for key, values in series.items() if any(values)}
    if not shown:
        return None

    def paint(axes: Axes, coloured: bool) -> None:
        every = []
        for number, values in enumerate(shown.values()):
            points = [(x, float(y)) for x, y in enumerate(values) if y]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            style, colour = Style(number % len(_ON_WHITE), 0), _colour(number, coloured)
            axes.plot(xs, ys, "-", color=colour, gid=series_gid("line", style))
            axes.plot(xs, ys, "o", color=colour, markersize=4, gid=series_gid("mark", style))
            every += ys
        _blocks(axes, max(map(len, shown.values())))
        if errors:
            scale_errors(axes, every)
        else:
            scale(axes, "y", every)
            unit_above(axes, unit)

    legend = {key: swatch(Style(number % len(_ON_WHITE), 0)) for number, key in enumerate(shown)}
    return _chart(title, name, paint, legend)


def _colour(number: int, coloured: bool) -> str:
    return _ON_WHITE[number % len(_ON_WHITE)] if coloured else "black"


def _blocks(axes: Axes, count: int) -> None:
    """The level axis: blocks, counted from zero as everywhere."""
    step = -(-count // 12)
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xlabel("block")


def _chart(title: str, name: str, paint: object, legend: Mapping[str, str]) -> Chart:
    assert callable(paint)
    return Chart(
        drawn(title, name, partial(paint, coloured=False)), drawn_png(partial(paint, coloured=True)), legend
    )
