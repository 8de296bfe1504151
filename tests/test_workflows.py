"""What GitHub runs for this project, and for others: versions, targets and commands are those that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vitdeploy
from tests.helpers.action import ActionRun, run_action
from tests.helpers.commands import in_this_process
from tests.helpers.paths import ROOT
from tests.helpers.pictures import picture
from vitdeploy.benchmark.results import read_results

GITHUB = ROOT / ".github"
BUNDLE = ROOT / "tests/oracles/bundles/0.1.0"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def supported() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    least, end = re.findall(r"3\.(\d+)", project["requires-python"])
    assert said == [f"3.{minor}" for minor in range(int(least), int(end))]
    return set(said)


def test_ci_makes_what_the_makefile_has_with_every_python() -> None:
    job = read(GITHUB / "workflows/ci.yml")["jobs"]["make"]
    matrix = job["strategy"]["matrix"]
    assert set(matrix["python"]) == supported()
    makefile = (ROOT / "Makefile").read_text()
    assert matrix["target"] == ["check", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in matrix["target"])


def test_a_release_is_published_without_a_token() -> None:
    release = read(GITHUB / "workflows/release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert "secrets" not in (GITHUB / "workflows/release.yml").read_text()


@pytest.mark.parametrize("form", ["bug", "checkpoint", "feature"])
def test_issue_forms_ask(form: str) -> None:
    found = read(GITHUB / f"ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= found.keys()
    identifiers = [field["id"] for field in found["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert any(field.get("validations", {}).get("required") for field in found["body"])


def test_hooks_are_the_tools_of_make_lint() -> None:
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]}
    assert tools == {"ruff", "mypy"}
    assert all(f"$(BIN)/{tool}" in (ROOT / "Makefile").read_text() for tool in tools)


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (vitdeploy.__version__, project["license"])


# --- the action that verifies a bundle in somebody's pull request ------------------------------------------

ACTION = ROOT / "action.yml"


def acted(folder: Path, only: str | None = None, **inputs: str) -> ActionRun:
    """The whole action, or one step, with ``_`` in an input's name for ``-``; what it would install is here
    already."""
    (folder / "checkout").mkdir()
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    return run_action(ACTION, folder / "checkout", given, only=only)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A vitdeploy that writes down how it is called, and ends with the code in the file ``code``."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "vitdeploy"
    log, code = shlex.quote(f"{folder}/calls"), shlex.quote(f"{folder}/code")
    said = 'for word in "$@"; do [ "$last" = --markdown ] && echo "| slower |" > "$word"; last=$word; done\n'
    program.write_text(
        f"#!/bin/bash\nprintf '%s\\0' \"$@\" >> {log}\nprintf '\\n' >> {log}\n{said}exit $(cat {code})\n"
    )
    program.chmod(0o755)
    (folder / "code").write_text("0")
    return folder


def calls(programs: Path) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in (programs / "calls").read_text().splitlines()]


@pytest.mark.slow
def test_the_action_passes_a_good_bundle(tmp_path: Path) -> None:
    """All of it, with labelled images and a baseline: measured a moment ago, and written down as slower, so
    that nothing which the machine does meanwhile makes a regression of it."""
    import vitdeploy

    results = vitdeploy.bench(BUNDLE, backends=["onnxruntime"], batches=[1], budget=0.3)
    (cell,) = results.cells
    slower = cell.model_copy(update={"samples_ms": tuple(1000 * sample for sample in cell.samples_ms)})
    baseline = results.model_copy(update={"cells": (slower,)}).model_dump_json()
    (tmp_path / "baseline.json").write_text(baseline, encoding="utf-8")
    for name, label in (("a", "cat"), ("b", "dog")):
        (tmp_path / f"data/{label}").mkdir(parents=True)
        picture(ord(name), (32, 32)).save(tmp_path / f"data/{label}/{name}.png")
    done = acted(
        tmp_path,
        bundle=str(BUNDLE),
        backend="onnxruntime",
        data=str(tmp_path / "data"),
        max_drop="0.5",
        baseline=str(tmp_path / "baseline.json"),
        tolerance="10%",
        budget="0.3s",
        bench_flags="--batch 1",
    )
    assert [*done.steps] == ["Install vitdeploy", "Verify", "Measure"]
    assert done.code == 0, done.steps["Measure"].stderr
    verified = done.steps["Verify"].stdout + done.steps["Verify"].stderr
    assert "comparisons passed" in verified
    assert "accuracy on 2 images" in verified
    assert done.summary.startswith("✅")
    assert "onnx-fp32" in done.summary
    assert read_results(Path(done.outputs["results"])).cells[0].batch == 1


@pytest.mark.slow
def test_the_action_fails_where_a_byte_is_wrong(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bad.bundle")
    model = tmp_path / "bad.bundle/model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    done = acted(tmp_path, bundle=str(tmp_path / "bad.bundle"), baseline="baseline.json")
    assert [*done.steps] == ["Install vitdeploy", "Verify"]  # what is wrong is not measured
    assert done.code != 0
    assert "model.onnx" in done.steps["Verify"].stderr
    assert done.outputs == {"results": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, inputs, said",
    [
        ("Verify", {"bundle": "missing"}, "missing"),
        ("Verify", {"bundle": str(BUNDLE), "max_drop": "1"}, "--data"),
        ("Measure", {"bundle": str(BUNDLE), "baseline": "missing.json"}, "missing.json"),
    ],
    ids=["bundle", "data", "baseline"],
)
def test_the_action_fails_where_something_is_missing(
    tmp_path: Path, step: str, inputs: dict[str, str], said: str
) -> None:
    done = acted(tmp_path, step, backend="onnxruntime", **inputs)
    assert done.code == 2
    assert said in done.steps[step].stderr


def test_what_the_action_calls(programs: Path, tmp_path: Path) -> None:
    """Each word where it belongs, whatever is in it; a step that nobody asked for does not run."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    odd = "my models/$(touch here).bundle"
    run_action(ACTION, tmp_path / "a", {"bundle": odd}, programs=programs, only="Verify")
    assert calls(programs) == [["verify", odd]]
    (programs / "calls").unlink()
    inputs = {"bundle": odd, "backend": "openvino", "data": "held out", "max-drop": "0.5"}
    measured = {"baseline": "old.json", "bench-flags": "--batch 1,8 --threads 2"}
    (programs / "pip").symlink_to("/bin/true")
    (programs / "python").symlink_to("/bin/true")
    done = run_action(ACTION, tmp_path / "b", inputs | measured, programs=programs)
    verify, bench = calls(programs)
    assert verify == ["verify", odd, "--backend", "openvino", "--data", "held out", "--max-drop", "0.5"]
    results = done.outputs["results"]
    summary = f"{Path(results).parent}/vitdeploy-summary.md"
    assert bench == [
        *("bench", odd, "--backend", "openvino", "--compare", "old.json", "--tolerance", "5%"),
        *("--budget", "60s", "-o", results, "--markdown", summary, "--batch", "1,8", "--threads", "2"),
    ]
    assert not list(tmp_path.rglob("here"))


