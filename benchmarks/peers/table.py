"""The tables of vitdeploy against other tools, made from the committed results.

python -m benchmarks.peers.table            # print them, and what does not hold of what we claim
python -m benchmarks.peers.table --write    # put them into docs/performance.md and README.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.documents import Part
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.spread import quartiles
from benchmarks.vits import SIZES
from vitdeploy.benchmark.compare import round_medians
from vitdeploy.benchmark.results import Cell, Results, read_results
from vitdeploy.errors import UsageError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/peers/table.py")
SUMMARY = Part(ROOT / "README.md", "benchmarks/peers/table.py: summary")
INTRODUCTION = """\
Against other tools on the same weights, in the same rounds ([how](../benchmarks/README.md)). A peer's time is
followed by how many times as fast vitdeploy is on the same runtime: the median over the rounds, and their
quartiles."""

FLAGSHIP = "vit_base_patch16_224"
PLAIN = {1: 1.05, 8: 1.07}
"""How many times as fast as plain exports of the flagship our graph is at least, by batch size."""
LEVEL = 0.98
"""Of the fastest peer's speed, what our fastest backend reaches at least: level, but for noise."""


class Group(NamedTuple):
    """Tools on the same runtime in the same precision."""

    title: str
    ours: str
    """Our backend, which the peers are held against."""
    runtime: str
    precision: str

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(p for p in PEERS.values() if (p.runtime, p.precision) == (self.runtime, self.precision))


GROUPS = (
    Group("ONNX Runtime, fp32", "onnxruntime", "onnxruntime", "fp32"),
    Group("OpenVINO, fp32", "openvino", "openvino", "fp32"),
    Group("OpenVINO, bf16", "openvino", "openvino", "bf16"),
    Group("PyTorch, fp32", "torch", "torch", "fp32"),
    Group("PyTorch, compiled, fp32", "torch-compile", "", "fp32"),
    Group("PyTorch, compiled ahead of time, fp32", "aotinductor", "", "fp32"),
)


class Ratio(NamedTuple):
    """How many times as fast as another tool we are: median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float


def ratio(ours: Cell, theirs: Cell) -> Ratio:
    """Their time over ours, round by round where both were measured in the same rounds.

    A cell that was measured again has rounds of its own; then each round of one is held against each of
    the other, which can only widen the spread.
    """
    a, b = round_medians(ours), round_medians(theirs)
    together = len(a) == len(b) and not ours.repeats and not theirs.repeats
    found = quartiles((b / a if together else np.divide.outer(b, a).ravel()).tolist())
    return Ratio(found["median"], found["q1"], found["q3"])


def our_cell(results: Results, group: Group, batch: int) -> Cell | None:
    """Our cell of a group, if it was measured."""
    found = (c for c in results.cells if c.backend == group.ours and c.precision == group.precision)
    return next((c for c in found if c.batch == batch), None)


def peer_cell(results: Results, peer: Peer, batch: int) -> Cell | None:
    """A peer's cell, if it was measured."""
    name = (peer.backend, peer.runtime, peer.artifact, batch)
    found = (c for c in results.cells if (c.backend, c.provider, c.artifact, c.batch) == name)
    return next(found, None)


def picked(results: Results, batch: int) -> tuple[Cell, Cell, str, str] | None:
    """Our fastest right cell, the fastest right one of a peer, and the titles of both."""
    ours = [(our_cell(results, g, batch), g.title) for g in GROUPS]
    theirs = [(peer_cell(results, p, batch), title_of(p)) for p in PEERS.values()]
    best = []
    for side in (ours, theirs):
        right = [(cell.p50_ms, title, cell) for cell, title in side if cell and cell.valid and cell.p50_ms]
        if not right:
            return None
        best.append(min(right, key=lambda found: found[0]))
    return best[0][2], best[1][2], best[0][1], best[1][1]


def title_of(peer: Peer) -> str:
    """A peer's title where its group is not said beside it."""
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    suffix = f" on {names[peer.runtime]}" if peer.runtime in names and peer.backend == "torch.onnx" else ""
    return peer.title + suffix


def tables(results: Sequence[Results]) -> str:
    """The whole of what was measured."""
    return "\n\n".join([INTRODUCTION, *map(_table, results)])


def summary(results: Results) -> str:
    """One model's exported graphs against those of plain ``torch.onnx.export``, by runtime."""
    (subject,) = results.subjects
    batches = results.settings.batches
    rows = []
    for group in GROUPS:
        plain = next((peer for peer in group.peers if peer.backend == "torch.onnx" and not peer.spin), None)
        if plain is not None:
            pairs = [(our_cell(results, group, b), peer_cell(results, plain, b)) for b in batches]
            rows += [
                [f"{group.title}: **vitdeploy**", *(f"**{_ms(ours)}**" for ours, _ in pairs)],
                [f"— {plain.title}", *(_against(ours, theirs) for ours, theirs in pairs)],
            ]
    best = [found and ratio(found[0], found[1]) for found in (picked(results, batch) for batch in batches)]
    rows.append(["our fastest against the fastest other tool", *(_said(one) if one else "" for one in best)])
    words = (
        f"{subject.model}, median ms, {results.environment.cpu.name}, {_threads(results)}. A peer's time is",
        "followed by how many times as fast vitdeploy is (quartiles over the rounds). More models and tools,",
        "and what an export costs: [docs/performance.md](docs/performance.md).",
    )
    return "\n".join([*words, "", *_lines(["", *(f"batch {b}" for b in batches)], rows)])


