"""Everything that is measured on a GPU in ten minutes, in steps with a time limit each; most valuable first.

A step is a process of its own and appends a line to the record for each result. One that fails or hangs costs
the others nothing, and what it had measured stays. Without a GPU it exits with status 3; --rehearse runs
every step on the CPU, with a tiny model and times that nobody measured.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
CONFIGS = KERNELS / "vitdeploy_kernels" / "configs"
TOTAL = 585.0
"""Seconds after which no step is begun."""
GRACE = 8.0
"""Seconds from the interruption of a step to its end by force."""
REHEARSAL = "rehearsal"
UNHURRIED = 900.0
"""Seconds of a step in a rehearsal, which shows what happens and not how long it takes."""
BACKEND = ("pydantic", "onnx", "onnxruntime", "safetensors", "PIL", "hypothesis")
"""What the tests of the backend import, beside what those of the kernels do."""


@dataclass(frozen=True)
class Places:
    """Where everything goes."""

    record: Path
    document: Path
    log: Path
    failures: Path
    table: Path

    @classmethod
    def of(cls, gpu: str, output: Path, tables: Path) -> Places:
        """The files of a GPU; the tuned table has the name under which the kernels look for it.

        Raises:
            ValueError: two of them are the same file.
        """
        from vitdeploy_kernels.config import table_name

        name = "".join(c if c.isalnum() else "_" for c in gpu)
        ends = ("-kernels.jsonl", "-kernels.json", "-kernels.log", "-kernels-failures.txt")
        paths = [*(output / f"{name}{end}" for end in ends), tables / table_name(gpu)]
        resolved = [path.resolve() for path in paths]
        for path in paths:
            if resolved.count(path.resolve()) > 1:
                raise ValueError(f"{path} is two of the files that are written")
        return cls(*resolved)


@dataclass(frozen=True)
class Step:
    """A command, and the seconds it may take.

    Attributes:
        name: for people, and of the lines that it appends to the record.
        seconds: after which it is interrupted; a script is told to begin nothing shortly before.
        command: the process.
        missing: why it cannot run here; None if it can.
        note: what of it cannot, for people.
        kernels: the folder that has the package of kernels, an earlier one to compare with.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    missing: str | None = None
    note: str | None = None
    kernels: Path = KERNELS


@dataclass
class Run:
    """One run: its files, what is asked of it, and how the steps so far have ended."""

    places: Places
    rehearse: bool
    interrupt: str | None
    environment: dict[str, str]
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def do(self, step: Step, seconds: float) -> None:
        """Run a step within these seconds, and note how it ended."""
        print(
            f"== {step.name} (at most {seconds:.0f} s)" + (f", {step.note}" if step.note else ""), flush=True
        )
        start = time.monotonic()
        lines: list[str] = []
        if step.missing is not None:
            status = f"not run: {step.missing}"
        else:
            status, lines = self._process(step, seconds)
        print("\n".join(lines[-25:]), flush=True)
        took = round(time.monotonic() - start, 1)
        print(f"== {step.name}: {status}, {took} s", flush=True)
        outcome = {"name": step.name, "status": status, "note": step.note, "seconds": took}
        outcome["last_lines"] = lines[-5:]
        self.outcomes.append(outcome)
        record.Recorder(self.places.record, self.rehearse).add("step", **outcome)
        record.write(self.places.document, record.document(record.lines(self.places.record)))

    def _process(self, step: Step, seconds: float) -> tuple[str, list[str]]:
        """How a step ended, and its output, which goes to the log as it comes."""
        environment = {**self.environment, record.STEP: step.name}
        paths = (step.kernels, ROOT, HERE, environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, paths)))
        log = self.places.log
        with log.open("a", encoding="utf-8") as out:
            out.write(f"== {step.name}\n")
            out.flush()
            place = out.tell()
            child = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
            ended = wait(child, seconds, lambda: self._is_to_be_interrupted(step))
        with log.open(encoding="utf-8", errors="replace") as text:
            text.seek(place)
            lines = text.read().splitlines()
        if not ended:
            return "out of time", lines
        return ("done" if child.returncode == 0 else f"exit status {child.returncode}"), lines

    def _is_to_be_interrupted(self, step: Step) -> bool:
        if step.name != self.interrupt:
            return False
        return any(line["step"] == step.name for line in record.lines(self.places.record))


