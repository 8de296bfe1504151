"""A child process that speaks JSON lines: messages, its errors, and every way to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vitdeploy
from vitdeploy.errors import MissingDependency, PrecisionError, UsageError, VitdeployError
from vitdeploy.machine.child import Worker, WorkerFailure, child_environment, error_of, record_of

PATIENCE = 60.0
"""Seconds after which a test gives up; what it waits for comes at once on an idle machine."""
CHILD = """
import json, os, signal, subprocess, sys, time
from vitdeploy.errors import PrecisionError, UsageError
from vitdeploy.machine.child import private_pipes, record_of
requests, answers = private_pipes()
job = json.loads(requests.readline())
def send(**message):
    answers.write(json.dumps(message) + "\\n")
def ask():
    return json.loads(requests.readline())
"""


def worker(body: str, limit: float | None = PATIENCE, **options: Any) -> Worker:
    """A child that runs ``body`` after reading its job."""
    command = (sys.executable, "-P", "-c", CHILD + body)
    return Worker(command, {"numbers": [1, 2]}, child_environment(), limit, **options)


def gone(pid: int) -> bool:
    """Wait until a process is gone, or is a zombie that nobody has collected."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


def test_a_job_requests_and_answers() -> None:
    with worker("send(sum=sum(job['numbers']))\nwhile True: send(**ask())") as child:
        assert child.answer() == {"sum": 3}
        assert child.ask("look", what="é") == {"do": "look", "what": "é"}
        assert child.ask("again") == {"do": "again"}
    assert gone(child.pid)


def test_messages_may_come_in_pieces_and_together() -> None:
    body = "answers.write('{\"a\":'); answers.flush(); time.sleep(0.1); answers.write(' 1}\\n{\"b\": 2}\\n')"
    with worker(body + "; answers.flush(); ask()") as child:
        assert [child.receive(), child.receive()] == [{"a": 1}, {"b": 2}]


def test_what_a_library_prints_or_reads_is_no_message() -> None:
    body = (
        "print('hello', flush=True); os.system('echo native'); assert sys.stdin.read() == ''; send(done=True)"
    )
    with worker(body) as child:
        assert child.answer() == {"done": True}


def test_an_error_ends_nothing_and_is_rebuilt() -> None:
    body = "send(error=record_of(PrecisionError('too wide', hint='--fp32')))\nsend(error=record_of(\n"
    body += "OSError(28, 'No space left on device', '/there')))\nask()"
    with worker(body) as child:
        with pytest.raises(WorkerFailure, match="too wide") as caught:
            child.answer()
        assert not caught.value.fatal
        assert isinstance(caught.value.__cause__, PrecisionError)
        assert caught.value.__cause__.hint == "--fp32"
        with pytest.raises(WorkerFailure, match="No space left") as caught:
            child.answer()
        assert isinstance(caught.value.__cause__, OSError)
        assert (caught.value.__cause__.errno, caught.value.__cause__.filename) == (28, "/there")


@pytest.mark.parametrize(
    "error",
    [
        UsageError("no such thing", hint="another"),
        MissingDependency("triton", extra="kernels", purpose="this"),
        OSError(28, "No space left on device", "/some/where"),
    ],
)
def test_a_record_is_the_error(error: OSError | VitdeployError) -> None:
    again = error_of(record_of(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    "body, message, killed",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the child died of SIGSEGV", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the child was killed, out of memory most likely", True),
        ("sys.exit(3)", "the child ended with 3", False),
        (
            "sys.stderr.write('no\\n  licence'); sys.stderr.flush(); os._exit(0)",
            "the child ended with 0; its last words: no licence",
            False,
        ),
        ("answers.write('hello\\n'); ask()", "the child answers no JSON", False),
    ],
)
def test_a_death_is_one_line(body: str, message: str, killed: bool) -> None:
    with worker(body, name="the child") as child, pytest.raises(WorkerFailure) as caught:
        child.answer()
    assert str(caught.value) == message
    assert (caught.value.fatal, caught.value.killed) == (True, killed)
    assert gone(child.pid)
    with pytest.raises(WorkerFailure, match="the child was ended"):
        child.ask("more")


@pytest.mark.slow
def test_a_child_that_says_nothing_is_given_up() -> None:
    with worker("time.sleep(600)") as child, pytest.raises(WorkerFailure, match="no answer within 0 s"):
        child.answer(0.2)
    assert gone(child.pid)


def test_what_a_child_has_started_ends_with_it() -> None:
    with worker("send(pid=subprocess.Popen(['sleep', '600']).pid); ask()", limit=None) as child:
        grandchild = child.answer()["pid"]
    assert gone(grandchild)


@pytest.mark.slow
def test_the_end_of_the_parent_is_the_end_of_the_input() -> None:
    script = f"import sys\nfrom vitdeploy.machine.child import Worker, child_environment\nbody = {CHILD!r}\n"
    script += "body += 'send(up=True)\\nrequests.read()'\n"
    script += "child = Worker((sys.executable, '-P', '-c', body), {}, child_environment(), None)\n"
    script += "child.answer()\nprint(child.pid, flush=True)\nchild.answer()"
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **child_environment()},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert gone(pid)


def test_the_environment_imports_this_very_package(tmp_path: Path) -> None:
    (tmp_path / "vitdeploy").mkdir()
    (tmp_path / "vitdeploy" / "__init__.py").write_text("raise SystemExit('another one')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import vitdeploy; print(vitdeploy.__file__)"],
        cwd=tmp_path,
        env={**os.environ, **child_environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == vitdeploy.__file__
