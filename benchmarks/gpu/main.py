"""Everything that is measured on a GPU, in steps with a time limit each; most valuable first.

A step is a process of its own: if one hangs or fails, the others still run, and what it had recorded
stays. Without a GPU it exits with status 3; with --smoke it runs a tiny model on the CPU instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "kernels" / "vitdeploy_kernels" / "configs"


@dataclass(frozen=True)
class Step:
    """A command, and the seconds it may take; a script that is told its seconds gets most of them."""

    name: str
    seconds: float
    command: tuple[str, ...]


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *map(str, arguments))


def steps(path: Path, tables: Path, gpu: str) -> Iterator[Step]:
    """The steps in their order, each made when those before it have run; 570 seconds together."""
    from vitdeploy_kernels.config import table_name

    flags = ("--record", path)
    yield Step("environment", 40, script("environment.py", *flags))
    yield Step("tests", 80, test_command())
    defaults = ("--label", "default", "--seconds", 125, "--table", CONFIGS / default_table())
    yield Step("end to end", 140, script("end_to_end.py", *flags, *defaults))
    tune = (str(ROOT / "kernels" / "tune.py"), "--budget", "140", "--output", str(tables))
    yield Step("tune", 160, (sys.executable, *tune))
    tuned = tables / table_name(gpu)
    table = ("--table", tuned) if tuned.exists() else ()
    if table:
        labelled = ("--label", "tuned", "--seconds", 85, *table)
        yield Step("end to end, tuned", 100, script("end_to_end.py", *flags, *labelled))
    yield Step("kernel by kernel", 50, script("kernel_by_kernel.py", *flags, "--seconds", 40, *table))


def smoke_steps(path: Path) -> Iterator[Step]:
    """What can run without a GPU; tests and tuning have tests of their own."""
    flags = ("--record", path, "--smoke")
    yield Step("environment", 60, script("environment.py", *flags))
    yield Step("end to end", 240, script("end_to_end.py", *flags, "--label", "default", "--seconds", 220))
    yield Step("kernel by kernel", 120, script("kernel_by_kernel.py", *flags, "--seconds", 100))


def test_command() -> tuple[str, ...]:
    """pytest of the kernels' GPU tests without the project's settings, whose plugins may not be here."""
    options = ("-q", "--maxfail=10", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib")
    parallel = ("-n", "8") if find_spec("xdist") else ()
    if not (find_spec("pytest") and find_spec("hypothesis")):
        return (sys.executable, "-c", "raise SystemExit('pytest or hypothesis is not installed')")
    tests = ROOT / "tests"
    places = ("-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(tests))
    paths = ("-o", f"pythonpath={tests} {ROOT / 'benchmarks'} {ROOT / 'kernels'}")
    chosen = [tests / "kernels"]
    if all(map(find_spec, ("onnx", "onnxruntime", "pydantic", "safetensors"))):  # what a bundle needs
        chosen.append(tests / "backends" / "test_triton.py")
    return (sys.executable, "-m", "pytest", *options, *parallel, *places, *paths, *map(str, chosen))


def default_table() -> str:
    """The file of the architecture's defaults, which a table of this very GPU would hide."""
    import torch

    from vitdeploy_kernels.config import shipped_table

    return f"{shipped_table(torch.cuda.get_device_capability()).gpu}.json"


def run(step: Step, environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a step within its time; its output goes to the terminal and into a log."""
    start = time.monotonic()
    print(f"== {step.name} (at most {step.seconds:.0f} s)", flush=True)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"== {step.name}\n")
        out.flush()
        place = out.tell()
        child = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            status = {0: "done"}.get(child.wait(step.seconds), f"exit status {child.returncode}")
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(place)
        lines = text.read().splitlines()
    print("\n".join(lines[-25:]), flush=True)
    seconds = round(time.monotonic() - start, 1)
    print(f"== {step.name}: {status}, {seconds} s", flush=True)
    return {"step": step.name, "status": status, "seconds": seconds, "last_lines": lines[-5:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tables", type=Path, default=CONFIGS, help="where the tuned table is written")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, in the interpreter")
    given = parser.parse_args()
    environment = dict(os.environ)
    if given.smoke:
        gpu = "smoke"
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                "on_gpu: needs an NVIDIA GPU, and PyTorch sees none (--smoke runs without)", file=sys.stderr
            )
            return 3
        gpu = torch.cuda.get_device_name()
    given.output.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in gpu)
    path, log = given.output / f"{name}.json", given.output / f"{name}.log"
    path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    ran: list[dict[str, Any]] = []
    path = path.resolve()
    chosen = smoke_steps(path) if given.smoke else steps(path, given.tables.resolve(), gpu)
    for step in chosen:
        ran.append(run(step, environment, log))
        record.update(path, steps=ran)
    print(f"the record is {path}")
    return 0 if all(step["status"] == "done" for step in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
