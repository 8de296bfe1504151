"""A headless Chromium for tests of pages, driven over its own pipe: no driver program and no port."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
"""Seconds for one answer: the first start on a slow machine takes some."""


def find_chromium() -> str | None:
    """Where a Chromium or Chrome is, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def require_chromium() -> str:
    """The browser's program; without one the test is skipped, where it may be."""
    program = find_chromium()
    if program is None:
        missing = f"no browser to look at pages with: none of {', '.join(NAMES)} is installed"
        if os.environ.get("CI_REQUIRES_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return program


class Chromium:
    """A browser with one page; ``with Chromium.start(...) as browser``."""

    def __init__(self, pid: int, reads: int, writes: int) -> None:
        self._pid, self._reads, self._writes = pid, reads, writes
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """What the page reported since it was opened."""

    @classmethod
    @contextlib.contextmanager
    def start(cls, program: str, profile: Path) -> Iterator[Chromium]:
        """``profile`` is an empty folder."""
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        to_browser, from_browser = os.pipe(), os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4; free both before they are set.
        far = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (to_browser[0], from_browser[1])]
        quiet = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        wiring = [quiet, (os.POSIX_SPAWN_DUP2, far[0], 3), (os.POSIX_SPAWN_DUP2, far[1], 4)]
        pid = os.posix_spawn(program, command, dict(os.environ), file_actions=wiring, setpgroup=0)
        for end in (to_browser[0], from_browser[1], *far):
            os.close(end)
        browser = cls(pid, from_browser[0], to_browser[1])
        try:
            browser._attach()
            yield browser
        finally:
            browser._end()

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._writes)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._reads)

    def open(self, url: str, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Load a page in a window of this size, and wait until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self._wait_for("Page.loadEventFired")
        self.events = []
        self.call("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    @property
    def requested(self) -> list[str]:
        """Every URL that the page asked for, its own first."""
        return [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[str]:
        """Everything on the console, and every error of the page."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e["method"] in methods]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = memoryview(json.dumps(message).encode() + b"\0")
        while data:
            data = data[os.write(self._writes, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _wait_for(self, method: str) -> None:
        """Until an event has come that was not there before."""
        while not any(event["method"] == method for event in self.events):
            self._receive()
        self.events = [event for event in self.events if event["method"] != method]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE:.0f} s")
            if not (chunk := os.read(self._reads, 1 << 16)):
                raise ConnectionError("Chromium ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
