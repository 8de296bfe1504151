"""Names with the number of a block, or of a stage and of a block in it: read, counted, reported."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import toy
from tests.helpers.checkpoints import edit_weights, refusal
from vitdeploy.checkpoint.families.base import (
    Layout,
    Source,
    _grouped,
    count_blocks,
    count_stages,
    filled,
    find_tensor,
    template_of,
)
from vitdeploy.checkpoint.opening import Checkpoint, open_model, save_folder

WORDS = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda word: not word.endswith("_"))
LEAVES = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
NUMBERS = st.integers(0, 120)
STAGES: Layout = {
    "layers.{i}.blocks.{j}.norm.weight": Source("encoder.layers.{i}.blocks.{j}.layernorm_before.weight"),
    "layers.{i}.downsample.weight": Source("encoder.layers.{i}.downsample.reduction.weight"),
    "head.weight": Source("classifier.weight"),
}


@pytest.mark.slow
@given(first=WORDS, second=WORDS, leaf=LEAVES, numbers=st.tuples(NUMBERS, NUMBERS))
def test_numbers_leave_a_name_and_return_to_it(
    first: str, second: str, leaf: str, numbers: tuple[int, int]
) -> None:
    i, j = map(str, numbers)
    for name, template, texts in (
        (leaf, leaf, ()),
        (f"{first}.{i}.{leaf}", f"{first}.{{i}}.{leaf}", (i,)),
        (f"{first}.{i}.{second}.{j}.{leaf}", f"{first}.{{i}}.{second}.{{j}}.{leaf}", (i, j)),
    ):
        assert template_of(name) == (template, texts)
        assert filled(template, texts) == name


@pytest.mark.slow
@given(
    depths=st.lists(st.integers(1, 30), max_size=5),
    noise=st.lists(LEAVES, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_blocks_are_counted_in_every_stage(depths: list[int], noise: list[str], seed: int) -> None:
    blocks = [
        f"encoder.layers.{i}.blocks.{j}.layernorm_before.weight"
        for i, depth in enumerate(depths)
        for j in range(depth)
    ]
    others = ["encoder.layers.9.downsample.reduction.weight", "encoder.layers.8.blocks.7.elsewhere", *noise]
    names = [*blocks, *others]
    random.Random(seed).shuffle(names)
    assert count_stages(STAGES, names) == tuple(depths)


@pytest.mark.slow
@given(depth=st.integers(0, 200), noise=st.lists(LEAVES, max_size=5), seed=st.integers(0, 2**16))
def test_blocks_are_counted_without_stages(depth: int, noise: list[str], seed: int) -> None:
    layout: Layout = {"blocks.{i}.norm.weight": Source("encoder.layer.{i}.norm"), "head.weight": Source("h")}
    names = [*(f"encoder.layer.{i}.norm" for i in range(depth)), "encoder.layer.999.other", *noise]
    random.Random(seed).shuffle(names)
    assert count_blocks(layout, names) == depth
    assert count_stages(layout, names) == ()


@pytest.mark.slow
@given(i=NUMBERS, j=NUMBERS)
def test_a_tensor_is_found_by_both_numbers(i: int, j: int) -> None:
    name = f"encoder.layers.{i}.blocks.{j}.layernorm_before.weight"
    state = {name: torch.tensor([i, j]), f"encoder.layers.{j + 1}.blocks.{i}.other": torch.zeros(1)}
    assert find_tensor(STAGES, state, f"layers.{i}.blocks.{j}.norm.weight") is state[name]
    assert find_tensor(STAGES, state, f"layers.{i}.blocks.{j + 1}.norm.weight") is None
    assert find_tensor(STAGES, state, f"blocks.{i}.norm.weight") is None


def expanded(name: str) -> list[str]:
    """Every name that ``a.{0,1}.b`` stands for."""
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", name))]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


NAMES = st.one_of(
    LEAVES,
    st.builds("layers.{}.blocks.{}.{}".format, st.integers(0, 4), st.integers(0, 4), WORDS),
    st.builds("blocks.{}.{}".format, st.integers(0, 12), WORDS),
    st.builds("encoderblock_{}/{}".format, st.integers(0, 12), WORDS),
)


@pytest.mark.slow
@given(names=st.lists(NAMES, unique=True, max_size=30))
def test_a_report_names_each_tensor_once(names: list[str]) -> None:
    grouped = [name for group in _grouped(names) for name in expanded(group)]
    assert sorted(grouped) == sorted(names)


@pytest.mark.slow
@given(stages=st.integers(1, 5), blocks=st.integers(1, 30))
def test_a_report_joins_all_blocks_of_all_stages(stages: int, blocks: int) -> None:
    names = [f"layers.{i}.blocks.{j}.norm.weight" for i in range(stages) for j in range(blocks)]
    assert len(_grouped(names)) == 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy.register(monkeypatch)
    save_folder(toy.toy_checkpoint(), tmp_path)
    return tmp_path


def test_names_in_stages_are_taken_over(folder: Path) -> None:
    opened, saved = open_model(str(folder)), toy.toy_checkpoint()
    assert isinstance(opened, Checkpoint)
    assert opened.config == toy.CONFIG
    assert opened.state.keys() == saved.state.keys()
    assert all(torch.equal(opened.state[name], tensor) for name, tensor in saved.state.items())


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({f"{name}s": state.pop(name)})


def test_names_in_stages_that_do_not_fit_are_listed_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"):
        edit_weights(folder, without(f"{name}.mix.bias"))
    edit_weights(folder, lambda state: state.update({"layers.1.blocks.1.norm.bias": torch.ones(3)}))
    monkeypatch.chdir(folder)
    message = refusal("./").message
    assert "3 missing (layers.0.blocks.0.mix.bias, layers.1.blocks.{0,1}.mix.bias)" in message
    assert "3 unexpected (layers.0.blocks.0.mix.biass, layers.1.blocks.{0,1}.mix.biass)" in message
    assert "1 of the wrong shape (layers.1.blocks.1.norm.bias is 3, must be 8)" in message
    assert "did you mean 'layers.0.blocks.0.mix.biass'?" in message


def test_a_block_too_many_is_unexpected(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"layers.1.blocks.2.mix.bias": torch.ones(6)}))
    assert "1 unexpected (layers.1.blocks.2.mix.bias)" in refusal(str(folder)).message
