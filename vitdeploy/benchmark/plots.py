"""The report's plots: SVG that takes its colours, and its text's font, from the page's style sheet.

A backend has a colour, and each of its artifacts a marker and a dash of its own; the legend is the page's,
one for all plots. Matplotlib draws in black; what an artist is, its gid says, which becomes the class that
``report.css`` colours. Only this file knows matplotlib.
"""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitdeploy.benchmark.ranking import batches, pareto, ranked
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.benchmark.tables import number_text, plain_text, series_name
from vitdeploy.config import size_name
from vitdeploy.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = 8
"""How many ``--series-N`` and ``.series-N`` the page's style sheet has to have."""
WIDTH: Final = 4.6
"""Inches: so small that its text is readable on a phone."""
HEIGHT: Final = 3.1
LONGEST_LABEL: Final = 50
LOG_FROM: Final = 5.0
"""Axes whose largest value is more than this many times the smallest are logarithmic."""
BINS: Final = 48

_CLASS: Final = "class:"
"""Begins the gid of an artist that the style sheet knows; the rest is its class."""
_LINK: Final = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "text.parse_math": False,
    "lines.color": "black",
    "lines.linewidth": 1.4,
    "lines.markersize": 6.0,
}
_DASHES: Final = ((None, None), (4, 2), (1.2, 1.6), (6, 1.5, 1.2, 1.5))


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> tuple[tuple[float, float], ...]:
    """Corners on a circle; with ``inner``, every other one at that share of its radius."""
    angles = [2 * math.pi * k / corners + turn for k in range(corners + 1)]
    radii = [inner if k % 2 else 1.0 for k in range(corners)]
    radii.append(radii[0])
    return tuple(
        (round(r * math.sin(a), 4), round(r * math.cos(a), 4)) for r, a in zip(radii, angles, strict=True)
    )


_MARKERS: Final = (
    _polygon(24),
    _polygon(4, math.pi / 4),
    _polygon(3),
    _polygon(4),
    _polygon(10, 0.0, 0.42),
    _polygon(3, math.pi),
    _polygon(8, 0.0, 0.5),
    _polygon(5),
)


class Style(NamedTuple):
    """How a series is told apart."""

    colour: int
    variant: int
    """Its place among the series of its backend: chooses marker and dash."""


class Plot(NamedTuple):
    title: str
    svg: str


def require_matplotlib(purpose: str = "the HTML report") -> None:
    """Find out before a measurement whether it can be drawn.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency("matplotlib", extra="report", purpose=purpose) from error


def styles(results: Results) -> dict[str, Style]:
    """The look of each series, in the order of the cells."""
    backends: dict[str, dict[str, None]] = {}
    found: dict[str, Style] = {}
    for cell in results.cells:
        name = series_name(results, cell)
        variants = backends.setdefault(cell.backend, {})
        variants.setdefault(name)
        colour = list(backends).index(cell.backend) % COLOURS
        found.setdefault(name, Style(colour, list(variants).index(name)))
    return found


def swatch(style: Style) -> str:
    """A series' line and marker for the legend: SVG, for inside a line of text."""
    corners = " ".join(
        f"{14 + 4.2 * x:.2f},{7 - 4.2 * y:.2f}" for x, y in _MARKERS[style.variant % len(_MARKERS)]
    )
    dash = " ".join(str(2 * length) for length in _DASHES[style.variant % len(_DASHES)] if length)
    return (
        f'<svg class="swatch series-{style.colour}" viewBox="0 0 28 14" aria-hidden="true">'
        f'<path d="M0 7H28" stroke="currentColor" stroke-width="1.8" stroke-dasharray="{dash}"/>'
        f'<polygon points="{corners}" fill="currentColor"/></svg>'
    )


def plots(results: Results, cells: Sequence[Cell], name: str) -> list[Plot]:
    """All plots of one group of cells; those that would be empty are left out.

    ``name`` is unique within the page: ids inside the SVG are made from it.
    """
    chart = _Chart(results, cells, name)
    right = ranked(cells)
    timed = [c for c in cells if c.status == "ok" and _usable(c.p50_ms)]
    found = []
    if timed:
        found.append(chart.draw("Latency against batch", "latency", lambda ax: chart.latency(ax, timed)))
    fast = [c for c in right if _usable(c.images_per_s)]
    if fast:
        found.append(
            chart.draw("Throughput against batch", "throughput", lambda ax: chart.throughput(ax, fast))
        )
    for batch in batches(cells):
        found += chart.of_batch(batch, [c for c in timed if c.batch == batch])
    return found


