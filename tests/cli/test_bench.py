"""``vitdeploy bench``: the table, the results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Run

from vitdeploy.bundle import Bundle

QUICK = ("--backend", "onnxruntime", "--budget", "0.1s")


def test_table_and_results_file(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    result = run("bench", bundle.root, *QUICK, "--batch", "1,8", "-o", results, "--threads", 1)
    assert result.code == 0
    assert len([line for line in result.out.splitlines() if line.startswith("onnxruntime")]) == 4
    assert "interleaved rounds" in result.out
    document = json.loads(results.read_text())
    assert [(cell["artifact"], cell["batch"]) for cell in document["cells"]] == [
        (name, batch) for name in ("onnx-fp32", "onnx-fp16") for batch in (1, 8)
    ]
    assert document["environment"]["threads"] == 1


def test_json(run: Run, bundle: Bundle) -> None:
    result = run("bench", bundle.root, *QUICK, "--batch", "1", "--json")
    assert result.document["ok"] is True
    assert len(result.document["cells"]) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "64"], "nothing to measure"),
        (["--budget", "soon"], "--budget soon: not a duration"),
        (["--budget", "0"], "--budget 0: not a duration"),
        (["-o", "no/such/folder/results.json"], "does not exist"),
    ],
)
def test_errors(run: Run, bundle: Bundle, flags: list[str], message: str) -> None:
    result = run("bench", bundle.root, *flags)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
