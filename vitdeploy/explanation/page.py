"""Figures as pictures, and all of them as one page that loads nothing: light and dark, on a phone too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from vitdeploy.benchmark.report import page_template
from vitdeploy.explanation.charts import Chart, distances_chart, lines_chart
from vitdeploy.explanation.figures import Explanation, ImageFigures, mean_norms
from vitdeploy.explanation.measures import Float
from vitdeploy.explanation.pictures import (
    Kind,
    Pixels,
    data_url,
    easily_seen,
    encoded,
    heat,
    over,
    resized,
    scaled,
    stacked,
    tiled,
)

_TILE = 64
"""Pixels of a small picture's height."""
_SIMILAR = 16
"""Rows and columns of positions whose similarity to all others is shown, at most."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of the page."""

    file: str
    """Its name in a folder of pictures."""
    pixels: Pixels
    title: str
    note: str = ""
    sharp: bool = False
    """Whether its pixels are what is to be seen: it is kept exact, and enlarged as rectangles."""
    rows: tuple[tuple[str, Pixels], ...] = field(default=())
    """On the page, in place of all in one: pictures with what they are."""

    @property
    def png(self) -> bytes:
        """For the folder."""
        if not self.sharp:
            return encoded(self.pixels)
        height, width = self.pixels.shape[:2]
        times = max(1, 480 // max(height, width))
        return encoded(resized(self.pixels, times * height, times * width, smooth=False))

    @cached_property
    def url(self) -> str:
        """For the page."""
        return _url(self.pixels, self.sharp)

    @cached_property
    def strips(self) -> list[tuple[str, str, int, int]]:
        """Of ``rows``: what each is, its address, its width and height."""
        return [(what, _url(row, False), row.shape[1], row.shape[0]) for what, row in self.rows]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True, eq=False)
class ImageSection:
    """What the page shows of one image."""

    figures: ImageFigures
    name: str
    answer: str
    """The likeliest class, in words; empty where there are none."""
    over: tuple[Picture, ...]
    small: tuple[Picture, ...]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Everything that is drawn."""

    images: tuple[ImageSection, ...]
    weights: tuple[Picture, ...]
    charts: tuple[tuple[str, Chart], ...]
    """By the name of their files."""

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every picture as a PNG file."""
        for section in self.images:
            for picture in (*section.over, *section.small):
                yield picture.file, picture.png
        for picture in self.weights:
            yield picture.file, picture.png
        for name, chart in self.charts:
            yield name, chart.png


def draw(explanation: Explanation) -> Drawn:
    """Make the pictures.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    return Drawn(
        tuple(_section(image, number) for number, image in enumerate(explanation.images, 1)),
        tuple(_weights(explanation)),
        tuple(_charts(explanation)),
    )


def html_text(explanation: Explanation, drawn: Drawn) -> str:
    """The whole page; the same figures give the same text.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    template = page_template(Path(__file__).parent, "page.html")
    return template.render(
        explanation=explanation,
        drawn=drawn,
        folded=len(explanation.images) > 1,
        errors=[(e.precision, e.output, e.of, e.reason) for e in explanation.errors],
    )


def _url(pixels: Pixels, sharp: bool) -> str:
    kind: Kind = "PNG" if sharp else "WEBP"
    return data_url(encoded(pixels, kind), kind)


def _section(image: ImageFigures, number: int) -> ImageSection:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(image.path).stem).strip("_")[:40] or "image"
    folder = f"{number:02d}-{stem}"
    picture = easily_seen(image.picture)
    shown = [Picture(f"{folder}/input.png", picture, "what the model is given")]
    if image.rollout is not None:
        title, note = "attention rollout", "whatever the class"
        shown.append(Picture(f"{folder}/rollout.png", over(picture, image.rollout), title, note))
    for found in image.relevance:
        file = f"{folder}/relevance-{found.label.index}.png"
        note = f"score {found.label.score:.4f}"
        title = f"relevance for {found.label.label}"
        shown.append(Picture(file, over(picture, found.places), title, note))
    best = image.predictions[0] if image.predictions else None
    answer = f"{best.label}, score {best.score:.4f}" if best else ""
    return ImageSection(image, Path(image.path).name, answer, tuple(shown), tuple(_small(image, folder)))


