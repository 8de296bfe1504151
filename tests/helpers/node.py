"""transformers.js in Node, from npm, in a folder of its own that later runs find."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ENVIRONMENT = ROOT / "build" / "transformers-js"
PACKAGE = {"private": True, "type": "module", "dependencies": {"@huggingface/transformers": "4.3.2"}}
_OLDEST = 18
"""Node's version from which on it runs."""
_SECONDS = 900.0


def node_environment() -> Path:
    """The folder with ``node_modules``, made if it is not there; safe to call from several processes.

    Without Node the test is skipped, and says so.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no Node to run transformers.js with: node and npm are not installed")
    version = _said(node, "--version").strip()
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST:
        pytest.skip(f"transformers.js needs Node {_OLDEST} or later, and this is {version}")
    ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark, wanted = ENVIRONMENT / ".ready", json.dumps(PACKAGE)
        if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(ENVIRONMENT / "node_modules", ignore_errors=True)
            (ENVIRONMENT / "package.json").write_text(wanted, encoding="utf-8")
            # The package carries ONNX Runtime for CPUs; its script would fetch the one for CUDA.
            _said(npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", folder=ENVIRONMENT)
            mark.write_text(wanted, encoding="utf-8")
    return ENVIRONMENT


def run_javascript(program: str, folder: Path) -> str:
    """Run a module in a folder as Node does, with transformers.js to import, and return what it prints."""
    packages = node_environment() / "node_modules"
    link = folder / "node_modules"
    if not link.is_symlink():
        link.symlink_to(packages)
    (folder / "program.mjs").write_text(program, encoding="utf-8")
    return _said("node", "--preserve-symlinks", "program.mjs", folder=folder)


def _said(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_SECONDS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
