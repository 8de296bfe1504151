"""The cost model and the tables that are generated from it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import interpreter  # noqa: F401  (before anything imports a kernel)
from tests.helpers.paths import ROOT
from vitdeploy_kernels.config import shipped_table
from vitdeploy_kernels.cost import GAP, H200, Work, floor, predict, relative_time, tile_share, work
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.specs import flops, model_specs, spec_of
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


@pytest.mark.slow
@given(
    flops=st.integers(0, 10**13),
    size=st.integers(1, 10**10),
    programs=st.integers(1, 10**5),
    steps=st.integers(1, 100),
)
def test_nothing_is_predicted_to_beat_its_floor(flops: int, size: int, programs: int, steps: int) -> None:
    todo = Work(flops, size, programs, steps)
    assert predict(todo, H200) > floor(todo, H200) + GAP / 2


def test_a_wave_that_is_not_full_costs_a_whole_one() -> None:
    full, more = (Work(10**12, 1, programs, 1) for programs in (132, 133))
    ratio = (predict(more, H200) - GAP) / (predict(full, H200) - GAP)
    assert ratio == pytest.approx(2 * 132 / 133)


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
        [sys.executable, str(KERNELS / "roofline.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
