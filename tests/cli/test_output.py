"""Tables on terminals of several widths: nothing is cut off, no number is broken, no line is too long."""

from __future__ import annotations

import sys

import pytest

from vitdeploy.cli import output

COLUMNS = ("file", "precision", ">relative error", ">size", "fusion")
ROWS = (
    ("engines/sm_89-rtx/model.fp16.plan", "fp16", "8.5e-07", "177 MB", "12 of 12 attention blocks are fused"),
    ("model.onnx", "fp32", "1.2e-07", "343 MB", ""),
)


def printed(
    width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(COLUMNS, ROWS)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [None, 200])
def test_where_there_is_room_a_row_is_a_line(
    width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(width, capsys, monkeypatch)
    assert len(lines) == 4
    assert lines[2].split() == " ".join(ROWS[0]).split()


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 90, 100])
def test_a_narrow_terminal_loses_nothing(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(width, capsys, monkeypatch)
    if width >= 80:
        assert max(map(len, lines)) <= width
    text = " ".join(lines)
    assert "…" not in text
    for row in ROWS:
        assert all(cell in text for cell in row[:4])  # numbers and names whole
    assert {*" ".join(ROWS[0]).split()} <= {*text.split()}


def test_a_struck_row_is_struck_in_a_list_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(("cell", ">ms"), [("onnxruntime", "1.0"), ("openvino", "2.0")], ["strike red", ""])
    assert capsys.readouterr().out == "\x1b[31m\x1b[9monnxruntime\x1b[0m\n  ms 1.0\nopenvino\n  ms 2.0\n"


def test_too_narrow_for_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(60, capsys, monkeypatch) == [
        "engines/sm_89-rtx/model.fp16.plan",
        "  precision fp16",
        "  relative error 8.5e-07",
        "  size 177 MB",
        "  fusion 12 of 12 attention blocks are fused",
        "model.onnx",
        "  precision fp32",
        "  relative error 1.2e-07",
        "  size 343 MB",
    ]