def wait(child: subprocess.Popen[Any], seconds: float, interrupt: Callable[[], bool] = lambda: False) -> bool:
    """Wait for a process group's leader; whether it ended by itself.

    When the time is up, or there is another reason, it is interrupted as by Ctrl-C, so that it says what it
    was at (pytest: which tests had failed), and killed a little later. What it leaves behind is killed, too.
    """
    end = time.monotonic() + seconds
    ended = False
    while not ended and time.monotonic() < end and not interrupt():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
            ended = True
    if not ended:
        os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return ended


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *map(str, arguments))


def steps(places: Places, before: Path | None, rehearse: bool) -> Iterator[Step]:
    """The steps in their order, each made when those before it have run; 580 seconds together."""
    default = () if rehearse else ("--table", CONFIGS / default_table())

    def part(name: str, seconds: float, file: str, *arguments: object, **more: Any) -> Step:
        seconds = UNHURRIED if rehearse else seconds
        told = ("--record", places.record, "--seconds", seconds - 3, *("--rehearse",) * rehearse)
        return Step(name, seconds, script(file, *told, *arguments), **more)

    yield part("environment", 20, "environment.py")
    yield part("warm", 25, "warm.py", *default)
    yield part("end to end", 30, "end_to_end.py", "--label", "default", *default)
    yield part("kernel by kernel", 50, "kernel_by_kernel.py", *default)
    earlier = (before or ROOT) / "kernels"
    missing = None if before or rehearse else "--before names no earlier tree"
    if missing is None and not (earlier / "vitdeploy_kernels").is_dir():
        missing = f"{earlier} has no kernels"
    changed = ("--label", "before", "--batches", 64, "--kernels", "layernorm_linear", "linear_residual")
    yield part("kernels before", 30, "kernel_by_kernel.py", *changed, missing=missing, kernels=earlier)
    yield part("counters", 40, "counters.py")
    yield tests("tests of the kernels", 50, ROOT / "tests" / "kernels", rehearse)
    yield part("ahead of time", 30, "ahead_of_time.py")
    yield tests("tests of the backend", 20, ROOT / "tests" / "backends" / "test_triton.py", rehearse)
    yield part("tune", 110, "tuning.py", "--tables", places.table.parent)
    tuned = places.table.exists()
    table = ("--table", places.table) if tuned else default
    missing = None if tuned else "nothing was tuned"
    yield part("end to end, tuned", 25, "end_to_end.py", "--label", "tuned", *table, missing=missing)
    contestants = [("default", 64, 30), ("default", 1, 25), ("max-autotune", 64, 55), ("max-autotune", 1, 40)]
    for mode, batch, seconds in contestants[1::2] if rehearse else contestants:
        arguments = ("--mode", mode, "--batch", batch, *table)
        yield part(f"compiled, {mode}, batch {batch}", seconds, "compiled.py", *arguments)


