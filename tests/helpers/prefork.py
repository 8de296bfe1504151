"""Processes that need not import PyTorch first: forks of one that has.

``Prefork(environment)`` starts a process that imports what an export imports, lets PyTorch export something
small and then waits; each ``run`` forks it. Nothing but imported modules and what PyTorch keeps of any export
is shared, so a command sees what it sees in a process of its own.
As a program, this is that process: requests on its standard input, exit codes on its standard output.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Self

# Not ONNX Runtime, which starts a thread: a fork would wait for it at its end.
_MODULES = (
    *("numpy", "networkx", "onnx", "onnxscript", "PIL.Image", "rich.table", "torch", "typer"),
    *("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.decomposition"),
    *("torch.onnx._internal.exporter._core", "vitdeploy.cli.export", "vitdeploy.predictor"),
    *("vitdeploy.exporter.run", "vitdeploy.exporter.onnx"),
)


class Prefork:
    """The process that is forked; a context manager that ends it. It ends with the one that made it, too.

    Args:
        environment: of the commands, from the start: a library may read it when it is imported.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(
        self,
        *,
        cwd: Path,
        arguments: list[str] | None = None,
        program: str = "",
        merged: bool = False,
        changed: Mapping[str, str | None] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        """Run ``vitdeploy`` with these arguments, or a program.

        Args:
            merged: send errors where output goes.
            changed: variables of the environment that are other ones in this fork, or not there.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            err = out if merged else Path(folder, "err")
            request = {"arguments": arguments, "program": program, "cwd": str(cwd), "changed": dict(changed)}
            self._process.stdin.write(json.dumps({**request, "out": str(out), "err": str(err)}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the process that is forked is gone"
            said = (path.read_text(encoding="utf-8") for path in (out, err))
            return subprocess.CompletedProcess(arguments or ["-c", program], int(answer), *said)


def _import() -> None:
    for name in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        _export()
    gc.collect()
    gc.freeze()  # or each fork copies all of it when it collects
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "forks of a process with threads may hang"


def _export() -> None:
    """What only the first export of a process does: reading the sources of ONNX Script's functions."""
    import torch
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # no thread
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), io.BytesIO(), dynamo=True, verbose=False)


def _next_in_a_fork() -> dict[str, Any] | None:
    """The next request, in a fork of this process; None in this process, after the last one."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(request: dict[str, Any]) -> NoReturn:
    """Run what is asked for; the process ends with it.

    Like a fork of multiprocessing, without Python's own end, which takes apart (and so copies) every module.
    """
    code = 1
    try:
        code = _run(request)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(request: dict[str, Any]) -> int:
    nothing = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("out", "err"))
    for stream, opened in enumerate((nothing, out, err)):
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(request["cwd"])
    for name, value in request["changed"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if request["arguments"] is None:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["-c"]
        exec(compile(request["program"], "<string>", "exec"), main.__dict__)
        return 0
    from vitdeploy.cli import main as vitdeploy

    sys.argv = ["vitdeploy", *request["arguments"]]
    return vitdeploy()


if __name__ == "__main__":
    _import()
    if (asked := _next_in_a_fork()) is not None:
        _become(asked)
