"""benchmarks/on_gpu.sh: rehearsed end to end without a GPU, and its parts one by one.

The first run on a GPU may be the only one for long: nothing of ours may break it, or lose what it measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.environments import environment_of
from tests.helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
SCRIPTS = ROOT / "benchmarks" / "gpu"
MACHINE = (
    *("torch", "triton", "typer", "rich", "safetensors", "onnx", "onnxruntime", "timm", "transformers"),
    "pytest",
)
"""What a rented machine with a GPU has."""
STEPS = (
    *("environment", "warm", "end to end", "kernel by kernel", "kernels before", "counters"),
    *("tests of the kernels", "ahead of time", "tests of the backend", "tune", "end to end, tuned"),
    *("compiled, default, batch 1", "compiled, max-autotune, batch 1"),
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with that machine's packages; there is no pydantic among them."""
    without = ("pydantic", "pydantic-core", "hypothesis")
    python = environment_of(MACHINE, tmp_path_factory.mktemp("machine"), without)
    there = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"
    asked = ("torch", "triton", "pytest", "pydantic", "hypothesis", "vitdeploy")
    done = subprocess.run([python, "-Pc", there, *asked], capture_output=True, text=True, env={}, check=True)
    assert done.stdout.split() == ["torch", "triton", "pytest"]
    return python


def on_gpu(*arguments: object, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_rehearsal_runs_every_step_without_pydantic(bare: Path, tmp_path: Path) -> None:
    """As its own documentation calls it, with the record and the tuned table in one folder."""
    done = on_gpu("--rehearse", "--output", tmp_path, "--tables", tmp_path, python=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = ("-kernels.json", "-kernels.jsonl", "-kernels.log", ".json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"rehearsal{end}" for end in ends)
    record = json.loads((tmp_path / "rehearsal-kernels.json").read_text())
    assert record["stand_in"] is True
    status = {step["name"]: step["status"] for step in record["step"]}
    assert tuple(status) == STEPS
    assert status.pop("tests of the backend") == "not run: not installed: pydantic, PIL, hypothesis"
    assert set(status.values()) == {"done"}

    assert record["environment"][0]["versions"]["torch"]
    assert {"matmul_flops", "copy_bytes_per_s", "l2_bytes_per_s"} <= record["ceilings"][0].keys()
    assert record["gap"][0]["launches"] > 1
    assert record["warm"][0]["unfinished"] == 0
    cells = {(cell["label"], cell["batch"]): cell["contestants"] for cell in record["cell"]}
    assert set(cells) == {("default", 2), ("tuned", 2)}
    for contestants in cells.values():
        names = ["vitdeploy", "sdpa, CUDA graph", "sdpa, eager", "vitdeploy, from the host"]
        assert list(contestants) == names
        assert all(facts["relative_error"] < 5e-3 and facts["median_ms"] for facts in contestants.values())
    rows = [row for row in record["kernel"] if row["label"] == "now"]
    every = {"layernorm_linear", "linear_residual", "patch_embed", "head_linear"}
    assert {row["kernel"] for row in rows} == every | {"attention", "absorbed_attention", "add_layernorm"}
    assert all(row["wrong"] is None and row["floor_us"] > 0 and row["predicted_us"] > 0 for row in rows)
    routes = ["fused", "as the tables' cublas", "product alone", "product, beta = 1"]
    assert all(list(row["routes"]) == routes for row in rows if row["kernel"].startswith("l"))
    before = {row["kernel"] for row in record["kernel"] if row["label"] == "before"}
    assert before == {"layernorm_linear", "linear_residual"}
    assert len(record["counters"]) == 4
    (tests,) = record["tests"]
    assert tests["finished"]
    assert tests["passed"] > 5
    assert "failure" not in record
    (ahead,) = record["ahead_of_time"]
    assert ahead["cubins"] == 1
    assert all(facts["relative_error"] < 5e-3 for facts in ahead["contestants"].values())
    assert len(record["tuned"]) > 3
    assert all(found["route"] and len(found["microseconds"]) > 1 for found in record["tuned"])
    assert [found["mode"] for found in record["compiled"]] == ["default", "max-autotune"]
    assert all("vitdeploy" in found["contestants"] for found in record["compiled"])


@pytest.mark.slow
def test_a_step_that_is_killed_keeps_what_it_had_measured(bare: Path, tmp_path: Path) -> None:
    """And costs the steps behind it nothing."""
    chosen = ("--steps", "kernel by kernel", "counters")
    killed = ("--interrupt", "kernel by kernel")
    given = ("--rehearse", "--output", tmp_path, "--tables", tmp_path, *chosen, *killed)
    done = on_gpu(*given, python=bare)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "rehearsal-kernels.json").read_text())
    ended = {step["name"]: step["status"] for step in record["step"]}
    assert ended == {"environment": "done", "kernel by kernel": "out of time", "counters": "done"}
    assert 1 <= len(record["kernel"]) < 15
    assert all(row["median_us"] for row in (kernel["routes"]["fused"] for kernel in record["kernel"]))
    assert "KeyboardInterrupt" in (tmp_path / "rehearsal-kernels.log").read_text()
    assert len(record["counters"]) == 4


@pytest.mark.slow
def test_bad_calls_are_one_clear_line_each(tmp_path: Path) -> None:
    done = on_gpu("--output", tmp_path)
    assert done.returncode == 3
    assert done.stderr == "on_gpu: needs an NVIDIA GPU, and PyTorch sees none (--rehearse runs without)\n"
    done = on_gpu("--rehearse", "--output", tmp_path, "--steps", "warm", "tuning")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "on_gpu: there is no step 'tuning'; there are environment, warm, end to end,"
    )
    assert not list(tmp_path.iterdir())