def _lines(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _table(results: Results) -> str:
    (subject,) = results.subjects
    batches = results.settings.batches
    rows = [
        f"**{subject.model}**, {results.environment.cpu.name}, {_threads(results)}:",
        "",
        *_lines(["median ms", *(f"batch {b}" for b in batches)], _rows(results, batches)),
    ]
    return "\n".join([*rows, *_missing(results)])


def _threads(results: Results) -> str:
    (threads,) = results.settings.threads
    return f"{threads} threads, {results.rounds} interleaved rounds"


def _rows(results: Results, batches: Sequence[int]) -> Iterator[list[str]]:
    for group in GROUPS:
        ours = [our_cell(results, group, batch) for batch in batches]
        if any(ours):
            yield [f"**vitdeploy** on {group.title}", *(f"**{_ms(cell)}**" for cell in ours)]
        for peer in group.peers:
            theirs = [peer_cell(results, peer, batch) for batch in batches]
            if any(theirs):
                pairs = zip(ours, theirs, strict=True)
                yield [f"— {peer.title}", *(_against(mine, other) for mine, other in pairs)]
    best = [picked(results, batch) for batch in batches]
    yield ["**vitdeploy's fastest against the fastest other tool**", *map(_best, best)]


def _ms(cell: Cell | None) -> str:
    if cell is None or cell.p50_ms is None:
        return "not measured"
    return f"{cell.p50_ms:.1f}" if cell.valid else f"~~{cell.p50_ms:.1f}~~ wrong"


def _against(ours: Cell | None, theirs: Cell | None) -> str:
    if ours is None or theirs is None or not (ours.valid and theirs.valid):
        return _ms(theirs)
    return f"{_ms(theirs)}, {_said(ratio(ours, theirs))}"


def _best(found: tuple[Cell, Cell, str, str] | None) -> str:
    if found is None:
        return "not measured"
    ours, theirs, mine, other = found
    return f"**{_said(ratio(ours, theirs))}**: {mine} against {other}"


def _said(found: Ratio) -> str:
    return f"{found.median:.2f} × ({found.q1:.2f} to {found.q3:.2f})"


def _missing(results: Results) -> list[str]:
    lost = [f"{one.backend} {one.artifact} ({one.reason})" for one in results.skipped]
    return ["", f"Not measured: {'; '.join(lost)}."] if lost else []


def broken_claims(results: Results) -> list[str]:
    """What of our claims these results do not bear out; one line each."""
    (subject,) = results.subjects
    batches = results.settings.batches
    found: list[str] = []
    if subject.model == FLAGSHIP:
        for batch, least in PLAIN.items():
            found += _plain_exports(results, batch, least)
    for batch in batches:
        best = picked(results, batch)
        if best is None:
            found.append(f"{subject.model}, batch {batch}: nothing right of ours or of the peers'")
        elif (level := ratio(best[0], best[1]).median) < LEVEL:
            found.append(f"{subject.model}, batch {batch}: {best[2]} is {level:.2f} × as fast as {best[3]}")
    return found


def _plain_exports(results: Results, batch: int, least: float) -> Iterator[str]:
    """On ONNX Runtime and on OpenVINO, our graph against those of other exporters."""
    for group in GROUPS[:3]:
        ours = our_cell(results, group, batch)
        for peer in group.peers:
            if "onnx" not in peer.artifact:
                continue
            theirs, name = peer_cell(results, peer, batch), f"{group.title}, batch {batch}, {peer.title}"
            if ours is None or theirs is None or not (ours.valid and theirs.valid):
                yield f"{name}: not measured, or wrong"
            elif not peer.spin and (gain := ratio(ours, theirs).median) < least:
                yield f"{name}: {gain:.3f} × instead of {least} ×"


def committed(folder: Path = RESULTS) -> list[Results]:
    """The results of every model, the flagship first.

    Raises:
        UsageError: one is missing, unreadable or partial.
    """
    names = sorted(SIZES, key=lambda name: name != FLAGSHIP)
    found = [read_results(folder / f"cpu-{name}.json") for name in names]
    for one in found:
        if one.partial:
            raise UsageError(f"the results of {one.subjects[0].model} are partial", hint="make bench-peers")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md and README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    try:
        results = committed(options.results)
    except UsageError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    broken = (claim for one in results for claim in broken_claims(one))
    SUMMARY.publish(summary(results[0]), (), write=options.write)
    PART.publish(tables(results), broken, write=options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
