"""``vitdeploy doctor``."""

from __future__ import annotations

import pytest

from tests.helpers.commands import Run
from vitdeploy.backends.base import Availability, backend_names
from vitdeploy.backends.onnxruntime import OnnxRuntime
from vitdeploy.machine.identity import Cpu


def test_text(run: Run) -> None:
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    assert all(name in result.out for name in (*backend_names(), "numpy", "CPUExecutionProvider"))


@pytest.mark.parametrize("flags, noted", [(("avx2",), True), (("avx2", "avx512_vnni"), False)])
def test_a_processor_without_int8(
    run: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], noted: bool
) -> None:
    monkeypatch.setattr("vitdeploy.cli.diagnosis.find_cpu", lambda: Cpu("old", flags, 2, None))
    assert ("old has no VNNI: int8 gains little on it" in run("doctor").out) == noted
    assert (run("doctor", "--json").document["int8"] is not None) == noted


def test_json(run: Run) -> None:
    document = run("doctor", "--json").document
    assert document["ok"] is True
    assert {backend["name"] for backend in document["backends"]} == set(backend_names())


def test_a_missing_backend_says_what_would_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "availability", lambda _: Availability(False, "it is gone", "get it"))
    assert "it is gone; get it" in run("doctor").out


def test_no_backend_at_all_exits_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "availability", lambda _: Availability(False, "gone", None))
    monkeypatch.setattr("vitdeploy.cli.diagnosis.all_backends", lambda: (OnnxRuntime(),))
    result = run("doctor", "--json")
    assert result.code == 3
    assert result.document["ok"] is False