# --- its parts, in this process -----------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules that need no PyTorch; their names are theirs only as long as a test runs."""
    before = {*sys.modules}
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import failures
    import main
    import record

    yield SimpleNamespace(main=main, record=record, failures=failures)
    for name in {*sys.modules} - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == SCRIPTS:
            del sys.modules[name]


def test_record_and_table_of_one_folder_are_different_files(parts: Any, tmp_path: Path) -> None:
    places = parts.main.Places.of("NVIDIA H200", tmp_path, tmp_path)
    assert places.table == tmp_path / "NVIDIA_H200.json"
    assert places.document == tmp_path / "NVIDIA_H200-kernels.json"
    places.document.symlink_to(places.table)
    with pytest.raises(ValueError, match=r"H200-kernels\.json is two of the files that are written"):
        parts.main.Places.of("NVIDIA H200", tmp_path, tmp_path)


def test_the_steps_fit_ten_minutes_in_their_order(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.main, "default_table", lambda: "sm_90.json")
    places = parts.main.Places.of("NVIDIA H200", tmp_path, tmp_path)
    steps = list(parts.main.steps(places, None, rehearse=False))
    assert sum(step.seconds for step in steps) <= parts.main.TOTAL <= 600 - parts.main.GRACE
    names = [step.name for step in steps]
    assert tuple(names[:11]) == STEPS[:11]
    missing = {step.name: step.missing for step in steps if step.missing}
    assert missing == {
        "kernels before": "--before names no earlier tree",
        "end to end, tuned": "nothing was tuned",
    }
    # A process for each compiled contestant, which takes nothing with it.
    compiled = [step.command for step in steps if step.name.startswith("compiled")]
    assert len({command[command.index("--mode") :][:4] for command in compiled}) == len(compiled) == 4
    (tests,) = (step.command for step in steps if step.name == "tests of the kernels")
    wanted = ["-rfE", "--tb=short", "-p", "failures", "-n", "16", "gpu"]
    assert [word for word in wanted if word not in tests] == []
    assert str(ROOT / "tests/kernels/test_package.py") in tests


def test_an_earlier_tree_is_timed_with_its_own_kernels(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.main, "default_table", lambda: "sm_90.json")
    places = parts.main.Places.of("NVIDIA H200", tmp_path, tmp_path)

    def before(tree: Path) -> Any:
        found = parts.main.steps(places, tree, rehearse=False)
        return next(step for step in found if step.name == "kernels before")

    assert before(tmp_path).missing == f"{tmp_path}/kernels has no kernels"
    (tmp_path / "kernels" / "vitdeploy_kernels").mkdir(parents=True)
    step = before(tmp_path)
    assert (step.missing, step.kernels) == (None, tmp_path / "kernels")