def tests(name: str, seconds: float, place: Path, rehearse: bool) -> Step:
    """pytest of what is marked gpu, without the project's settings, whose plugins may not be here.

    Files that import what is not here are left out and named. A rehearsal runs a few quick tests instead.
    """
    command = (
        *(sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "failures"),
        *("-p", "no:cacheprovider", "-p", "no:logging", "--import-mode=importlib", "-W", "ignore"),
        *("-c", os.devnull, "--rootdir", str(ROOT), "-m", "not gpu" if rehearse else "gpu"),
        *("-o", f"pythonpath={HERE} {ROOT / 'benchmarks'} {ROOT}"),
    )
    whole = place.is_dir()
    files = sorted(place.glob("test_*.py")) if whole else [place]
    seconds = UNHURRIED if rehearse else seconds
    if not find_spec("pytest"):
        return Step(name, seconds, (), missing="not installed: pytest")
    if whole:  # the settings of all tests import more than the kernels' tests need
        command += ("--confcutdir", str(place))
    elif lacking := [each for each in BACKEND if not find_spec(each)]:
        return Step(name, seconds, (), missing=f"not installed: {', '.join(lacking)}")
    if rehearse:
        files = [place / "test_graphs.py"] if whole else files
        command += () if whole else ("-k", "missing_library or old_gpu")
    elif find_spec("xdist"):
        command += ("-n", "16", "--dist", "worksteal")
    needed = {file: missing_imports(file) for file in files}
    runnable = [str(file) for file, names in needed.items() if not names]
    if not runnable:
        lacking = sorted({each for names in needed.values() for each in names})
        return Step(name, seconds, (), missing=f"not installed: {', '.join(lacking)}")
    left_out = [f"without {file.name} ({', '.join(names)})" for file, names in needed.items() if names]
    return Step(name, seconds, (*command, *runnable), note=", ".join(left_out) or None)


def missing_imports(file: Path) -> list[str]:
    """Packages that a file imports at its head and that are not here."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    own = {"tests", "benchmarks", "vitdeploy", "vitdeploy_kernels", "__future__"}
    return sorted(name for name in found - own if find_spec(name) is None)


def default_table() -> str:
    """The file of the architecture's defaults, which a table of this very GPU would hide."""
    import torch

    from vitdeploy_kernels.config import shipped_table

    return f"{shipped_table(torch.cuda.get_device_capability()).gpu}.json"


def this_gpu() -> str | None:
    """Its name; None where PyTorch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tables", type=Path, default=CONFIGS, help="where the tuned table is written")
    parser.add_argument(
        "--before", type=Path, help="an earlier revision's tree, whose kernels are timed, too"
    )
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="these only, by their names")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: a tiny model, made-up times")
    parser.add_argument("--interrupt", metavar="STEP", help="in a rehearsal: end it at its first result")
    options = parser.parse_args(given)
    if options.interrupt and not options.rehearse:
        parser.error("--interrupt is for a rehearsal")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    environment = dict(os.environ)
    if options.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "ON_GPU_REHEARSAL": "1"}
    gpu = REHEARSAL if options.rehearse else this_gpu()
    if gpu is None:
        print("on_gpu: needs an NVIDIA GPU, and PyTorch sees none (--rehearse runs without)", file=sys.stderr)
        return 3
    try:
        places = Places.of(gpu, options.output, options.tables)
    except ValueError as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return 2
    known = [step.name for step in steps(places, options.before, options.rehearse)]
    for name in {*(options.steps or ()), *filter(None, [options.interrupt])} - {*known}:
        print(f"on_gpu: there is no step {name!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for folder in (options.output, options.tables):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (places.record, places.document, places.log, places.failures):
        path.unlink(missing_ok=True)
    environment |= {"ON_GPU_RECORD": str(places.record), "ON_GPU_FAILURES": str(places.failures)}
    run = Run(places, options.rehearse, options.interrupt, environment)
    start = time.monotonic()
    for step in steps(places, options.before, options.rehearse):
        if options.steps and step.name not in ("environment", *options.steps):
            continue
        left = UNHURRIED if options.rehearse else TOTAL - (time.monotonic() - start)
        if left < 5:
            run.do(Step(step.name, 0, (), missing="the time is up"), 0)
        else:
            run.do(step, min(step.seconds, left))
    print(f"the record is {places.document}")
    fine = ("done", "not run: not installed", "not run: --before", "not run: nothing was tuned")
    good = all(each["status"].startswith(fine) for each in run.outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
