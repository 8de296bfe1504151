"""``vitdeploy bench``: tables, files, choices, comparisons, and what is wrong said before measuring."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import vitdeploy
from tests.helpers.bundles import WEIGHT, write_bundle
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from tests.helpers.paths import ROOT
from tests.helpers.several_sizes import several_sizes
from vitdeploy.benchmark import disturbances
from vitdeploy.benchmark.results import Results, read_results, schema
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.errors import MissingDependency
from vitdeploy.machine.identity import this_machine

QUICK = ("--backend", "onnxruntime", "--budget", "0.3s")
SCHEMA = ROOT / "docs/results.schema.json"


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run beside these: nothing here is about what the machine does meanwhile."""
    monkeypatch.setattr(disturbances.CounterReader, "read", lambda self, workers: disturbances.ZERO)


def test_table_and_files(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "csv", "md", "html")}
    flags = ("-o", files["json"], "--csv", files["csv"], "--markdown", files["md"], "--html", files["html"])
    result = run("bench", bundle.root, *QUICK, "--batch", "1,8", "--threads", 1, *flags)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("onnxruntime, 1 thread ")]
    assert [line.split()[3:5] for line in lines] == [
        [name, batch] for name in ("onnx-fp32", "onnx-fp16") for batch in "18"
    ]
    assert "interleaved rounds" in result.out
    document = json.loads(files["json"].read_text())
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["settings"]["threads"] == [1]
    assert document["command"].startswith("vitdeploy")
    found = read_results(files["json"])
    assert len(list(csv.reader(files["csv"].open(newline="")))) == 1 + len(found.cells) == 5
    assert "onnx-fp16" in files["md"].read_text()
    assert files["html"].read_text().startswith("<!DOCTYPE html>")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_schema_is_the_documented_one() -> None:
    """``python -m vitdeploy.benchmark.results > docs/results.schema.json`` writes it anew."""
    assert json.loads(SCHEMA.read_text()) == schema()


@pytest.mark.slow
def test_the_digits_in_full(run: Run, digits: Exported, tmp_path: Path) -> None:
    flags = ("--backend", "onnxruntime,openvino", "--batch", "1,8", "--budget", "2s", "--json")
    result = run("bench", digits.folder, *flags)
    assert result.code == 0, result.err
    document = result.document
    assert document.pop("ok") is True
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    found = Results.model_validate(document)
    assert {(c.backend, c.artifact, c.batch) for c in found.cells} == {
        (backend, name, batch)
        for backend in ("onnxruntime", "openvino")
        for name in ("onnx-fp32", "onnx-fp16")
        for batch in (1, 8)
    }
    assert all(cell.valid and cell.accuracy and cell.accuracy.top1 > 0.97 for cell in found.cells)


