"""The committed tables of what every kernel costs on every architecture, by static evidence: one per Triton.

One row for each distinct binary of a forward pass (``calls`` counts its launches) of ViT-B/16, L/16 and
H/14 in float16, with the shipped configurations; add_layernorm as the cuBLASLt route launches it, uint8
pixels, layernorm_attention at the width of ViT-S and in the first windows of Swin-T, and what CLIP's first
norm, BEiT's attention and Swin's windows add.
``bytes`` and ``flops`` are of one launch.

    PYTHONPATH=kernels python -m kernel_tools.resources --write kernels/resources
    PYTHONPATH=kernels python -m kernel_tools.resources --check kernels/resources

The folder has a table for each version of Triton that the tests run, ``triton-3.6.0.csv``; the version
that is installed writes or checks its own. The check compiles everything again, and every number must be the
same. Without a table of this version only the rules are checked: no spills, the tensor cores' own
instructions, none of which waits for the one before it, and at least one program fits.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kernel_tools.sass import Resources, resources
from vitdeploy_kernels.aot import ARCHITECTURES, AotError, Compiled, capability_of, launch_key
from vitdeploy_kernels.compile_pool import Key, Progress, compile_each
from vitdeploy_kernels.config import Route, Table, shipped_table
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.plans import Shape, launches
from vitdeploy_kernels.specs import flops, size, spec_of
from vitdeploy_kernels.swin import SwinShape
from vitdeploy_kernels.vit import VitShape

BATCH = 64
MODELS: Mapping[str, VitShape] = {
    "ViT-B/16": VitShape(),
    "ViT-L/16": VitShape(width=1024, depth=24, heads=16, mlp_width=4096),
    "ViT-H/14": VitShape(width=1280, depth=32, heads=16, mlp_width=5120, patch=14),
}
NARROW = ("ViT-S/16", VitShape(width=384, heads=6, mlp_width=1536))
"""Whose attention is one kernel, LayerNorm and QKV included."""
SWIN = SwinShape()
FIRST = replace(SWIN, depths=(2,), heads=(3,), windows=((7, 7),), shifted=(True,), mlp_widths=(384,))
"""Swin-T's first stage, whose attention can be one kernel as well."""
OTHERS: Mapping[str, tuple[Shape, re.Pattern[str]]] = {
    "CLIP-B/32": (VitShape(patch=32, pre_norm=True, depth=1), re.compile(r"embedding\.pre_norm.*")),
    "BEiT-B/16": (VitShape(score_bias=True, queries=None, depth=1), re.compile(r"blocks\.\d+\.attn")),
    "Swin-T": (SWIN, re.compile(r"blocks\.\d+\.attn")),
}
"""Models with binaries that the others have not, and at which sites."""

REASONS: Mapping[tuple[str, str], str] = {
    ("absorbed_attention", "sm_80"): "two registers, stored before the loop and read after it",
    (
        "absorbed_attention",
        "sm_89",
    ): "two registers kept around the loop, two more read once in each step of it",
    ("absorbed_attention", "sm_90"): "four registers, stored before the loop and read after it",
    ("head_linear", "sm_89"): "one register, stored before the loop and read after it",
    ("head_linear", "sm_90"): "one register, stored before the loop and read after it",
    (
        "attention",
        "sm_100",
    ): "eight registers, stored once and read once or twice: a window is one tile, and there is no loop",
    ("layernorm_attention", "sm_90"): "stored once and read once, outside of the loops",
    ("layernorm_attention", "sm_120"): "stored once and read once, outside of the loops",
}
"""Why a kernel may spill registers on an architecture; read from its SASS."""

NATIVE = {"sm_90": "hgmma", "sm_100": "utcmma"}
"""The tensor cores' own instructions, by column; of all other architectures it is HMMA."""
NATIVE_ROWS = 64
"""Rows that a tile must have for them; a kernel whose last tile is smaller has HMMA for that as well."""


@dataclass(frozen=True)
class Row:
    """One binary; see :class:`kernel_tools.sass.Resources` for what the columns count."""

    model: str
    arch: str
    site: str
    calls: int
    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    spill_stores: int
    spill_loads: int
    hgmma: int
    utcmma: int
    hmma: int
    ldgsts: int
    ldg: int
    stg: int
    mufu: int
    instructions: int
    before: int
    early_loads: int
    after: int
    serialised: int
    programs: int
    bytes: int
    flops: int
    reason: str

    @property
    def place(self) -> tuple[str, str, str]:
        """What a row is found by."""
        return self.model, self.arch, self.site

    def __str__(self) -> str:
        return f"{self.kernel} at {self.site} of {self.model} on {self.arch}"


