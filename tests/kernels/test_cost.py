"""The cost model and the tables that are generated from it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_tools.calibration import BAND, PUBLISHED, Published, gemm
from kernel_tools.cost import H200, Terms, Work, floor, predict, terms, work
from kernel_tools.predictions import foretold
from tests.helpers import interpreter  # noqa: F401  (before anything imports a kernel)
from tests.helpers.paths import ROOT
from vitdeploy_kernels.candidates import relative_time, tile_share
from vitdeploy_kernels.config import shipped_table
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.specs import Spec, flops, model_specs, spec_of
from vitdeploy_kernels.vit import VitShape

KERNELS = ROOT / "kernels"
VIT_B = VitShape()
TABLE = shipped_table((9, 0))


def test_flops_of_a_model_are_those_of_its_layers() -> None:
    rows, width, depth = 197, 768, 11
    per_block = 2 * rows * width * (3 * width + width + 8 * width) + 4 * rows**2 * width
    embedding = 2 * rows * width * 768
    # One token: the query, its keys and values absorbed, the projection, the MLP; and the head.
    last = 2 * width * width * (1 + 1 + 1 + 1 + 8) + 4 * 12 * rows * width
    head = 2 * width * 1000
    counted = sum(count * flops(spec) for spec, count in model_specs(VIT_B, torch.float16, 1, TABLE).items())
    assert counted == depth * per_block + embedding + last + head


def test_bytes_are_every_tensor_once() -> None:
    found = dict(launches(VIT_B, torch.float16, 2, TABLE))
    todo = work(found["blocks.0.mlp.fc2"])
    rows, parts = 2 * 197, -(-768 // found["blocks.0.mlp.fc2"].constants["BLOCK_N"])
    x, weight, bias, residual, out = rows * 3072 * 2, 3072 * 768 * 2, 768 * 4, rows * 768 * 2, rows * 768 * 2
    assert todo.size == x + weight + bias + residual + out + rows * parts * 8
    assert todo.flops == 2 * rows * 768 * 3072


@pytest.mark.slow
def test_every_launch_of_a_plan_has_a_spec_and_work() -> None:
    for _, launch in launches(VIT_B, torch.float16, 1, TABLE):
        assert spec_of(launch).kernel == launch.name.removesuffix("_kernel")
        todo = work(launch)
        assert min(todo.flops, todo.size, todo.programs, todo.steps) > 0


def test_the_floor_is_the_larger_term() -> None:
    assert floor(Work(788 * 10**12, 1, 1, 1), H200) == pytest.approx(1.0)
    assert floor(Work(1, 43 * 10**11, 1, 1), H200) == pytest.approx(1.0)


@given(
    st.builds(
        Work,
        flops=st.just(0),
        size=st.integers(1, 10**10),
        programs=st.integers(1, 10**5),
        steps=st.integers(1, 100),
        step_flops=st.integers(0, 10**8),
        step_bytes=st.integers(0, 10**6),
        step_instructions=st.integers(0, 10**5),
        step_specials=st.integers(0, 10**5),
        step_trips=st.integers(0, 2),
        before=st.integers(0, 10**4),
        after=st.integers(0, 10**5),
        trips=st.integers(0, 8),
        ahead=st.integers(1, 6),
        resident=st.integers(1, 16),
    )
)
def test_nothing_is_predicted_to_beat_its_floor(drawn: Work) -> None:
    todo = replace(drawn, flops=drawn.programs * drawn.steps * drawn.step_flops)
    assert predict(todo, H200) > floor(todo, H200) + H200.gap
    assert predict(todo, H200) >= terms(todo, H200, apart=False).seconds


@pytest.mark.parametrize(
    "more",
    [
        {"step_flops": 10**8},
        {"step_bytes": 10**6},
        {"step_instructions": 10**5},
        {"step_specials": 10**5},
        {"step_trips": 9},
        {"before": 10**5},
        {"after": 10**5},
        {"trips": 9},
        {"ahead": 1},
        {"programs": 265},
        {"steps": 99},
        {"size": 10**9},
    ],
    ids=lambda more: next(iter(more)),
)
def test_every_term_counts(more: dict[str, int]) -> None:
    some = Work(1, 10**6, 132, 12, 10**5, 10**4, 10, 10, 0, 100, 100, 0, 4)
    assert predict(replace(some, **more), H200) > 1.02 * predict(some, H200)


def test_a_wave_that_is_not_full_costs_a_whole_one() -> None:
    full, more = (terms(replace(gemm(4096, 4096, 1024), programs=programs), H200) for programs in (132, 133))
    assert more.programs == pytest.approx(2 * full.programs)


def test_programs_that_share_a_multiprocessor_overlap() -> None:
    alone = replace(gemm(16384, 1024, 768), programs=264, after=16384)
    together = replace(alone, resident=2)
    assert terms(together, H200).programs < 0.9 * terms(alone, H200).programs


def test_what_limits_a_launch_is_named() -> None:
    def bound(**numbers: int) -> str:
        return terms(replace(gemm(8192, 8192, 1024), **numbers), H200).bound

    assert bound() == "products"
    assert bound(step_flops=2 * 64 * 64 * 64, step_bytes=16384, ahead=4) == "cache"
    assert bound(step_flops=1, step_bytes=1024, ahead=1) == "latency"
    assert bound(step_flops=1, step_bytes=1, ahead=9) == "steps"
    assert bound(size=10**10) == "memory"
    assert Terms(2e-6, 5e-6, 1e-6, "memory").seconds == pytest.approx(6e-6)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda each: each.what)
def test_the_model_is_close_to_what_others_have_measured(published: Published) -> None:
    assert abs(published.off) <= BAND, f"{published.predict():.3g} {published.unit}"
    assert published.source.startswith("https://")


@pytest.mark.slow
@given(st.integers(1, 60000), st.integers(16, 6000))
def test_large_tiles_are_for_many_rows(rows: int, columns: int) -> None:
    assert tile_share(16, 16) < tile_share(64, 64) < tile_share(128, 256) == 1.0
    small, large = (relative_time(rows, columns, m, n, 132) for m, n in ((64, 64), (128, 256)))
    if rows * columns > 40 * 132 * 128 * 256:
        assert large < small
    if rows <= 64 and columns <= 132 * 64:
        assert small < large


@pytest.mark.slow
def test_the_tables_of_the_readme_are_what_their_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, str(KERNELS / "kernel_tools" / "roofline.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


LOOP_END = 60
"""Instructions of the loop's last step that stand behind its product."""


