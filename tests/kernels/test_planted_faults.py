"""Planted faults: a kernel with one mask, one sum or one correction less must fail its own tests.

Each fault is one substitution in a copy of the package. A child process imports what is large, then forks
for each fault and runs the few tests that are to catch it against the copy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.evidence import KERNELS, Evidence, digest, kernel_sources
from tests.helpers.kernel_faults import GROUPS, Fault
from tests.helpers.paths import ROOT, TESTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


CHILD = """
import json, os, sys
import hypothesis, pytest, torch.fx.experimental.symbolic_shapes

codes = []
for folder, path, tests in json.load(sys.stdin):
    child = os.fork()
    if not child:
        log = os.open(folder + "/log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, folder)
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not gpu", "--hypothesis-seed=0"]
        code = pytest.main([path, "-k", tests, *options])
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def plant(folder: Path, fault: Fault | None) -> None:
    """A copy of the package, with the fault if there is one."""
    shutil.copytree(KERNELS, folder / KERNELS.name, ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        file = folder / KERNELS.name / fault.file
        text = file.read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old}"
        file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


@pytest.mark.parametrize("group", GROUPS)
def test_faults_are_caught(group: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file, faults = GROUPS[group]
    evidence = Evidence(f"planted-faults-{group}", request.config.getoption("evidence"))
    helpers = [*TESTS.glob("helpers/kernel_*.py"), *TESTS.glob("helpers/interpreter.py")]
    own = [Path(__file__), Path(__file__).with_name(file), Path(__file__).with_name("conftest.py")]
    today = digest([*kernel_sources(), *helpers, *own])
    evidence.skip_if_recorded(today)
    every = " or ".join(sorted({f"({fault.tests})" for fault in faults}))
    runs = [(None, every), *((fault, fault.tests) for fault in faults)]
    work = []
    for i, (fault, tests) in enumerate(runs):
        plant(tmp_path / str(i), fault)
        work.append((str(tmp_path / str(i)), str(Path(__file__).with_name(file)), tests))
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(work),
        env={**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    codes = json.loads(done.stdout)
    logs = [(tmp_path / str(i) / "log").read_text(encoding="utf-8") for i in range(len(runs))]
    assert codes[0] == 0, f"these tests fail without a fault:\n{logs[0]}"
    for fault, code, log in zip(faults, codes[1:], logs[1:], strict=True):
        # By an assertion: a fault that does not even run has not been caught.
        assert code == 1, f"not caught: {fault}\n{log}"
        assert re.search(r"^E +(assert|AssertionError)", log, re.MULTILINE), f"{fault} ends with\n{log}"
    evidence.passed(today)
