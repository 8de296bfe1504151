"""The measurements in docs/serving.md and docs/performance.md, made from the committed records.

python -m benchmarks.serving.table            # print them, and what does not hold of what we claim
python -m benchmarks.serving.table --write    # put them into the documents
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.documents import Part
from benchmarks.peers.environments import ROOT
from benchmarks.serving.claims import broken_claims, claims, unmeasured
from benchmarks.serving.record import (
    RESULTS,
    Record,
    best_raw,
    middle,
    over,
    rates,
    raw_name,
    read,
)
from benchmarks.serving.servers import GENERATOR, OURS
from benchmarks.serving.settings import PLANS

PART = Part(ROOT / "docs" / "serving.md", "benchmarks/serving/table.py")
LIMITS = Part(ROOT / "docs" / "performance.md", "benchmarks/serving/table.py")
NOT_YET = "not yet measured"


def committed() -> list[Record]:
    """The record of every model.

    Raises:
        FileNotFoundError: one is missing.
    """
    return [read(RESULTS / f"serve-{model}.json") for model in PLANS]


def text(records: Sequence[Record]) -> str:
    """The part of docs/serving.md."""
    return "\n\n".join(map(text_of, records))


def text_of(record: Record) -> str:
    """One model's record for people, as Markdown."""
    lines = [f"**{record['model']}** on {record['environment']['cpu']['name']}{_how(record)}"]
    for kind, part in record["closed"].items():
        columns = ("images/s", "vitdeploy's over it", "p50 ms", "p99 ms", "processor ms per image")
        lines += ["", *_table((f"{kind}s", *columns), _rows(part))]
    lines += ["", *_open_lines(record), "", *_loadgen_lines(record), ""]
    goals = [(one.what, one.goal, one.measured) for one in claims(record)]
    lines += _table(("goal", "bound", "measured"), goals)
    left_out = [f"{one['lane']} ({one['reason']})" for one in record["skipped"]]
    lines += ["", f"Left out: {'; '.join(left_out)}."] if left_out else []
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines]


def _how(record: Record) -> str:
    """The closed loop's settings, and what the server said of itself."""
    made = record["parts"].get("closed")
    if made is None:
        return ""
    plan, note = made["settings"], record["notes"].get(OURS)
    words = [
        f"{plan['threads']} processors, {plan['clients']} clients",
        f"{plan['rounds']} rounds of {plan['seconds']:g} s",
        *([f"{plan['image_rounds']} with images"] if plan["image_rounds"] != plan["rounds"] else []),
    ]
    return f", {', '.join(words)}" + (f"; `{note}`" if note else "")


