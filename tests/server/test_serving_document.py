"""docs/serving.md names every flag and every metric, and none that is not there."""

from __future__ import annotations

import re

import pytest

from tests.helpers.commands import in_this_process
from tests.helpers.paths import ROOT
from vitdeploy.server.statistics import Metrics

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
OWN = PAGE[PAGE.index("## Start it") : PAGE.index("## Triton Inference Server")]
ELSEWHERE = {"--data-binary", "--format", "--force", "--goal", "--image-size", "--output", "--pick"}
"""Flags of curl, of ``export``, ``optimize`` and ``bench``."""


def test_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    there = set(re.findall(r"--[a-z][a-z-]+", in_this_process(capsys, "serve", "--help").out)) - {"--help"}
    named = set(re.findall(r"--[a-z][a-z-]+", OWN)) - ELSEWHERE
    assert named == there - ELSEWHERE - {"--debug"}


def test_every_metric() -> None:
    text = Metrics().text().decode()
    there = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    there = {name for name in there if not name.endswith("_created")}
    suffix = r"(_bucket|_sum|_count)$"
    named = {re.sub(suffix, "", name) for name in re.findall(r"vitdeploy_\w+", OWN)}
    assert named == there