@dataclass(frozen=True)
class Case:
    """A binary that is wanted."""

    model: str
    arch: str
    site: str
    calls: int
    launch: Launch

    @property
    def key(self) -> Key:
        return self.arch, launch_key(self.launch)

    @property
    def place(self) -> tuple[str, str, str]:
        return self.model, self.arch, self.site


def model_cases(model: str, arch: str, sites: Sequence[tuple[str, Launch]]) -> list[Case]:
    """The distinct binaries of launches, each at its first site."""
    first: dict[str, tuple[str, Launch]] = {}
    calls: dict[str, int] = {}
    for site, launch in sites:
        key = launch_key(launch)
        first.setdefault(key, (site, launch))
        calls[key] = calls.get(key, 0) + 1
    return [Case(model, arch, site, calls[key], launch) for key, (site, launch) in first.items()]


def all_cases(arch: str) -> list[Case]:
    """Everything the table has for an architecture."""
    table, half = shipped_table(capability_of(arch)), torch.float16
    found = []
    for model, shape in MODELS.items():
        sites = launches(shape, half, BATCH, table)
        apart = launches(shape, half, BATCH, routed(table, "cublas"))
        sites += [(site, launch) for site, launch in apart if launch.name == "add_layernorm_kernel"]
        pixels = launches(replace(shape, uint8=True, depth=1), half, BATCH, table)
        sites += [(f"{site}.uint8", launch) for site, launch in pixels if site == "embedding"]
        found += model_cases(model, arch, sites)
    for model, narrow, suffix in ((*NARROW, ""), ("Swin-T", FIRST, ".whole")):
        together = launches(narrow, half, BATCH, routed(table, "fused"))
        whole = [(f"{site}{suffix}", it) for site, it in together if it.name == "layernorm_attention_kernel"]
        found += model_cases(model, arch, whole)
    for model, (other, where) in OTHERS.items():
        sites = launches(other, half, BATCH, table)
        found += model_cases(model, arch, [(site, it) for site, it in sites if where.fullmatch(site)])
    return found


def routed(table: Table, route: Route) -> Table:
    """The table with this route for all kernels."""
    kernels = {
        name: tuple(replace(entry, route=route) for entry in entries)
        for name, entries in table.kernels.items()
    }
    return replace(table, kernels=kernels)


def compute(
    cases: Iterable[Case], processes: int = 2, progress: Progress | None = None
) -> tuple[list[Row], list[str]]:
    """Compile the cases and read what they cost; and a line for each that cannot be compiled."""
    wanted = [(case, case.key) for case in cases]
    jobs = [(case.arch, case.launch) for case, _ in wanted]
    rows, lines = {}, {}
    for key, result in compile_each(jobs, processes=processes, progress=progress):
        for case in (case for case, of in wanted if of == key):
            if isinstance(result, AotError):
                lines[case.place] = f"{case.site} of {case.model} on {case.arch}: {result}"
            else:
                rows[case.place] = row_of(case, result, resources(result))
    order = [case.place for case, _ in wanted]
    return [rows[place] for place in order if place in rows], [
        lines[place] for place in order if place in lines
    ]


def row_of(case: Case, compiled: Compiled, used: Resources) -> Row:
    launch, kernel = case.launch, case.launch.name.removesuffix("_kernel")
    mix = used.instructions
    return Row(
        model=case.model,
        arch=case.arch,
        site=case.site,
        calls=case.calls,
        kernel=kernel,
        tile=tile(launch),
        warps=compiled.warps,
        stages=launch.stages,
        registers=used.registers,
        stack=used.stack,
        shared=used.shared,
        spill_stores=used.spill_stores,
        spill_loads=used.spill_loads,
        hgmma=mix["HGMMA"],
        utcmma=mix["UTCMMA"],
        hmma=mix["HMMA"],
        ldgsts=mix["LDGSTS"],
        ldg=mix["LDG"],
        stg=mix["STG"],
        mufu=mix["MUFU"],
        instructions=used.total,
        before=used.before,
        early_loads=used.early_loads,
        after=used.after,
        serialised=used.serialised,
        programs=used.programs,
        bytes=size(launch),
        flops=flops(spec_of(launch)),
        reason=REASONS.get((kernel, case.arch), "") if used.stack else "",
    )