def size_plots(results: Results) -> list[Plot]:
    """Latency against image size of each bundle that has several: one for each batch size."""
    found = []
    for number, name in enumerate(dict.fromkeys(subject.name for subject in results.subjects)):
        own = [c for c in results.cells if c.subject == name and c.status == "ok" and _usable(c.p50_ms)]
        for batch in batches(own):
            cells = [cell for cell in own if cell.batch == batch]
            if len({cell.image_size for cell in cells}) > 1:
                chart = _Chart(results, cells, f"sizes-{number}")
                title = plain_text(f"Latency against image size, {name}, batch {batch}")
                found.append(chart.draw(title, str(batch), partial(chart.latency_by_size, cells=cells)))
    return found


def drawn(
    title: str,
    name: str,
    paint: Callable[[Axes], None],
    *,
    height: float = HEIGHT,
    labels: Mapping[str, str] | None = None,
) -> Plot:
    """A figure with one pair of axes, for a page with this room's style sheet.

    Args:
        name: unique within the page: ids inside the SVG are made from it.
        paint: draws in black, and gives what has a colour of its own the gid of :func:`series_gid`.
        labels: what to write in place of texts that ``paint`` leaves, which it may fill in.
    """
    svg = _saved(paint, height, "svg", name).decode()
    return Plot(title, _for_page(svg, name, title, labels or {}))


def drawn_png(paint: Callable[[Axes], None], *, height: float = HEIGHT) -> bytes:
    """The same as a picture of its own on white, in the colours that ``paint`` draws in."""
    return _saved(paint, height, "png", "")