@pytest.mark.slow
def test_wrong_outputs_are_visible(run: Run, tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", weight=WEIGHT * 1.1)
    report = tmp_path / "report.html"
    result = run("bench", made.root, *QUICK, "--batch", "2", "--html", report, "--pick", "latency")
    assert result.code == 5
    assert "WRONG: relative error" in result.out
    assert "1 of 1 cells failed parity: onnxruntime onnx-fp32 at batch 2: relative error" in result.err
    assert "picked" not in result.out
    assert Bundle.open(made.root).manifest.choices == ()
    assert report.exists()
    as_json = run("bench", made.root, *QUICK, "--batch", "2", "--json")
    assert (as_json.code, as_json.document["ok"]) == (5, False)


@pytest.mark.slow
def test_pick_is_kept_and_used(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    picked = run("bench", bundle.root, *QUICK, "--batch", "1,8", "--pick", "throughput", "--json")
    assert picked.code == 0, picked.err
    (choice,) = Bundle.open(bundle.root).manifest.choices
    assert choice.machine == this_machine()
    assert (choice.goal, choice.backend, choice.batch) == ("throughput", "onnxruntime", 8)
    assert picked.document["picked"][0]["artifact"] == choice.artifact
    image = tmp_path / "image.png"
    from tests.helpers.bundles import random_image

    random_image(0).save(image)
    said = run("predict", bundle.root, image)
    assert said.code == 0
    assert f"onnxruntime {choice.artifact}: picked for throughput on this machine" in said.err
    assert "picked" not in run("predict", bundle.root, image, "--backend", "onnxruntime").err
    assert run("verify", bundle.root, "--backend", "onnxruntime").code == 0
    again = run("bench", bundle.root, *QUICK, "--batch", "1", "--pick", "latency")
    assert "picked for latency: onnxruntime" in again.out
    assert [c.goal for c in Bundle.open(bundle.root).manifest.choices] == ["latency"], "one per machine"


@pytest.mark.slow
def test_image_sizes_are_measured_and_picked_each(run: Run, tmp_path: Path) -> None:
    root = several_sizes(tmp_path / "many").root
    result = run("bench", root, *QUICK, "--batch", "1", "--image-size", "8,16", "--pick", "latency")
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines() if line.startswith("linear")]
    assert [row[1] for row in rows] == ["8x8", "16x16"]
    assert "onnx-fp32-16x16, 16x16, batch 1" in result.out
    assert [c.image_size for c in Bundle.open(root).manifest.choices] == [None, (16, 16)]
    unknown = run("bench", root, *QUICK, "--batch", "1", "--image-size", "24")
    assert (unknown.code, "there is no image size 24x24" in unknown.err) == (2, True)


@pytest.mark.slow
def test_nothing_fast_enough(run: Run, bundle: Bundle) -> None:
    result = run(
        "bench", bundle.root, *QUICK, "--batch", "1", "--pick", "throughput", "--max-latency-ms", "1e-9"
    )
    assert result.code == 2
    assert "no cell stays within 1e-09 ms" in result.err
    assert "the lowest is" in result.err
    assert "onnxruntime" in result.out, "the table is there all the same"


def slowed(path: Path, factor: float) -> Path:
    """The results as they would have been with times multiplied."""
    document = json.loads(path.read_text())
    for cell in document["cells"]:
        for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms"):
            cell[name] *= factor
        cell["samples_ms"] = [factor * sample for sample in cell["samples_ms"]]
        cell["disturbed"] = []
    other = path.with_name("other.json")
    other.write_text(json.dumps(document))
    return other


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle, and its results at batch 1."""
    folder = tmp_path_factory.mktemp("earlier")
    root, path = write_bundle(folder / "linear.bundle").root, folder / "old.json"
    found = vitdeploy.bench(root, backends=["onnxruntime"], batches=(1,), budget=0.3)
    path.write_text(json.dumps(found.as_dict()))
    return root, path


@pytest.mark.slow
@pytest.mark.parametrize("factor, code, verdict", [(0.05, 6, "slower"), (20, 0, "faster")])
def test_compare(
    run: Run, earlier: tuple[Path, Path], tmp_path: Path, factor: float, code: int, verdict: str
) -> None:
    (root, old), summary = earlier, tmp_path / "summary.md"
    flags = ("--batch", "1", "--compare", slowed(old, factor), "--markdown", summary)
    result = run("bench", root, *QUICK, *flags)
    assert f"Compared, tolerance 5%: 1 {verdict}." in result.out, result.out
    assert result.code == code
    assert f"| {verdict} |" in summary.read_text()
    if code:
        assert "error: 1 cells are slower: onnxruntime onnx-fp32 at batch 1" in result.err


def foreign(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "old.json"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, message",
    [
        ("not json", "not readable as JSON"),
        ("[1, 2]", "not a results.json"),
        ('{"benchmarks": [], "machine_info": {}}', "not a results.json"),
        ('{"schema_version": 1, "cells": []}', "schema version 1, but this vitdeploy reads version 2"),
        ('{"schema_version": 2, "cells": []}', "not a results.json: created: Field required"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)  # fmt: skip
def test_a_foreign_file_to_compare_with(
    run: Run, bundle: Bundle, tmp_path: Path, text: str, message: str
) -> None:
    result = run("bench", bundle.root, "--compare", foreign(tmp_path, text))
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "64"], "--batch 64: nothing of"),
        (["--batch", "8x"], "--batch 8x: not a list of positive whole numbers"),
        (["--backend", "openvin"], "unknown backend 'openvin'; did you mean 'openvino'?"),
        (["--artifact", "onnx-fp61"], "no artifact 'onnx-fp61'; did you mean 'onnx-fp16'"),
        (["--budget", "soon"], "--budget soon: not a duration"),
        (["--budget", "0"], "--budget 0: not a duration"),
        (["--tolerance", "much"], "--tolerance much: not a share"),
        (["--tolerance", "500%"], "--tolerance 500%: not a share"),
        (["--pick", "speed"], "--pick speed: not a goal"),
        (["--spin", "off,yes"], "--spin yes: neither off nor on"),
        (["--spin", ","], "names nothing"),
        (["--max-latency-ms", "5"], "--max-latency-ms goes with --pick"),
        (["-o", "no/such/folder/results.json"], "the folder no/such/folder does not exist"),
        (["--html", "/proc/report.html"], "/proc/report.html: cannot be written"),
        (["--csv", "."], ".: is a folder, not a file"),
        (["--compare", "missing.json"], "missing.json: cannot be read: No such file"),
        (["--data", "missing"], "missing: is not a folder of labelled images"),
        (["--threads", "0"], "--threads 0: not a list of positive whole numbers"),
    ],
)
def test_errors_come_before_measuring(run: Run, bundle: Bundle, flags: list[str], message: str) -> None:
    result = run("bench", bundle.root, *flags)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "measure" not in result.err


def test_a_report_without_its_libraries(
    run: Run, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("bench", bundle.root, "--html", tmp_path / "r.html")
    assert result.code == MissingDependency.exit_code
    assert 'pip install "vitdeploy[report]"' in result.err


INTERRUPTED = """
import signal, sys
from vitdeploy.cli import main, output

signal.signal(signal.SIGINT, signal.default_int_handler)
output.Stages.updated = lambda self, stage: print(stage.detail, file=sys.stderr, flush=True)
sys.exit(main(sys.argv[1:]))
"""
"""Says every step of the measurement, also without a terminal."""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(bundle: Bundle, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    flags = ["--backend", "onnxruntime", "--batch", "1,8", "--budget", "60s", "-o", str(results)]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "bench", str(bundle.root), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "round 2 of 5 cells" in line:  # with the control work: one round is whole
            break
    workers = _children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, "error: interrupted by SIGINT" in err) == (130, True), "".join(said) + err
    assert "PARTIAL" in out
    found = read_results(results)
    assert found.partial
    assert len(found.cells) == 4
    assert all(cell.status == "ok" for cell in found.cells)
    assert len(workers) == 3, "two artifacts and the control work"
    assert not [pid for pid in workers if Path("/proc", pid).exists()]


def _children(pid: int) -> list[str]:
    """Processes whose parent this one is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [path.parent.name] if int(fields[1]) == pid else []
    return found


def test_choices_of_other_machines_stay(bundle: Bundle) -> None:
    from vitdeploy.bundle.choices import write_choices

    given: dict[str, Any] = {
        "goal": "latency", "backend": "openvino", "provider": None, "artifact": "onnx-fp16", "batch": 1,
        "p50_ms": 1.0, "images_per_s": 1000.0, "created": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    other, here = Choice(machine=("another",), **given), Choice(machine=this_machine(), **given)
    before = bundle.manifest.digest
    kept = write_choices(write_choices(bundle, other), here)
    assert [choice.machine for choice in kept.manifest.choices] == [("another",), this_machine()]
    assert kept.manifest.digest != before
    kept.verify()