def tile(launch: Launch) -> str:
    """The tile sizes among a launch's constants: ``m128 n128 k64``."""
    sizes = {name: value for name, value in launch.constants.items() if name.partition("_")[0] == "BLOCK"}
    return " ".join(f"{name.partition('_')[2].lower() or 'm'}{value}" for name, value in sizes.items())


def broken_rules(rows: Iterable[Row]) -> list[str]:
    """What no kernel may do, whatever compiled it; a line for each row that does."""
    lines = []
    for row in rows:
        if (row.stack or row.spill_stores or row.spill_loads) and not row.reason:
            lines.append(
                f"{row}: spills registers ({row.stack} bytes of stack, {row.spill_stores} stores, "
                f"{row.spill_loads} loads) and no reason is given"
            )
        if row.serialised:
            lines.append(f"{row}: products wait for each other, {row.serialised} times for nothing")
        if not row.programs:
            lines.append(f"{row}: not one program fits on a multiprocessor")
        native = NATIVE.get(row.arch, "hmma")
        if row.flops and _rows(row) >= NATIVE_ROWS and not getattr(row, native):
            lines.append(f"{row}: has no {native.upper()}")
    return lines


def _rows(row: Row) -> int:
    """Rows of the tile."""
    return next((int(part[1:]) for part in row.tile.split() if part[0] == "m"), 0)


def differences(committed: Sequence[Row], computed: Sequence[Row]) -> list[str]:
    """How a table differs from what was computed by the same version of Triton."""
    there, here = ({row.place: row for row in rows} for rows in (committed, computed))
    lines = [
        f"{there[place]}: is in the table and is no launch any more" for place in there if place not in here
    ]
    lines += [f"{here[place]}: is not in the table" for place in here if place not in there]
    for place, row in here.items():
        old = there.get(place, row)
        for field in fields(Row):
            before, now = getattr(old, field.name), getattr(row, field.name)
            if before != now:
                lines.append(f"{row}: {field.name} is {now}, and the table says {before}")
    return lines


def table_path(folder: Path, triton: str) -> Path:
    """Where the table of a version of Triton is."""
    return folder / f"triton-{triton}.csv"


def format_rows(rows: Iterable[Row]) -> str:
    """As CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(map(astuple, rows))
    return text.getvalue()


def parse_rows(text: str) -> list[Row]:
    """From CSV.

    Raises:
        ValueError: it is not such a table.
    """
    reader = csv.DictReader(io.StringIO(text))
    names = [field.name for field in fields(Row)]
    if reader.fieldnames != names:
        raise ValueError(f"the columns must be {', '.join(names)}")
    number = {field.name for field in fields(Row) if field.type == "int"}

    def parsed(row: Mapping[str, str]) -> dict[str, Any]:
        return {name: int(row[name]) if name in number else row[name] for name in names}

    return [Row(**parsed(row)) for row in reader]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the table; 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m kernel_tools.resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FOLDER")
    what.add_argument("--check", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--arch",
        action="append",
        choices=[*ARCHITECTURES],
        help="only these, and the others' rows stay as they are",
    )
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    architectures = given.arch or [*ARCHITECTURES]
    cases = [case for arch in architectures for case in all_cases(arch)]
    rows, failed = compute(cases, given.processes, _print_progress)
    lines = failed + broken_rules(rows)
    path = table_path(given.write or given.check, version("triton"))
    committed = parse_rows(path.read_text(encoding="utf-8")) if path.is_file() else []
    if given.write:
        others = [row for row in committed if row.arch not in architectures]
        order = [*ARCHITECTURES]
        table = sorted([*others, *rows], key=lambda row: order.index(row.arch))
        path.write_text(format_rows(table), encoding="utf-8")
    elif committed:
        lines += differences([row for row in committed if row.arch in architectures], rows)
    else:
        print(f"there is no {path.name}: only the rules are checked")
    print("\n".join(lines) if lines else f"{len(rows)} rows: no rule is broken")
    return int(bool(lines))


def _print_progress(done: int, total: int, what: str) -> None:
    end = "\n" if done == total else ""
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {what}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
