"""The example workflow is YAML, and its commands have the flags that it uses."""

from __future__ import annotations

import shlex

import pytest
import yaml

from tests.helpers.commands import in_a_process
from tests.helpers.paths import ROOT

WORKFLOW = ROOT / "examples/benchmark-workflow.yml"


def commands() -> list[list[str]]:
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compare"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("vitdeploy ")]


def test_it_measures_twice_and_compares() -> None:
    assert [words[1] for words in commands()] == ["export", "bench"] * 2
    assert "--compare" in commands()[3]
    assert commands()[1][3:9] == commands()[3][3:9], "both sides are measured alike"


@pytest.mark.slow
@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1])
def test_its_flags_exist(words: list[str]) -> None:
    known = in_a_process(words[1], "--help").out.split()
    for word in words[2:]:
        assert not word.startswith("-") or word in known or f"{word}," in known, word
