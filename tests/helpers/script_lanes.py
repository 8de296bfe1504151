"""Lanes whose process is a script of the test's own: a backend that lies, hangs, or dies."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.helpers.bundles import WEIGHT, write_bundle
from vitdeploy.benchmark.lanes import Lane, Target, open_targets
from vitdeploy.machine.child import child_environment

_SCRIPT = """
import os, signal, sys, time
import numpy as np
from vitdeploy.benchmark.loop import Loaded, main

WEIGHT = np.load({weight!r})

def right(pixels):
    return (pixels.reshape(len(pixels), -1).astype(np.float64) @ WEIGHT).astype(np.float32)

calls = 0

def load(job):
    def call(pixels):
        global calls
        calls += 1
        return answer(pixels), None
    return Loaded([call] * job.get("concurrency", 1), {{"backend": job["name"], "provider": "cpu"}})

{body}

main(load)
"""


def target(folder: Path, **bundle: Any) -> Target:
    """The linear classifier, ready to be measured."""
    return open_targets([write_bundle(folder / "linear.bundle", **bundle)])[0]


def lane(target: Target, folder: Path, name: str, body: str, **changes: Any) -> Lane:
    """A lane that answers as ``body`` defines ``answer(pixels)``; ``right``, ``calls`` are there to use."""
    import numpy as np

    weight, script = folder / "weight.npy", folder / f"{name}.py"
    np.save(weight, WEIGHT.astype(np.float64))
    script.write_text(_SCRIPT.format(weight=str(weight), body=textwrap.dedent(body)))
    given: dict[str, Any] = {
        "target": target,
        "backend": name,
        "artifact": "onnx-fp32",
        "precision": "fp32",
        "threads": None,
        "concurrency": 1,
        "command": (sys.executable, str(script)),
        "job": {"name": name, "concurrency": changes.get("concurrency", 1)},
        "environment": child_environment(),
    }
    return Lane(**{**given, **changes})


RIGHT = "answer = right"
"""The body of a lane that does what it should."""