def _small(image: ImageFigures, folder: str) -> Iterator[Picture]:
    height, width = image.image_size
    tile = resized(image.picture, _TILE, min(4 * _TILE, max(_TILE // 4, round(_TILE * width / height))))
    if image.attention:
        rows = [
            (f"block {block}", tiled([over(tile, head) for head in heads], len(heads), 2))
            for block, heads in enumerate(image.attention)
        ]
        title = "attention by block and head"
        whole = stacked([row for _, row in rows], 2)
        yield Picture(f"{folder}/attention.png", whole, title, rows=tuple(rows))
    if image.lengths:
        wide = [heat(scaled(lengths)) for lengths in image.lengths]
        tiles = [resized(row, *tile.shape[:2], smooth=False) for row in wide]
        columns = min(len(tiles), 12)
        title = "length of every token, by block"
        yield Picture(f"{folder}/norms.png", tiled(tiles, columns, 2), title)


def _weights(explanation: Explanation) -> Iterator[Picture]:
    model = explanation.model
    if model.filters is not None:
        tiles = [_filter(component) for component in model.filters]
        share = sum(model.shares)
        note = f"the first {len(tiles)}, {share:.1%} of the filters' variance"
        picture = tiled(tiles, min(7, len(tiles)), 1)
        yield Picture("filters.png", picture, "principal components of the patch filters", note, sharp=True)
    if model.positions is not None:
        picture, note = _similarity(model.positions, model.grid)
        yield Picture("positions.png", picture, "similarity of position embeddings", note, sharp=True)


def _filter(component: Float) -> Pixels:
    """(C, rows, columns) with zero in the middle: grey is nothing."""
    largest = max(float(np.abs(component).max()), 1e-12)
    levels = np.rint((component / largest * 0.5 + 0.5) * 255).astype(np.uint8).transpose(1, 2, 0)
    return levels if levels.shape[2] == 3 else np.repeat(levels[:, :, :1], 3, axis=2)


def _similarity(cosines: Float, grid: tuple[int, int]) -> tuple[Pixels, str]:
    """For patches over the image, a map of how much each other patch's position is like theirs."""
    rows, columns = (
        np.unique(np.linspace(0, side - 1, min(side, _SIMILAR)).round().astype(int)) for side in grid
    )
    maps = [cosines[row * grid[1] + column].reshape(grid) for row in rows for column in columns]
    low = float(cosines.min())
    times = -(-_TILE // (4 * max(grid)))  # so that gaps between maps are thin
    tiles = [heat((cosine - low) / max(1 - low, 1e-12)).repeat(times, 0).repeat(times, 1) for cosine in maps]
    which = "every patch" if len(maps) == grid[0] * grid[1] else f"{len(rows)}x{len(columns)} patches"
    return tiled(
        tiles, len(columns), 1
    ), f"of {which} to all others; cosines from {low:.2f} (dark) to 1 (light)"


def _charts(explanation: Explanation) -> Iterator[tuple[str, Chart]]:
    distances = explanation.distances
    if distances:
        yield "distance.png", distances_chart(distances)
    if norms := mean_norms(explanation.images):
        chart = lines_chart("Length of tokens", "norms", _norm_lines(norms, explanation.model.prefix))
        if chart is not None:
            yield "norms.png", chart
    lines = {e.precision: e.blocks for e in explanation.errors if e.blocks}
    if lines:
        title = "What each precision costs behind each block"
        chart = lines_chart(title, "precision", lines, errors=True)
        if chart is not None:
            yield "precision.png", chart


def _norm_lines(
    norms: Sequence[tuple[float, float, tuple[float, ...]]], prefix: Sequence[str]
) -> dict[str, list[float | None]]:
    lines: dict[str, list[float | None]] = {
        "patches, median": [median for median, _, _ in norms],
        "patches, largest": [largest for _, largest, _ in norms],
    }
    registers = [place for place, name in enumerate(prefix) if name.startswith("register")]
    for place, name in enumerate(prefix):
        if place not in registers:
            lines[name] = [tokens[place] for _, _, tokens in norms]
    if registers:
        lines["registers, largest"] = [max(tokens[place] for place in registers) for _, _, tokens in norms]
    return lines
