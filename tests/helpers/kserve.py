"""KServe's own Python package, in an environment of its own: it asks for other versions than ours."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import venv
from typing import Any

from tests.helpers.paths import ROOT

ENVIRONMENT = ROOT / ".venv-kserve"
WANTED = ("kserve==0.21.0", "kubernetes<34")
"""KServe's classes are of the kind that Kubernetes' client generated until then."""


def in_kserve_python(script: str, *arguments: object, stdin: str | None = None) -> Any:
    """Run a script where ``kserve`` can be imported, and return the JSON document that it prints."""
    python = ENVIRONMENT / "python/bin/python"
    ENVIRONMENT.mkdir(exist_ok=True)
    with (ENVIRONMENT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark = ENVIRONMENT / ".ready"
        if not mark.exists() or mark.read_text() != "\n".join(WANTED):
            venv.create(ENVIRONMENT / "python", clear=True, with_pip=False)
            pip = (sys.executable, "-m", "pip", "--python", python)
            _run(*pip, "install", "--quiet", "--no-compile", *WANTED)
            mark.write_text("\n".join(WANTED))
    return json.loads(_run(python, "-c", script, *arguments, stdin=stdin))


def _run(*command: object, stdin: str | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
