"""The committed table of registers, spills and instructions is what the kernels compile to today."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

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
)
from tests.helpers.evidence import Evidence, digest, table_sources
from tests.helpers.kernel_launches import attention_launch, layernorm_linear_launch
from tests.helpers.paths import ROOT
from vitdeploy_kernels.aot import ARCHITECTURES

TABLE = ROOT / "kernels" / "resources.csv"

ROW = Row(
    model="ViT-B/16", arch="sm_90", site="blocks.0.mlp.fc1", calls=11, kernel="layernorm_linear",
    tile="m128 n256 k64", warps=8, stages=3, registers=168, stack=0, shared=147456, spill_stores=0,
    spill_loads=0, hgmma=8, utcmma=0, hmma=0, ldgsts=40, ldg=9, stg=16, mufu=128, instructions=4000,
    programs=1, bytes=10**8, flops=10**10, triton="3.9.0", reason="",
)  # fmt: skip


def broken(**changes: object) -> list[str]:
    return broken_rules([dataclasses.replace(ROW, **changes)])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_what_the_kernels_compile_to(arch: str, request: pytest.FixtureRequest) -> None:
    evidence = Evidence(f"resources-{arch}", request.config.getoption("evidence"))
    today = digest([*table_sources(), TABLE])
    evidence.skip_if_recorded(today)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernel_tools.resources", "--check", TABLE, "--arch", arch]
    command += ["--processes", "1"]  # the other architectures are checked beside this one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if "only the rules are checked" in done.stdout:
        pytest.skip(done.stdout.splitlines()[0])
    evidence.passed(today)


def test_the_committed_table_keeps_the_rules() -> None:
    rows = parse_rows(TABLE.read_text(encoding="utf-8"))
    assert broken_rules(rows) == []
    assert {row.arch for row in rows} == ARCHITECTURES.keys()
    assert {"ViT-B/16", "ViT-L/16", "ViT-H/14"} <= {row.model for row in rows}


def test_the_committed_table_has_todays_launches() -> None:
    rows = {
        (*row.place, row.calls, row.tile, row.stages) for row in parse_rows(TABLE.read_text(encoding="utf-8"))
    }
    cases = [case for arch in ARCHITECTURES for case in all_cases(arch)]
    assert rows == {
        (*case.place, case.calls, resources.tile(case.launch), case.launch.stages) for case in cases
    }, "write the table anew: python -m kernel_tools.resources --write kernels/resources.csv"


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


def test_another_triton_may_need_other_registers() -> None:
    newer = dataclasses.replace(ROW, registers=170, instructions=1, triton="3.6.0")
    assert differences([ROW], [newer]) == []
    assert differences([ROW], [dataclasses.replace(newer, site="head")]) != []


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
