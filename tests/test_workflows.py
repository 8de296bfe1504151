"""What GitHub runs for this project, and for others: versions, targets and commands are those that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vitdeploy
from tests.helpers.paths import ROOT

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


def step(name: str, cwd: Path, **values: str) -> subprocess.CompletedProcess[str]:
    """Run a step of action.yml as a runner would, its inputs at their defaults but for ``values``."""
    action = read(ROOT / "action.yml")
    (found,) = (one for one in action["runs"]["steps"] if one["name"] == name)
    inputs = {key: field.get("default", "") for key, field in action["inputs"].items()} | values
    assert inputs.keys() == action["inputs"].keys()
    context = {f"inputs.{key}": value for key, value in inputs.items()} | {"github.action_path": str(ROOT)}
    given = {
        key: re.sub(r"\$\{\{ (\S+) \}\}", lambda match: context[match[1]], value)
        for key, value in found["env"].items()
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # pip says what it would install, and asks no index.
    pip = {"PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", found["run"]],
        cwd=cwd,
        env={**os.environ, **pip, "PIP_IGNORE_INSTALLED": "1", "PATH": path, **given},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "onnxruntime"])
def test_the_action_passes_a_good_bundle(backend: str, tmp_path: Path) -> None:
    done = step("Verify", tmp_path, bundle=str(BUNDLE), backend=backend)
    assert done.returncode == 0, done.stderr
    assert "comparisons passed" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_action_fails_where_there_is_no_bundle(tmp_path: Path) -> None:
    assert step("Verify", tmp_path, bundle="missing").returncode == 2


def test_the_example_gives_the_action_what_it_takes() -> None:
    (used,) = (
        one
        for one in read(ROOT / "examples/verify-workflow.yml")["jobs"]["verify"]["steps"]
        if "/vitdeploy@" in one.get("uses", "")
    )
    inputs = read(ROOT / "action.yml")["inputs"]
    assert used["with"].keys() <= inputs.keys()
    assert {name for name, field in inputs.items() if field.get("required")} <= used["with"].keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(used["with"]["extras"].split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "openvino,export"])
def test_the_action_installs_its_own_version(extras: str, tmp_path: Path) -> None:
    done = step("Install vitdeploy", tmp_path, bundle="any", extras=extras)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Would install vitdeploy-\d", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_the_action_asks_for_the_version_that_is_named(tmp_path: Path) -> None:
    done = step("Install vitdeploy", tmp_path, bundle="any", version="987.6")
    assert done.returncode == 1
    assert "vitdeploy[]==987.6" in done.stderr or "vitdeploy==987.6" in done.stderr