def _rows(part: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, found in rates(part).items():
        visits, ratio = part["lanes"].get(name, ()), over(part, OURS, name)
        spread = _spread(ratio, ".3f") if ratio is not None and name not in (OURS, GENERATOR) else ""
        tails = [_median([visit["latency_ms"].get(p) for visit in visits]) for p in ("50", "99")]
        spent = _median([visit.get("server_cpu_ms") for visit in visits], 2)
        yield name, f"{middle(found):.1f}", spread, *tails, spent


def _open_lines(record: Record) -> Iterator[str]:
    load, search, flood = (record.get(name) for name in ("at_80_percent", "highest_rate", "overload"))
    if not load or not search:
        yield f"Latencies at a given rate: {NOT_YET}."
        return
    for kind in ("constant", "poisson"):
        found, ideal = load[kind], load[kind]["ideal"]
        yield (
            f"- 80 % load, {kind} arrivals: p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms "
            f"({found['p99_over_p50']} x); on a perfect server p99 {ideal['p99_ms']} ms "
            f"({ideal['p99_over_p50']} x)"
        )
    yield (
        f"- p99 under {search['bound_p99_ms']:g} ms up to {search['rate']:.1f} random requests per second, "
        f"{search['of_capacity']:.0%} of the closed-loop throughput"
    )
    if flood:
        refused = flood["refused_ms"]
        yield (
            f"- overload: {flood['refused_429']} of {flood['requests']} refused with 429, "
            f"p99 {refused['p99']} ms, at most {refused['max']} ms; recovered after {flood['recovery_s']} s"
        )


def _loadgen_lines(record: Record) -> Iterator[str]:
    found = record.get("loadgen")
    if not found:
        yield f"MLPerf's LoadGen: {NOT_YET}."
        return
    settings = found["settings"]
    percentile, usual = (
        round(100 * settings[name]) for name in ("server_percentile", "mlperf_server_percentile")
    )
    server = f"Server: images/s with p{percentile} ≤ {settings['server_bound_ms']:g} ms"
    columns = ("right answers", "SingleStream: p90 ms", "Offline: images/s", server)
    yield from _table((f"LoadGen {found['version']}", *columns), map(_loadgen_row, found["lanes"].items()))
    theirs = "" if usual == percentile else f" and the {usual}th percentile"
    yield ""
    yield (
        f"A run takes {settings['min_duration_s']:g} s or more; MLPerf's rules ask for "
        f"{settings['mlperf_min_duration_s']} s{theirs}. Of the Server scenario's rates that were tried, the "
        "highest valid one is given."
    )
    yield from (f"LoadGen left out {lane}: {why}." for lane, why in found["skipped"].items())


def _loadgen_row(entry: tuple[str, Mapping[str, Any]]) -> Sequence[str]:
    name, lane = entry
    accuracy, single, offline, last = (
        lane["accuracy"],
        lane["SingleStream"],
        lane["Offline"],
        lane["Server"][-1],
    )
    right = accuracy["wrong"] or f"{accuracy['answered']} of {accuracy['samples']}"
    runs = ((single, single["latency_ms"]["90"]), (offline, offline["per_s"]), (last, last["target_per_s"]))
    cells = [
        f"{figure:.1f}" if run["valid"] else f"{figure:.1f}: invalid ({', '.join(run['reasons'])})"
        for run, figure in runs
    ]
    return name, right, *cells


def limits_text(records: Sequence[Record]) -> str:
    """The part of docs/performance.md: where the limit lies."""
    return "\n\n".join("\n".join(_limit_lines(record)) for record in records)


def _limit_lines(record: Record) -> Iterator[str]:
    found, part = record.get("limits"), record["closed"].get("tensor")
    name = part and best_raw(part)
    if not found or not part or not name:
        yield f"**{record['model']}**: {NOT_YET}."
        return
    row = next(row for row in part["raw"] if raw_name(row) == name)
    gemm, speed, copy = found["gemm"], found["gemm"]["gflop_per_s"], found["copy_gb_per_s"]
    raw, ours = middle(row["per_s"]), middle(rates(part)[OURS])
    most = speed["median"] * 1e9 / found["flops"]
    shape = f"{gemm['rows']} x {gemm['columns']} by {gemm['columns']} x {gemm['outputs']}"
    yield f"**{record['model']}** on {record['environment']['cpu']['name']}:"
    yield ""
    yield (
        f"- **Arithmetic.** An image takes {found['flops'] / 1e9:.3g} GFLOP. A product of the shape of the "
        f"model's widest GEMM ({shape}, fp32, ONNX Runtime) reaches {_spread(speed, '.0f')} GFLOP/s. Were "
        f"all of the model such products, {most:.4g} images/s were to be had. The sessions alone at their "
        f"best ({name}) reach {raw:.4g}, {raw / most:.0%} of that; `vitdeploy serve`, {ours:.4g}, "
        f"{ours / most:.0%}."
    )
    weights, run = found["weights_bytes"], 1000 * middle(row["seconds"])
    yield (
        f"- **Memory.** The weights are {weights / 1e6:.4g} MB. Copies move {_spread(copy, '.3g')} GB/s, so "
        f"to read all weights from memory takes {weights / copy['median'] / 1e6:.2g} ms; a run of "
        f"{row['batch']} takes {run:.3g} ms, {row['sessions']} at a time."
    )
    spent, bare = (
        [v.get("server_cpu_ms") for v in part["lanes"].get(lane, ())] for lane in (OURS, GENERATOR)
    )
    if all(value is not None for value in (*spent, *bare)):
        threads = row["sessions"] * row["threads"]
        yield (
            f"- **Protocol.** A request for one image takes {_median(spent, 3)} ms of the processors in our "
            f"server, and {_median(bare, 3)} ms in one that only reads it and answers. The sessions alone "
            f"take {1000 * threads / raw:.4g} ms for an image, with {threads} processors for the whole time."
        )


def _spread(found: Mapping[str, float], form: str) -> str:
    return f"{found['median']:{form}} ({found['q1']:{form}} to {found['q3']:{form}})"


def _median(values: Sequence[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{middle(known):.{digits}f}" if known else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the documents")
    options = parser.parse_args(arguments)
    try:
        records = committed()
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there: make bench-serve", file=sys.stderr)
        return 2
    doubts = [doubt for one in records for doubt in (*broken_claims(one), *unmeasured(one))]
    PART.publish(text(records), doubts, write=options.write)
    LIMITS.publish(limits_text(records), (), write=options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