def _saved(paint: Callable[[Axes], None], height: float, kind: Literal["svg", "png"], name: str) -> bytes:
    import matplotlib.style
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.style.context({**_SETTINGS, "svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        paint(axes)
        if kind == "png":
            figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        else:
            figure.patch.set_visible(False)
            axes.patch.set_visible(False)
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


class _Chart:
    """The plots of one group, with the series' styles."""

    def __init__(self, results: Results, cells: Sequence[Cell], name: str) -> None:
        self.results, self.name = results, name
        self.styles = styles(results)
        self.batches = batches(cells)
        self.labels: dict[str, str] = {}
        """By what stands in their place."""

    def draw(self, title: str, kind: str, paint: Callable[[Axes], None], height: float = HEIGHT) -> Plot:
        """A figure with one pair of axes."""
        self.labels = {}
        return drawn(title, f"{self.name}-{kind}", paint, height=height, labels=self.labels)

    def of_batch(self, batch: int, cells: Sequence[Cell]) -> list[Plot]:
        found = []
        sampled = [c for c in ranked(cells) if any(map(_usable, c.samples_ms))]
        if sampled:
            title = f"Every timed call, batch {batch}"
            height = 0.55 + 0.38 * max(2, len(sampled))
            paint = lambda ax: self.distribution(ax, sampled)  # noqa: E731
            found.append(self.draw(title, f"samples-{batch}", paint, height))
        erring = [c for c in cells if c.parity and c.parity.relative is not None]
        if erring:
            title = f"Error against latency, batch {batch}"
            found.append(self.draw(title, f"error-{batch}", lambda ax: self.error(ax, erring)))
        return found

    def latency(self, axes: Axes, cells: Sequence[Cell]) -> None:
        self._by_batch(axes, [(c, c.p50_ms or 0.0) for c in cells])
        scale(axes, "y", [c.p50_ms or 0.0 for c in cells])
        unit_above(axes, "median, ms")

    def latency_by_size(self, axes: Axes, cells: Sequence[Cell]) -> None:
        """Over the side of a square of as many pixels."""
        sides = {cell.image_size: math.sqrt(math.prod(cell.image_size)) for cell in cells}
        lines: dict[str, list[Cell]] = {}
        for cell in cells:
            self._point(axes, cell, sides[cell.image_size], cell.p50_ms or 0.0)
            if cell.valid:
                lines.setdefault(series_name(self.results, cell), []).append(cell)
        for name, line in lines.items():
            look, line = self.styles[name], sorted(line, key=lambda cell: sides[cell.image_size])
            dash: Any = _DASHES[look.variant % len(_DASHES)]
            xs, ys = [sides[cell.image_size] for cell in line], [cell.p50_ms or 0.0 for cell in line]
            axes.plot(xs, ys, color="black", dashes=dash, gid=series_gid("line", look))
        scale(axes, "y", [cell.p50_ms or 0.0 for cell in cells])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sides.values()), [size_name(size) for size in sides])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(sides.values()) / 1.15, max(sides.values()) * 1.15)
        axes.set_xlabel("image size")
        unit_above(axes, "median, ms")

    def throughput(self, axes: Axes, cells: Sequence[Cell]) -> None:
        self._by_batch(axes, [(c, c.images_per_s or 0.0) for c in cells])
        scale(axes, "y", [c.images_per_s or 0.0 for c in cells], log_from=12.0)
        unit_above(axes, "images per second")

    def _by_batch(self, axes: Axes, points: Sequence[tuple[Cell, float]]) -> None:
        lines: dict[str, list[tuple[Cell, float]]] = {}
        for cell, value in points:
            if cell.valid:
                lines.setdefault(series_name(self.results, cell), []).append((cell, value))
            else:
                self._point(axes, cell, cell.batch, value)
        for name, line in lines.items():
            look = self.styles[name]
            at = {cell.batch: value for cell, value in line}
            dash: Any = _DASHES[look.variant % len(_DASHES)]
            # A batch without a right cell interrupts the line.
            ys = [at.get(batch, math.nan) for batch in self.batches]
            axes.plot(self.batches, ys, color="black", dashes=dash, gid=series_gid("line", look))
            for cell, value in line:
                self._point(axes, cell, cell.batch, value)
        axes.set_xscale("log", base=2)
        shown = self.batches if len(self.batches) <= 8 else self.batches[:: math.ceil(len(self.batches) / 8)]
        axes.set_xticks(shown, [f"{batch:,}" for batch in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlim(self.batches[0] / 1.25, self.batches[-1] * 1.25)
        axes.set_xlabel("batch")

    def _point(self, axes: Axes, cell: Cell, x: float, y: float, alpha: float = 1.0) -> None:
        if not cell.valid:
            axes.plot([x], [y], "x", color="black", markeredgewidth=2.0, gid=f"{_CLASS}line bad", zorder=3)
            return
        look = self.styles[series_name(self.results, cell)]
        shape: Any = _MARKERS[look.variant % len(_MARKERS)]
        gid = series_gid("hollow" if cell.warnings else "mark", look)
        axes.plot([x], [y], marker=shape, color="black", linestyle="none", zorder=3, alpha=alpha, gid=gid)

    def distribution(self, axes: Axes, cells: Sequence[Cell]) -> None:
        """A row per cell: a histogram of its calls, a tick at the median, its name above."""
        taken = [[s for s in cell.samples_ms if _usable(s)] for cell in cells]
        every = [s for samples in taken for s in samples]
        low, high = scale(axes, "x", every)
        log = axes.get_xscale() == "log"
        for row, (cell, samples) in enumerate(zip(cells, taken, strict=True)):
            look = self.styles[series_name(self.results, cell)]
            heights, edges = _histogram(samples, low, high, log=log)
            axes.stairs(
                row - 0.42 * heights,
                edges,
                baseline=row,
                fill=True,
                color="black",
                lw=0,
                gid=series_gid("area", look),
            )
            axes.plot([min(samples), max(samples)], [row, row], "k", lw=1.0, gid=series_gid("line", look))
            axes.plot([cell.p50_ms or 0.0] * 2, [row + 0.08, row - 0.42], "k", lw=1.0, gid=f"{_CLASS}line")
            mark = " ⚠ disturbed" if cell.warnings else ""
            self._label(axes, row - 0.54, series_name(self.results, cell) + mark)
        axes.set_ylim(len(cells) - 0.7, -1.0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("ms")

    def error(self, axes: Axes, cells: Sequence[Cell]) -> None:
        """One batch size: the lower left is best, and the line joins what nothing beats in both."""
        known = [(c, c.parity.relative if c.parity and c.parity.relative else 0.0) for c in cells]
        least = min((e for _, e in known if e > 0), default=1e-8)
        errors = {id(c): min(max(e, least / 10, 1e-18), 1e6) for c, e in known}
        front = pareto(cells)
        axes.plot(
            [c.p50_ms or 0.0 for c in front],
            [errors[id(c)] for c in front],
            "k", linewidth=0.9, drawstyle="steps-post", alpha=0.55, gid=f"{_CLASS}line",
        )  # fmt: skip
        for cell in cells:
            best = any(cell is other for other in front)
            self._point(axes, cell, cell.p50_ms or 0.0, errors[id(cell)], 1.0 if best else 0.45)
        scale(axes, "x", [c.p50_ms or 0.0 for c in cells])
        scale_errors(axes, list(errors.values()))
        axes.set_xlabel("median, ms")

    def _label(self, axes: Axes, y: float, text: str) -> None:
        """Text is put in after drawing: matplotlib would look for its letters in a font of its own."""
        name = f"label-{len(self.labels)}"
        self.labels[name] = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
        place = axes.text(0.0, y, name, transform=axes.get_yaxis_transform(), fontsize=9)
        place.set_in_layout(False)


def _usable(value: float | None) -> bool:
    """Whether an axis can show it: no time or rate of anything is outside these limits."""
    return value is not None and 1e-9 < value < 1e12


def series_gid(kind: str, style: Style) -> str:
    """The gid of something in a series' colour."""
    return f"{_CLASS}{kind} series-{style.colour}"


def unit_above(axes: Axes, text: str) -> None:
    """What the upright axis shows, above it: turned text is hard to read."""
    axes.set_title(text, loc="left", fontsize=9.5)


def scale_errors(axes: Axes, values: Sequence[float]) -> None:
    """The upright axis for relative errors, which are above zero."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 4, max(values) * 4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", ""))
    axes.set_yticks([], minor=True)
    unit_above(axes, "relative error")


def scale(axes: Axes, which: str, values: Sequence[float], log_from: float = LOG_FROM) -> tuple[float, float]:
    """Limits with some air, logarithmic where the values are far apart."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    axis = axes.xaxis if which == "x" else axes.yaxis
    if high / low > log_from:
        ends = (low / 1.25, high * 1.25)
        axes.set(**{f"{which}scale": "log", f"{which}lim": ends})
        few = math.log10(high / low) < 2.5
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        axis.set_minor_locator(NullLocator())
    else:
        air = 0.06 * (high - low) or 0.05 * high
        ends = (max(0.0, low - air), high + air) if which == "x" else (0.0, high * 1.08)
        axes.set(**{f"{which}lim": ends})
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: number_text(value).removesuffix(".00").removesuffix(".0"))
    return ends


def _histogram(
    samples: Sequence[float], low: float, high: float, *, log: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts in bins over the axis, as shares of the largest, and the edges of the bins."""
    spaced = np.geomspace if log else np.linspace
    edges = np.asarray(spaced(low, high, BINS + 1), np.float64)
    counts = np.histogram(np.clip(samples, edges[0], edges[-1]), edges)[0]
    return counts / counts.max(), edges


def _for_page(svg: str, name: str, title: str, labels: Mapping[str, str]) -> str:
    """From a document of its own to a part of a page: classes for gids, and no ids but those referred to."""
    drawn = ET.fromstring(svg)
    page = ET.Element("svg", {"viewBox": drawn.get("viewBox", ""), "role": "img"})
    page.extend(drawn)
    for parent in page.iter():
        for part in list(parent):
            part.tag, part.tail = part.tag.rpartition("}")[2], None
            if part.tag in ("style", "metadata"):
                parent.remove(part)
            if _LINK in part.attrib:
                part.set("href", part.attrib.pop(_LINK))
            if "d" in part.attrib:
                part.set("d", " ".join(part.attrib["d"].split()))
            if part.get("id", "").startswith(_CLASS):
                part.set("class", part.attrib["id"].removeprefix(_CLASS))
            # What uses a marker has its style, too; on the marker itself no rule of the page would reach it.
            part.attrib.pop("style" if parent.tag == "defs" else "id", None)
            if part.text:
                part.text = labels.get(part.text, part.text)
    page.set("aria-labelledby", f"{name}-title")
    titled = ET.Element("title", {"id": f"{name}-title"})
    titled.text = title
    page.insert(0, titled)
    return ET.tostring(page, encoding="unicode")
