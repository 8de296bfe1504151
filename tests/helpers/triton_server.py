"""NVIDIA's real Triton Inference Server, on a CPU, from the wheel of nvidia-pytriton.

It lives in an environment of its own beside the checkout, which the first test that asks makes (a minute or
two) and later runs find. Nothing of vitdeploy is in there: what a package carries has to do.

    with running_triton(package / "models") as triton:
        tritonclient.http.InferenceServerClient(triton.http)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from tests.helpers.paths import ROOT

ENVIRONMENT = ROOT / ".venv-triton-server"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WANTED = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime>=1.23", f"pillow=={version('pillow')}")
"""The server (2.51), and what the models in Python need."""

_START_SECONDS = 900.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Triton:
    """A running server."""

    http: str
    """``host:port``, as tritonclient wants it."""
    grpc: str
    log: Path
    pid: int

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def logged(self) -> str:
        return self.log.read_text(errors="replace")


class NotReady(AssertionError):
    """The server ended, or never became ready; says what it logged."""


def environment() -> Path:
    """The environment with the server, made if it is not there; safe to call from several processes."""
    mark = ENVIRONMENT / ".ready"
    recipe = "\n".join((PYTHON, *WANTED))
    ENVIRONMENT.mkdir(exist_ok=True)
    with (ENVIRONMENT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists() or mark.read_text() != recipe:
            _make()
            mark.write_text(recipe)
    return ENVIRONMENT


def _make() -> None:
    for entry in ENVIRONMENT.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
    venv.create(ENVIRONMENT, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", ENVIRONMENT / "bin/python")
    _run(*pip, "install", "--quiet", "--no-compile", *WANTED)


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def _packages() -> Path:
    return environment() / "lib" / f"python{PYTHON}" / "site-packages"


def _backends(folder: Path) -> Path:
    """The server's Python backend, with the stub for this Python, beside the tests' own backends."""
    home = _packages() / "pytriton"
    python = folder / "python"
    shutil.copytree(home / "tritonserver/backends/python", python)
    shutil.copy(home / "tritonserver/python_backend_stubs" / PYTHON / "triton_python_backend_stub", python)
    for own in (ROOT / "tests/triton_backends").iterdir():
        if (own / "model.py").exists():
            shutil.copytree(own, folder / own.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@contextlib.contextmanager
def running_triton(
    repository: Path, scratch: Path, flags: Sequence[str] = (), *, ready: bool = True
) -> Iterator[Triton]:
    """Start the server on a model repository, wait until it is ready, and stop it at the end.

    Args:
        scratch: an empty or missing folder for backends and the log.
        ready: whether every model has to load; without it, a server with models that do not is given, too.

    Raises:
        NotReady: it is not ready in time.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    backends = _backends(scratch / "backends")
    http, grpc = free_ports(2)
    command = [
        str(_packages() / "pytriton/tritonserver/bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name=vitdeploy_{http}",
        *("--http-address=127.0.0.1", f"--http-port={http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        "--allow-metrics=false",
        f"--exit-on-error={str(ready).lower()}",
        f"--strict-readiness={str(ready).lower()}",
        *flags,
    ]
    triton, process = _started(
        command, Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", scratch / "log.txt", 0)
    )
    try:
        yield triton
    finally:
        _stop(process)


def _started(
    command: Sequence[str], triton: Triton, retries: int = 8
) -> tuple[Triton, subprocess.Popen[bytes]]:
    """A server that is ready.

    Its Python backend ends it where a lock is not had within ten seconds, as happens while a busy machine
    starts that backend's processes: then it is started again.
    """
    with triton.log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=_variables(), start_new_session=True
        )
    try:
        _wait(process, triton)
    except BaseException as error:
        _stop(process)
        busy = isinstance(error, NotReady) and "interprocess::lock_exception" in triton.logged()
        if not (busy and retries):
            raise
        return _started(command, triton, retries - 1)
    return replace(triton, pid=process.pid), process


def _variables() -> dict[str, str]:
    """Its own libraries and Python only."""
    packages = _packages()
    libraries = [packages / "nvidia_pytriton.libs", packages / "pytriton/tritonserver/lib"]
    return {
        "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": os.environ.get("HOME", "/"),
    }


def _wait(process: subprocess.Popen[bytes], triton: Triton) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotReady(f"the server ended with {process.returncode}:\n{triton.logged()[-6000:]}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{triton.url}/v2/health/ready", timeout=5).close()
            return
        time.sleep(0.2)
    raise NotReady(f"not ready after {_START_SECONDS:.0f} s:\n{triton.logged()[-6000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # its Python processes, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses at the moment."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]
