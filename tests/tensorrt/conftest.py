"""Machines that are not here, with a cache folder of the test's own."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.fakes.machines import L4, Machine, MakeJob, MakeMachine, go_to, make_job
from vitdeploy.machine.gpus import Gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeMachine:
    """Go to a machine: ``machine("11.4.0.106")``, ``machine("10.8.0.43", None)`` for one without a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go(version: str, gpu: Gpu | None = L4) -> Machine:
        return go_to(monkeypatch, version, gpu)

    return go


@pytest.fixture
def job(tmp_path: Path) -> MakeJob:
    """``job(model, precision="fp16", profiles=..., **settings)``: see :func:`fake_machines.make_job`."""
    return functools.partial(make_job, tmp_path)
