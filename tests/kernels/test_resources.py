"""The committed tables of registers, spills and instructions are what the kernels compile to today."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version

import pytest

from kernel_tools import resources
from kernel_tools.resources import (
    Row,
    all_cases,
    broken_rules,
    differences,
    format_rows,
    model_cases,
    parse_rows,
    table_path,
)
from kernel_tools.sass import around, in_order
from tests.helpers import oldest_triton
from tests.helpers.evidence import Evidence, digest, table_sources
from tests.helpers.kernel_launches import attention_launch, layernorm_linear_launch
from tests.helpers.paths import ROOT
from vitdeploy_kernels.aot import ARCHITECTURES

FOLDER = ROOT / "kernels" / "resources"
PINNED = version("triton")
TABLES = {
    triton: parse_rows(table_path(FOLDER, triton).read_text(encoding="utf-8"))
    for triton in (oldest_triton.VERSION, PINNED)
}

ROW = Row(
    model="ViT-B/16", arch="sm_90", site="blocks.0.mlp.fc1", calls=11, kernel="layernorm_linear",
    tile="m128 n256 k64", warps=8, stages=3, registers=168, stack=0, shared=147456, spill_stores=0,
    spill_loads=0, hgmma=8, utcmma=0, hmma=0, ldgsts=40, ldg=9, stg=16, mufu=128, instructions=4000,
    before=160, early_loads=0, after=1900, serialised=0, programs=1, bytes=10**8, flops=10**10, reason="",
)  # fmt: skip


def broken(**changes: object) -> list[str]:
    return broken_rules([dataclasses.replace(ROW, **changes)])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("triton", TABLES)
def test_the_table_is_what_the_kernels_compile_to(
    triton: str, arch: str, request: pytest.FixtureRequest
) -> None:
    evidence = Evidence(f"resources-{triton}-{arch}", request.config.getoption("evidence"))
    today = digest([*table_sources(), table_path(FOLDER, triton)])
    evidence.skip_if_recorded(today)
    command = ["-m", "kernel_tools.resources", "--check", FOLDER, "--arch", arch]
    command += ["--processes", "1"]  # the other architectures are checked beside this one
    if triton == oldest_triton.VERSION:
        done = oldest_triton.run(command)
    else:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "only the rules are checked" not in done.stdout
    evidence.passed(today)


@pytest.mark.parametrize("triton", TABLES)
def test_the_committed_tables_keep_the_rules(triton: str) -> None:
    rows = TABLES[triton]
    assert broken_rules(rows) == []
    assert {row.arch for row in rows} == ARCHITECTURES.keys()
    assert {"ViT-B/16", "ViT-L/16", "ViT-H/14"} <= {row.model for row in rows}


def test_the_committed_tables_have_todays_launches() -> None:
    cases = [case for arch in ARCHITECTURES for case in all_cases(arch)]
    today = {(*case.place, case.calls, resources.tile(case.launch), case.launch.stages) for case in cases}
    for triton, rows in TABLES.items():
        there = {(*row.place, row.calls, row.tile, row.stages) for row in rows}
        assert there == today, (
            f"Triton {triton} has to write its table anew: "
            "python -m kernel_tools.resources --write kernels/resources"
        )


REGISTERS: Mapping[str, Mapping[str, int]] = {
    "3.6.0": {"embedding": 212, "attn.qkv": 233, "attn.proj": 219, "mlp.fc1": 236, "mlp.fc2": 219},
    "3.9.0": {"embedding": 222, "attn.qkv": 238, "attn.proj": 213, "mlp.fc1": 255, "mlp.fc2": 213},
}
"""At most so many for the large tiles of ViT-B/16 on sm_90, whose GPUs the kernels are tuned for first."""


@pytest.mark.parametrize("triton", TABLES)
def test_large_tiles_end_soon(triton: str) -> None:
    """On sm_90; the tensor cores wait for all that stands behind the last product."""
    large = [row for row in TABLES[triton] if row.arch == "sm_90" and row.tile == "m128 n256 k64"]
    assert {"layernorm_linear", "linear_residual", "patch_embed"} <= {row.kernel for row in large}
    assert not [str(row) for row in large if row.stack or row.spill_stores or row.spill_loads]
    assert not [str(row) for row in large if row.kernel == "linear_residual" and row.after > 900]
    assert not [str(row) for row in large if row.kernel == "layernorm_linear" and row.after > 2000], "GELU"
    for row in large:
        site = row.site.removeprefix("blocks.0.")
        if row.model == "ViT-B/16" and site in REGISTERS[triton]:
            assert row.registers <= REGISTERS[triton][site], str(row)


@pytest.mark.parametrize("triton", TABLES)
def test_no_statistics_are_read_before_the_first_copy(triton: str) -> None:
    rows = [row for row in TABLES[triton] if row.kernel == "layernorm_linear"]
    assert rows
    assert not [str(row) for row in rows if row.early_loads]


def test_before_and_after_are_those_of_the_listing() -> None:
    lines = [
        "LDG.E R0, [R2]",
        "@P0 LDGSTS.E.128 [R4], [R6]",
        "HGMMA.64x8x16.F32 R8",
        "FADD R8, R8, R9",
        "NOP",
        "EXIT",
    ]
    listing = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)
    )
    assert in_order(listing) == ["LDG", "LDGSTS", "HGMMA", "FADD", "EXIT"]
    assert around(in_order(listing)) == (["LDG"], ["FADD", "EXIT"])
    assert around(["MOV", "EXIT"]) == ([], [])


def test_a_table_survives_csv() -> None:
    assert parse_rows(format_rows([ROW, ROW])) == [ROW, ROW]
    with pytest.raises(ValueError, match="the columns must be model, arch, site"):
        parse_rows("model,arch\n")


@pytest.mark.parametrize("field", ["stack", "spill_stores", "spill_loads"])
def test_spills_need_a_reason(field: str) -> None:
    (line,) = broken(**{field: 8})
    assert line.startswith("layernorm_linear at blocks.0.mlp.fc1 of ViT-B/16 on sm_90: spills registers")
    assert broken(**{field: 8}, reason="the epilogue needs them") == []


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, None),
        ({"hmma": 9}, None),
        ({"hgmma": 0, "hmma": 9}, "has no HGMMA"),
        ({"hgmma": 0, "hmma": 9, "tile": "m16 n64 k128"}, None),
        ({"arch": "sm_100"}, "has no UTCMMA"),
        ({"arch": "sm_100", "utcmma": 9}, None),
        ({"arch": "sm_80"}, "has no HMMA"),
        ({"arch": "sm_120", "hmma": 9}, None),
        ({"flops": 0, "hgmma": 0}, None),
        ({"programs": 0}, "not one program fits"),
        ({"serialised": 3}, "products wait for each other"),
    ],
)
def test_rules(changes: dict[str, object], wanted: str | None) -> None:
    lines = broken(**changes)
    assert lines == [] if wanted is None else wanted in lines[0]


def test_differences_are_named() -> None:
    assert differences([ROW], [ROW]) == []
    more = dataclasses.replace(ROW, registers=170)
    (line,) = differences([ROW], [more])
    assert line.endswith("fc1 of ViT-B/16 on sm_90: registers is 170, and the table says 168")
    other = dataclasses.replace(ROW, site="head")
    assert [line.rpartition(": ")[2] for line in differences([ROW], [other])] == [
        "is in the table and is no launch any more",
        "is not in the table",
    ]


def test_sites_with_one_binary_are_one_case() -> None:
    sites = [
        ("blocks.0.mlp.fc1", layernorm_linear_launch()),
        ("blocks.0.attn", attention_launch()),
        ("blocks.1.mlp.fc1", layernorm_linear_launch(rows=788)),
    ]
    cases = model_cases("ViT", "sm_90", sites)
    assert [(case.site, case.calls) for case in cases] == [("blocks.0.mlp.fc1", 2), ("blocks.0.attn", 1)]


def test_what_cannot_be_compiled_is_a_line() -> None:
    launch = layernorm_linear_launch()
    bad = dataclasses.replace(launch, constants={**launch.constants, "BLOCK_K": 48})
    cases = [resources.Case("ViT", "sm_90", site, 1, it) for site, it in (("good", launch), ("bad", bad))]
    rows, failed = resources.compute(cases)
    assert [row.site for row in rows] == ["good"]
    (row,) = rows
    assert (row.tile, row.warps, row.flops) == ("m64 n64 k32", 4, 2 * 394 * 128 * 256)
    assert row.hgmma > row.hmma == row.utcmma == 0
    assert failed[0].startswith("bad of ViT on sm_90: layernorm_linear_kernel for sm_90: ")