def test_missing_packages_of_a_test_are_named(parts: Any, tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text("import json, nothing_here.part\nfrom pytest import mark\nfrom tests.helpers import x\n")
    assert parts.main.missing_imports(file) == ["nothing_here"]


def test_a_line_is_whole_or_not_there(parts: Any, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    recorder = parts.record.Recorder(path, stand_in=True)
    recorder.add("kernel", median_us=1.5)
    recorder.add("cell", batch=1)
    with path.open("a") as file:
        file.write('{"kind": "kernel", "median_us"')  # killed here
    lines = parts.record.lines(path)
    assert [line["kind"] for line in lines] == ["kernel", "cell"]
    document = parts.record.document(lines)
    assert document == {
        "schema_version": 2,
        "stand_in": True,
        "kernel": [{"step": None, "median_us": 1.5}],
        "cell": [{"step": None, "batch": 1}],
    }
    assert parts.record.last(path, "cell")["batch"] == 1
    with pytest.raises(LookupError, match="no line of the kind 'gap'"):
        parts.record.last(path, "gap")


PATIENT = "import signal, time; {}; print('ready', flush=True); time.sleep(600)"
CASES = {
    "interrupted": ("pass", signal.SIGINT),
    "deaf": ("signal.signal(signal.SIGINT, signal.SIG_IGN)", signal.SIGKILL),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_interrupted_before_it_is_killed(
    parts: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, expected = CASES[case]
    monkeypatch.setattr(parts.main, "GRACE", 60.0 if case == "interrupted" else 0.1)
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", PATIENT.format(how)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert not parts.main.wait(child, 0.0)
    assert child.returncode == -expected
    child.stdout.close()


def test_processes_that_a_step_leaves_behind_end_with_it(parts: Any) -> None:
    """They hold the GPU's memory, and this pipe, which ends when the last of them has ended."""
    sleep = "[sys.executable, '-S', '-c', 'import time; time.sleep(600)']"
    code = f"import subprocess, sys; subprocess.Popen({sleep})"
    command = [sys.executable, "-S", "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert parts.main.wait(child, 600.0)
    assert child.stdout is not None
    assert child.stdout.read() == b""
    child.stdout.close()


FAILING = """
import time
import pytest

def test_good():
    pass

def test_bad():
    assert 1 + 1 == 3, "of all things"

@pytest.fixture
def broken():
    raise RuntimeError("no memory")

def test_error(broken):
    pass

def test_that_hangs():
    time.sleep(600)
"""


def test_failures_are_in_a_file_before_the_time_is_up(parts: Any, tmp_path: Path) -> None:
    """A run of tests that hangs and is interrupted has said all that it knew."""
    (tmp_path / "test_some.py").write_text(FAILING)
    record, text = tmp_path / "record.jsonl", tmp_path / "failures.txt"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    environment |= {"ON_GPU_RECORD": str(record), "ON_GPU_FAILURES": str(text)}
    options = ("-q", "-rfE", "--tb=short", "-p", "failures", "-p", "no:cacheprovider", "-c", os.devnull)
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(parts.record.lines(record)) < 2:
        assert child.poll() is None
        time.sleep(0.05)
    written = text.read_text()
    assert "of all things" in written
    assert "no memory" in written
    assert not parts.main.wait(child, 0.0)
    assert child.stdout is not None
    said = child.stdout.read()
    child.stdout.close()
    assert "test_some.py::test_bad" in said  # the summary, which only an interruption leaves time for
    kinds = [(line["kind"], line.get("message")) for line in parts.record.lines(record)]
    assert [kind for kind, _ in kinds] == ["failure", "failure", "tests"]
    assert "of all things" in str(kinds[0][1])
    last = parts.record.lines(record)[-1]
    assert (last["finished"], last["passed"], last["failed"], last["errors"]) == (False, 1, 1, 1)


NCU = """==PROF== Connected to process 4711
==PROF== Profiling "layernorm_linear_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","other"
"","","","us","register/thread",""
"0","4711","layernorm_linear_kernel","1,155.25","236","x"
"""


def test_counters_are_read_from_the_profiler_s_table(monkeypatch: pytest.MonkeyPatch, parts: Any) -> None:
    import counters

    assert counters.counters_of(NCU) == {
        "gpu__time_duration.sum (us)": 1155.25,
        "launch__registers_per_thread (register/thread)": 236.0,
    }
    with pytest.raises(ValueError, match="No kernels were profiled"):
        counters.counters_of("==WARNING== No kernels were profiled.\n")
    command = counters.command("ncu", 2, Path("record.jsonl"))
    assert command[command.index("--clock-control") + 1] == "none"


def test_calls_are_timed_in_turns_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch, parts: Any) -> None:
    import stopwatch

    order: list[tuple[str, int]] = []

    def stretch(call: Any, count: int) -> float:
        order.append((call(), count))
        return {"a": 1.0, "b": 4.0}[call()]

    monkeypatch.setattr(stopwatch, "stretch", stretch)
    samples = stopwatch.in_turns({"a": lambda: "a", "b": lambda: "b"}, rounds=3, least_ms=10.0)
    assert samples == {"a": [1.0] * 3, "b": [4.0] * 3}
    assert order == [("a", 1), ("b", 1), *[("a", 10), ("b", 2), ("b", 2), ("a", 10), ("a", 10), ("b", 2)]]


@pytest.mark.slow
def test_the_script_of_the_engines_records_what_each_command_said(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT.with_name("on_gpu_tensorrt.sh")), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "smoke-tensorrt.json").read_text())
    codes = {step["name"]: step["exit_code"] for step in record["steps"]}
    assert codes == {
        "doctor": 0,
        "does TensorRT for RTX run here": 4,
        "digits: ONNX": 0,
        "digits, tensorrt-rtx, as it comes: build": 0,
        "digits, tensorrt-rtx, as it comes: verify": 3,
        "digits, tensorrt-rtx, two profiles: build": 0,
        "digits, tensorrt-rtx, two profiles: verify": 3,
        "digits, tensorrt-rtx, hardware compatible: build": 2,
    }
    steps = {step["name"]: step for step in record["steps"]}
    assert steps["does TensorRT for RTX run here"]["document"]["built"] is False
    built = steps["digits, tensorrt-rtx, as it comes: build"]["document"]
    assert built["artifacts"][1]["name"] == "tensorrt-rtx-fp16-sm_89"
    assert (
        "no hardware compatibility level"
        in steps["digits, tensorrt-rtx, hardware compatible: build"]["said"][0]
    )
    refused = subprocess.run(command[:1], capture_output=True, text=True, check=False, env=environment)
    assert (refused.returncode, "needs an NVIDIA GPU" in refused.stderr) == (3, True)
