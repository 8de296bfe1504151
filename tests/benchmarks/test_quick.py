"""``pytest benchmarks --quick`` runs every suite once; that it does is checked by running one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_quick_runs_once(quick: bool, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_startup.py", "-k", "test_import", "-q"]
    options = ["-p", "no:cacheprovider", f"--benchmark-json={record}", *(["--quick"] if quick else [])]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this process may be.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(record.read_text(encoding="utf-8"))
    (row,) = document["benchmarks"]
    assert row["stats"]["rounds"] == (1 if quick else 15)
    assert "node" not in document["machine_info"]


def test_ci_runs_the_benchmarks_once() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "pytest benchmarks --quick" in makefile.partition("\ntest:")[2].partition("\n\n")[0]
