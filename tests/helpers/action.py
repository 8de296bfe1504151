"""A composite action run as a runner runs it: its steps in order, their conditions, files and outputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{ (\S+) \}\}")
# pip says what it would install, and asks no index.
_PIP = {
    "PIP_DRY_RUN": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_IGNORE_INSTALLED": "1",
}


@dataclass
class ActionRun:
    """What became of an action."""

    steps: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    """By name, those that ran; none after one that failed."""
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    """Markdown for the job's page."""

    @property
    def code(self) -> int:
        return next(reversed(self.steps.values())).returncode


def run_action(
    path: Path, cwd: Path, inputs: Mapping[str, str], *, programs: Path | None = None, only: str | None = None
) -> ActionRun:
    """Run the action's steps in bash, its inputs at their defaults but for ``inputs``.

    Args:
        cwd: an empty folder, where the runner has checked something out; its files lie beside it.
        programs: a folder whose programs come before those of this environment.
        only: the one step to run.
    """
    action = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {key: str(one.get("default", "")) for key, one in action["inputs"].items()} | dict(inputs)
    assert given.keys() == action["inputs"].keys(), "an input that the action does not have"
    missing = [key for key, one in action["inputs"].items() if one.get("required") and not given[key]]
    assert not missing, f"required: {missing}"
    context = {f"inputs.{key}": value for key, value in given.items()}
    context["github.action_path"] = str(path.parent)
    folder = cwd.with_name(f"{cwd.name}.runner")
    folder.mkdir()
    run = ActionRun()
    for step in action["runs"]["steps"]:
        if only not in (None, step["name"]) or not _holds(step.get("if", ""), context):
            continue
        files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        found = _run_step(step, cwd, context, {"RUNNER_TEMP": folder, **files}, programs)
        run.steps[step["name"]] = found
        for line in files["GITHUB_OUTPUT"].read_text().splitlines():
            name, _, value = line.partition("=")
            context[f"steps.{step.get('id')}.outputs.{name}"] = value
        files["GITHUB_OUTPUT"].unlink()
        run.summary = files["GITHUB_STEP_SUMMARY"].read_text()
        if found.returncode:
            break
    for name, one in action.get("outputs", {}).items():
        run.outputs[name] = _resolved(one["value"], context)
    return run


def _run_step(
    step: Mapping[str, Any],
    cwd: Path,
    context: Mapping[str, str],
    runner: Mapping[str, Path],
    programs: Path | None,
) -> subprocess.CompletedProcess[str]:
    assert step["shell"] == "bash"
    own = {key: _resolved(value, context) for key, value in step["env"].items()}
    places = (programs, Path(sys.executable).parent, os.environ["PATH"])
    path = os.pathsep.join(str(place) for place in places if place)
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=cwd,
        env={**os.environ, **_PIP, "PATH": path, **{k: str(v) for k, v in runner.items()}, **own},
        capture_output=True,
        text=True,
        check=False,
    )


def _resolved(text: str, context: Mapping[str, str]) -> str:
    """Expressions as a runner fills them in: what is not there is empty."""
    return _EXPRESSION.sub(lambda match: context.get(match[1], ""), text)


def _holds(condition: str, context: Mapping[str, str]) -> bool:
    if not condition:
        return True
    asked = re.fullmatch(r"(\S+) != ''", condition)
    assert asked, f"the test does not know the condition {condition}"
    return context[asked[1]] != ""
