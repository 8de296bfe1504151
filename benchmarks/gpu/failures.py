"""A plugin of pytest: failures go to a file as they happen, and to the record; a time-out loses none of them.

``pytest -p failures`` with ``ON_GPU_RECORD`` (the file of JSON lines) and ``ON_GPU_FAILURES`` (for people) in
the environment. Of several processes (pytest-xdist) only the one that hands out the tests writes.
"""

from __future__ import annotations

import collections
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import record


class Failures:
    """Notes every outcome."""

    def __init__(self, path: Path, text: Path, stand_in: bool) -> None:
        self._recorder, self._text = record.Recorder(path, stand_in), text
        self._outcomes: collections.Counter[str] = collections.Counter()

    def _failed(self, name: str, when: str, story: str) -> None:
        with self._text.open("a", encoding="utf-8") as file:
            file.write(f"== {name} ({when})\n{story}\n\n")
            file.flush()
            os.fsync(file.fileno())
        last = [line for line in story.splitlines() if line.startswith("E ")] or story.splitlines()[-1:]
        self._recorder.add("failure", test=name, when=when, message=" ".join(last)[:500])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcomes["failed" if report.when == "call" else "errors"] += 1
            self._failed(report.nodeid, str(report.when), report.longreprtext)
        elif report.when == "call" or report.skipped:
            self._outcomes["skipped" if report.skipped else "passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._outcomes["errors"] += 1
            self._failed(report.nodeid, "collection", report.longreprtext)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        finished = int(exitstatus) in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self._recorder.add("tests", finished=finished, exit_status=int(exitstatus), **self._outcomes)


def pytest_configure(config: Any) -> None:
    with contextlib.suppress(ImportError):  # without it there are no tests with examples
        from hypothesis import settings

        # A kernel is compiled in the midst of an example, and a busy machine is no slow function.
        settings.register_profile("on_gpu", deadline=None)
        settings.load_profile("on_gpu")
    if not hasattr(config, "workerinput"):
        places = (Path(os.environ[name]) for name in ("ON_GPU_RECORD", "ON_GPU_FAILURES"))
        config.pluginmanager.register(Failures(*places, "ON_GPU_REHEARSAL" in os.environ), "on-gpu-failures")