def test_the_instructions_behind_a_product_are_those_of_the_machine_code() -> None:
    """Of large tiles, whose ends count, in every table that tells them."""
    found = dict(launches(VIT_B, torch.float16, 64, TABLE))
    ended = {
        site: launch
        for site, launch in found.items()
        if launch.constants.get("BLOCK_M") == 128 and launch.constants.get("BLOCK_K")
    }
    assert len(ended) >= 5
    for path in (KERNELS / "resources").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                row for row in csv.DictReader(file) if (row["model"], row["arch"]) == ("ViT-B/16", "sm_90")
            ]
        compared = [row for row in rows if row["site"] in ended]
        assert len(compared) >= 5
        for row in compared:
            launch = ended[row["site"]]
            counted = int(row["after"]) - LOOP_END
            assert work(launch).after / launch.warps == pytest.approx(counted, rel=0.2), (path.name, row)


def test_what_was_predicted_says_that_it_is_a_prediction() -> None:
    document = json.loads((KERNELS / "predictions.json").read_text(encoding="utf-8"))
    assert (document["kind"], document["gpu"], document["model"]) == ("prediction", H200.name, "B/16")
    assert [each["batch"] for each in document["models"]] == [1, 8, 64, 256]
    for each in document["models"]:
        rows = [row for row in document["kernels"] if row["batch"] == each["batch"]]
        assert sum(row["launches"] for row in rows) == 64
        total = sum(row["launches"] * row["predicted_us"] for row in rows)
        assert total / 1e3 == pytest.approx(each["predicted_ms"], rel=1e-2)
        assert all(row["floor_us"] < row["predicted_us"] for row in rows)
    first = document["kernels"][0]
    spec = Spec(first["kernel"], tuple(first["shape"]))
    assert foretold(H200.name, spec) == first["predicted_us"]
    assert foretold("NVIDIA L4", spec) is None
