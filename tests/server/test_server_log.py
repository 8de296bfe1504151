"""What the servers that tests share say: one event of theirs fails one test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.live_server import Live

CRASH = "ERROR:    Exception in ASGI application\nTraceback (most recent call last):\n"


def test_a_test_answers_only_for_what_was_said_during_it(tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    log.write_text(CRASH)
    process: Any = SimpleNamespace(poll=lambda: None)
    server = Live("http://127.0.0.1:1", "", process, log)
    with pytest.raises(AssertionError, match="Traceback"):
        server.require_well()
    with server.watched():
        assert server.said() == ""
    with pytest.raises(AssertionError, match="Traceback"), server.watched(), log.open("a") as file:
        file.write(CRASH)
    with server.watched(), log.open("a") as file:
        file.write("WARNING:  \xff\n")
    assert server.said() == "WARNING:  \xff\n"


def test_a_server_that_ended_fails_the_test(tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    log.write_text("")
    process: Any = SimpleNamespace(poll=lambda: 1)
    with pytest.raises(AssertionError), Live("http://127.0.0.1:1", "", process, log).watched():
        pass
