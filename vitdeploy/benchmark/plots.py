"""The report's plots: SVG that takes its colours, and its text's font, from the page around it.

A backend has a colour, and each of its artifacts a marker and a dash of its own; the legend is the page's,
one for all plots. Only this file knows matplotlib.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vitdeploy.benchmark import wording
from vitdeploy.benchmark.ranking import batches, pareto, ranked
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = 8
"""How many ``--series-N`` the page's style sheet has to have."""
WIDTH: Final = 4.6
"""Inches: so small that its text is readable on a phone."""
HEIGHT: Final = 3.1
LONGEST_LABEL: Final = 50
LOG_FROM: Final = 5.0
"""Axes whose largest value is more than this many times the smallest are logarithmic."""
BINS: Final = 48

# Colours that no plot has: each becomes a variable of the page.
_INK, _GRID, _BAD, _PAPER = "#f00df0", "#f00df1", "#f00df2", "#f00df3"
_VARIABLES: Final = {_INK: "currentColor", _GRID: "var(--grid)", _BAD: "var(--bad)", _PAPER: "var(--paper)"}
_SETTINGS: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
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


def require_matplotlib() -> None:
    """Find out before a measurement whether it can be drawn.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency("matplotlib", extra="report", purpose="the HTML report") from error


def styles(results: Results) -> dict[str, Style]:
    """The look of each series, in the order of the cells."""
    backends: dict[str, dict[str, None]] = {}
    found: dict[str, Style] = {}
    for cell in results.cells:
        name = wording.series(results, cell)
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
    colour = f"var(--series-{style.colour})"
    return (
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true" style="color:{colour}">'
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


class _Chart:
    """The plots of one group, with the series' styles."""

    def __init__(self, results: Results, cells: Sequence[Cell], name: str) -> None:
        self.results, self.name = results, name
        self.styles = styles(results)
        self.batches = batches(cells)
        self.labels: list[str] = []

    def draw(self, title: str, kind: str, paint: Callable[[Axes], None], height: float = HEIGHT) -> Plot:
        """A figure with one pair of axes."""
        import matplotlib.style
        from matplotlib.figure import Figure

        name = f"{self.name}-{kind}"
        self.labels = []
        buffer = io.StringIO()
        settings = {**_SETTINGS, "svg.hashsalt": name}
        with matplotlib.style.context(settings, after_reset=True):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            figure.patch.set_visible(False)
            axes = figure.add_subplot()
            axes.patch.set_visible(False)
            axes.tick_params(length=0)
            paint(axes)
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=nothing)
        return Plot(title, _for_page(buffer.getvalue(), name, title, self.labels))

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
        _scale(axes, "y", [c.p50_ms or 0.0 for c in cells])
        _unit(axes, "median, ms")

    def throughput(self, axes: Axes, cells: Sequence[Cell]) -> None:
        self._by_batch(axes, [(c, c.images_per_s or 0.0) for c in cells])
        _scale(axes, "y", [c.images_per_s or 0.0 for c in cells], log_from=12.0)
        _unit(axes, "images per second")

    def _by_batch(self, axes: Axes, points: Sequence[tuple[Cell, float]]) -> None:
        lines: dict[str, list[tuple[Cell, float]]] = {}
        for cell, value in points:
            if cell.valid:
                lines.setdefault(wording.series(self.results, cell), []).append((cell, value))
            else:
                self._point(axes, cell, cell.batch, value)
        for name, line in lines.items():
            look = self.styles[name]
            at = {cell.batch: value for cell, value in line}
            dash: Any = _DASHES[look.variant % len(_DASHES)]
            # A batch without a right cell interrupts the line.
            ys = [at.get(batch, math.nan) for batch in self.batches]
            axes.plot(self.batches, ys, color=_series(look), dashes=dash)
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
            axes.plot([x], [y], marker="x", color=_BAD, linestyle="none", markeredgewidth=2.0)
            return
        look = self.styles[wording.series(self.results, cell)]
        shape: Any = _MARKERS[look.variant % len(_MARKERS)]
        (point,) = axes.plot(
            [x], [y], marker=shape, color=_series(look), linestyle="none", zorder=3, alpha=alpha
        )
        if cell.warnings:
            point.set_markerfacecolor(_PAPER)

    def distribution(self, axes: Axes, cells: Sequence[Cell]) -> None:
        """A row per cell: a histogram of its calls, a tick at the median, its name above."""
        taken = [[s for s in cell.samples_ms if _usable(s)] for cell in cells]
        every = [s for samples in taken for s in samples]
        low, high = _scale(axes, "x", every)
        log = axes.get_xscale() == "log"
        for row, (cell, samples) in enumerate(zip(cells, taken, strict=True)):
            colour = _series(self.styles[wording.series(self.results, cell)])
            xs, ys = _histogram(samples, low, high, log=log)
            axes.fill_between(
                xs, [row] * len(xs), [row - 0.42 * y for y in ys], step="mid", color=colour, lw=0
            )
            axes.plot([min(samples), max(samples)], [row, row], color=colour, linewidth=1.0)
            axes.plot([cell.p50_ms or 0.0] * 2, [row + 0.08, row - 0.42], color=_INK, linewidth=1.0)
            mark = " ⚠ disturbed" if cell.warnings else ""
            self._label(axes, row - 0.54, wording.series(self.results, cell) + mark)
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
            color=_INK, linewidth=0.9, drawstyle="steps-post", alpha=0.55,
        )  # fmt: skip
        for cell in cells:
            best = any(cell is other for other in front)
            self._point(axes, cell, cell.p50_ms or 0.0, errors[id(cell)], 1.0 if best else 0.45)
        _scale(axes, "x", [c.p50_ms or 0.0 for c in cells])
        axes.set_yscale("log")
        top, bottom = max(errors.values()), min(errors.values())
        axes.set_ylim(bottom / 4, top * 4)
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")
        )
        axes.set_yticks([], minor=True)
        axes.set_xlabel("median, ms")
        _unit(axes, "relative error")

    def _label(self, axes: Axes, y: float, text: str) -> None:
        """Text is put in after drawing: matplotlib would look for its letters in a font of its own."""
        self.labels.append(text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…")
        place = axes.text(
            0.0, y, f"@{len(self.labels) - 1}@", transform=axes.get_yaxis_transform(), fontsize=9
        )
        place.set_in_layout(False)


def _usable(value: float | None) -> bool:
    """Whether an axis can show it: no time or rate of anything is outside these limits."""
    return value is not None and 1e-9 < value < 1e12


def _series(style: Style) -> str:
    return f"#f00d{style.colour:02x}"


def _unit(axes: Axes, text: str) -> None:
    """What the upright axis shows, above it: turned text is hard to read."""
    axes.set_title(text, loc="left", fontsize=9.5, color=_INK)


def _scale(
    axes: Axes, which: str, values: Sequence[float], log_from: float = LOG_FROM
) -> tuple[float, float]:
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
    axis.set_major_formatter(lambda value, _: wording.number(value).removesuffix(".00").removesuffix(".0"))
    return ends


def _histogram(
    samples: Sequence[float], low: float, high: float, *, log: bool
) -> tuple[list[float], list[float]]:
    """Middles of bins over the axis, and counts as shares of the largest."""
    turn: Callable[[float], float] = math.log if log else float
    start, step = turn(low) if low > 0 or not log else 0.0, 0.0
    step = (turn(high) - start) / BINS
    counts = [0] * BINS
    for sample in samples:
        counts[min(BINS - 1, max(0, int((turn(sample) - start) / step)))] += 1
    middles = [start + (k + 0.5) * step for k in range(BINS)]
    back: Callable[[float], float] = math.exp if log else float
    return [back(m) for m in middles], [count / max(counts) for count in counts]


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def _for_page(svg: str, name: str, title: str, labels: Sequence[str]) -> str:
    """From a document of its own to a part of a page: its colours, its font, no ids but those referred to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, svg)
    svg = re.sub(r"#f00d0[0-9a-f]", lambda m: f"var(--series-{int(m[0][-2:], 16)})", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    head, body = svg[: svg.index(">")], svg[svg.index(">") + 1 :]
    view = re.search(r'viewBox="[^"]*"', head)
    opening = f'<svg {view[0] if view else ""} role="img" aria-labelledby="{name}-title">'
    body = re.sub(r"\n\s*", "\n", body)
    body = re.sub(r"@(\d+)@", lambda m: html.escape(labels[int(m[1])]), body)
    return f'{opening}<title id="{name}-title">{html.escape(title)}</title>{body}'