def test_a_slower_bundle_fails_the_action_and_its_page_says_so(programs: Path, tmp_path: Path) -> None:
    (programs / "code").write_text("6")
    (tmp_path / "checkout").mkdir()
    inputs = {"bundle": "any", "baseline": "old.json"}
    done = run_action(ACTION, tmp_path / "checkout", inputs, programs=programs, only="Measure")
    assert (done.code, done.summary) == (6, "| slower |\n")
    assert done.outputs["results"]


def test_the_example_gives_the_action_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    (used,) = (
        one
        for one in read(ROOT / "examples/verify-workflow.yml")["jobs"]["verify"]["steps"]
        if "/vitdeploy@" in one.get("uses", "")
    )
    inputs = read(ACTION)["inputs"]
    assert used["with"].keys() <= inputs.keys()
    assert {name for name, field in inputs.items() if field.get("required")} <= used["with"].keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(used["with"]["extras"].split(",")) <= project["optional-dependencies"].keys()
    assert all(isinstance(value, str) for value in used["with"].values())
    known = in_this_process(capsys, "bench", "--help").out
    assert all(flag in known for flag in re.findall(r"--[a-z-]+", used["with"]["bench-flags"]))


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "openvino,export"])
def test_the_action_installs_its_own_version(extras: str, tmp_path: Path) -> None:
    done = installed(tmp_path, extras=extras)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Would install vitdeploy-\d", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_the_action_asks_for_the_version_that_is_named(tmp_path: Path) -> None:
    done = installed(tmp_path, version="987.6")
    assert done.returncode == 1
    assert "vitdeploy[]==987.6" in done.stderr or "vitdeploy==987.6" in done.stderr


def installed(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    (folder / "checkout").mkdir()
    name = "Install vitdeploy"
    return run_action(ACTION, folder / "checkout", {"bundle": "any", **inputs}, only=name).steps[name]
