"""Whole measurements with real processes: right, wrong, crashing, hanging and interrupted ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitdeploy
from tests.helpers.bundles import FEATURES, write_bundle
from tests.helpers.exports import Exported
from tests.helpers.quantised_bundles import write_quantised
from tests.helpers.script_cases import RIGHT, case, target
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.benchmark import cells
from vitdeploy.benchmark.backend_process import job_of
from vitdeploy.benchmark.cases import Choices, cases_of, open_targets
from vitdeploy.benchmark.cells import TimeLimits
from vitdeploy.benchmark.disturbances import ZERO, Counters
from vitdeploy.benchmark.ranking import choice_of, fastest, pick
from vitdeploy.benchmark.results import Results
from vitdeploy.benchmark.run import BenchPlan, run_plan
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, ParityError, UsageError
from vitdeploy.machine.processors import Share
from vitdeploy.progress import Progress, Stage
from vitdeploy.verification.parity import TOLERANCES

ORT = ["onnxruntime"]
QUIET = TimeLimits(load=60, run=20)


def quiet() -> Counters:
    return ZERO


def measure(cases: list[Any], batches: tuple[int, ...] = (1, 2), **plan: Any) -> Results:
    wanted = {"budget": 0.3, "limits": QUIET, **plan}
    return run_plan(BenchPlan(cases, batches, **wanted), counters=quiet)


@pytest.mark.slow
def test_cells(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    found = vitdeploy.bench(made.root, backends=ORT, batches=(1, 8), threads=1, budget=0.3)
    assert [(c.artifact, c.batch) for c in found.cells] == [
        (name, batch) for name in ("onnx-fp32", "onnx-fp16") for batch in (1, 8)
    ]
    for cell in found.cells:
        assert cell.valid
        assert cell.status == "ok"
        assert len(cell.samples_ms) % cell.round_samples == 0
        assert len(cell.samples_ms) >= 3
        assert cell.p50_ms is not None
        assert cell.images_per_s is not None
        assert min(cell.samples_ms) <= cell.p50_ms <= max(cell.samples_ms)
        assert cell.p50_ms <= (cell.p90_ms or 0) <= (cell.p99_ms or 0) <= max(cell.samples_ms)
        assert cell.mean_ms == pytest.approx(np.mean(cell.samples_ms), abs=1e-3)
        assert cell.images_per_s == pytest.approx(1000 * cell.batch / cell.p50_ms, rel=0.05)
        assert (cell.image_size, cell.threads, cell.provider) == ((8, 8), 1, "cpu")
        assert cell.startup is not None
        assert cell.startup.total_s >= cell.startup.load_s > 0
        assert (cell.peak_memory_bytes or 0) > 10**7
        assert cell.size_bytes == made.artifact(cell.artifact).size
    errors = [cell.parity.relative for cell in found.cells if cell.parity]
    assert (errors[0] or 1) < 1e-5 < (errors[2] or 0) < 1e-2
    assert found.environment.cpu.name
    assert found.metronome is None or found.metronome.p50_ms > 0.1
    assert found.environment.cpu.threads >= 1


@pytest.mark.slow
def test_of_several_outputs_the_worst_one_counts(tmp_path: Path) -> None:
    right = write_bundle(tmp_path / "right", features=FEATURES)
    wrong = write_bundle(tmp_path / "wrong", features=FEATURES * 1.001)
    for made, valid in ((right, True), (wrong, False)):
        (cell,) = vitdeploy.bench(made.root, backends=ORT, batches=(3,), threads=1, budget=0.1).cells
        assert cell.parity is not None
        assert cell.valid is valid
        assert all(failure.startswith("features: relative error") for failure in cell.parity.failures)
        assert cell.parity.output == "features" if not valid else cell.parity.output in ("logits", "features")


@pytest.mark.slow
def test_several_bundles_threads_and_callers(tmp_path: Path) -> None:
    one = write_bundle(tmp_path / "one")
    two = write_bundle(tmp_path / "two", kind="uint8", batch=BatchRange(4, 4, 4))
    found = vitdeploy.bench(
        [one, two.root], backends=ORT, threads=(1, 2), concurrency=(1, 2), batches=(4,), budget=0.3
    )
    assert len({subject.name for subject in found.subjects}) == 2
    assert [(c.subject, c.threads, c.concurrency) for c in found.cells] == [
        (subject.name, threads, callers)
        for subject in found.subjects
        for threads in (1, 2)
        for callers in (1, 2)
    ]
    assert all(cell.valid for cell in found.cells)
    for cell in found.cells:  # every caller's samples are kept
        assert cell.round_samples % cell.concurrency == 0


@pytest.mark.slow
def test_quantised_cells_with_threads_that_spin_or_not(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8",))
    found = vitdeploy.bench(
        made, backends=[*ORT, "openvino"], artifacts=["int8"], batches=(4,), spin=(False, True), budget=0.3
    )
    assert [(c.backend, c.spin, c.executes) for c in found.cells] == [
        ("onnxruntime", False, "int8+fp32"),
        ("onnxruntime", True, "int8+fp32"),
        ("openvino", False, "int8"),
    ]
    for cell in found.cells:
        assert cell.valid, cell.parity
        assert (cell.precision, cell.parity.tolerance) == ("int8", TOLERANCES["int8"].relative)
        assert 1e-3 < cell.parity.relative < 0.1  # of held-out images; of the drawn ones it is more
    assert len({found.key(cell) for cell in found.cells}) == 3
    assert found.settings.spin == (False, True)
    chosen = choice_of(found.cells[1], found, "latency", None)
    assert (chosen.artifact, chosen.spin) == ("onnx-int8", True)


@pytest.mark.slow
def test_batches_that_are_not_served(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "a", batch=BatchRange(1, 2, 4))
    found = vitdeploy.bench(made, backends=ORT, budget=0.1)
    assert [cell.batch for cell in found.cells] == [1]
    assert found.skipped[0].reason == "batch 8, 32: it serves 1 to 4"
    with pytest.raises(UsageError, match=r"--batch 64: nothing of .* serves it, only 1 to 4") as caught:
        vitdeploy.bench(made, backends=ORT, batches=(1, 64))
    assert caught.value.hint == "export the model again with --batch 1,8,64"


@pytest.mark.parametrize(
    "named, message",
    [
        ({"backends": ["onnxruntim"]}, "unknown backend 'onnxruntim'; did you mean 'onnxruntime'?"),
        ({"artifacts": ["fp61"]}, "has no artifact 'fp61'"),
        ({"backends": ORT, "threads": 0}, "threads must be at least 1"),
        ({"backends": ORT, "concurrency": 0}, "concurrency must be at least 1"),
    ],
)
def test_what_is_not_there(tmp_path: Path, named: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, BundleError), match=message.replace("?", r"\?")):
        vitdeploy.bench(write_bundle(tmp_path / "a"), budget=0.1, **named)


def test_nothing_to_prove_it_by(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="golden"):
        vitdeploy.bench(write_bundle(tmp_path / "b", golden={}), backends=ORT)
    twice = write_bundle(tmp_path / "c")
    with pytest.raises(UsageError, match="named twice"):
        vitdeploy.bench([twice, twice.root], backends=ORT)


@pytest.mark.slow
def test_a_fast_wrong_backend_is_never_picked(tmp_path: Path) -> None:
    """Wrong from the first run on, or only once it is timed; both are much faster than the right one."""
    aim = target(tmp_path)
    slow = "import time\ndef answer(pixels):\n    time.sleep(0.005)\n    return right(pixels)\n"
    cases = [
        case(aim, tmp_path, "right", slow),
        case(aim, tmp_path, "wrong", "def answer(pixels): return np.zeros((len(pixels), 5), np.float32)"),
        case(aim, tmp_path, "nan", "def answer(pixels): return right(pixels) * np.nan"),
        case(aim, tmp_path, "shape", "def answer(pixels): return right(pixels)[:, :4]"),
        case(aim, tmp_path, "later", "def answer(pixels): return right(pixels) * (1 if calls < 40 else 1.3)"),
    ]
    found = measure(cases)
    verdicts = {cell.backend: cell.valid for cell in found.cells if cell.batch == 2}
    assert verdicts == {"right": True, "wrong": False, "nan": False, "shape": False, "later": False}
    for goal in ("latency", "throughput"):
        assert pick(found, aim.name, goal).backend == "right"  # type: ignore[arg-type]
    best = fastest(found, aim.name, 1)
    assert best is not None
    assert best.backend == "right"
    wrong = {cell.backend: cell.parity for cell in found.cells if cell.parity and cell.batch == 1}
    assert "relative error" in wrong["wrong"].failures[0]
    assert "NaN" in wrong["nan"].failures[0]
    assert "timed runs give other outputs" in wrong["later"].failures[0]


DEAD = {
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed, out of memory most likely"),
    "exit": ("print('no licence', file=sys.stderr); os._exit(3)", "ended with 3; its last words: no licence"),
    "hang": ("time.sleep(60)", "gave no answer within 2 s"),
    "error": ("raise RuntimeError('no kernel for this')", "no kernel for this"),
    "memory": ("raise MemoryError('2 TB')", "out of memory: 2 TB"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DEAD)
def test_a_backend_that_dies_at_one_batch_size(tmp_path: Path, how: str) -> None:
    """Its cell says why; its other cells and the other backends go on."""
    act, message = DEAD[how]
    aim = target(tmp_path)
    body = f"def answer(pixels):\n    if len(pixels) == 4: {act}\n    return right(pixels)\n"
    cases = [case(aim, tmp_path, how, body), case(aim, tmp_path, "right", RIGHT)]
    found = measure(cases, (1, 4, 8), limits=TimeLimits(load=60, run=2))
    assert [(c.backend, c.batch, c.valid) for c in found.cells] == [
        (how, 1, True),
        (how, 4, False),
        (how, 8, True),
        ("right", 1, True),
        ("right", 4, True),
        ("right", 8, True),
    ]
    assert message in found.cells[1].reason
    assert found.cells[1].p50_ms is None
    assert not found.partial


@pytest.mark.slow
@pytest.mark.parametrize("sizes, alive", [("(4, 8)", [1]), ("(8,)", [1, 4])])
def test_batch_sizes_that_kill_leave_the_others_alone(tmp_path: Path, sizes: str, alive: list[int]) -> None:
    body = f"def answer(pixels):\n    if len(pixels) in {sizes}: os._exit(9)\n    return right(pixels)\n"
    found = measure([case(target(tmp_path), tmp_path, "picky", body)], (1, 4, 8))
    assert [cell.batch for cell in found.cells if cell.valid] == alive


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, message",
    [
        ("def load(job): raise ImportError('libfast.so is missing')", "libfast.so is missing"),
        ("def load(job): os._exit(1)", "its process ended with 1"),
        ("def load(job): time.sleep(60)", "gave no answer within 2 s"),
        ("def load(job):\n    os.write(1, b'hello\\n')\n    os._exit(0)", "its process ended with 0"),
    ],
)
def test_a_backend_that_does_not_come_up(tmp_path: Path, body: str, message: str) -> None:
    aim = target(tmp_path)
    cases = [case(aim, tmp_path, "broken", f"answer = right\n{body}"), case(aim, tmp_path, "right", RIGHT)]
    # Only the one that hangs has to be waited for; a busy machine starts the others in its own time.
    found = measure(cases, limits=TimeLimits(load=2 if "sleep" in body else 60, run=60))
    assert [cell.valid for cell in found.cells] == [False, False, True, True]
    assert all(message in cell.reason for cell in found.cells[:2])
    assert found.cells[0].startup is None


@pytest.mark.slow
def test_a_backend_that_dies_while_it_is_timed(tmp_path: Path) -> None:
    aim = target(tmp_path)
    mark = tmp_path / "mark"
    body = (
        f"def answer(pixels):\n    if calls == 60 and not os.path.exists({str(mark)!r}):\n"
        f"        open({str(mark)!r}, 'w').close()\n        os._exit(9)\n    return right(pixels)\n"
    )
    found = measure([case(aim, tmp_path, "tired", body), case(aim, tmp_path, "right", RIGHT)])
    assert sum(cell.status == "failed" for cell in found.cells) == 1, "the process was started again"
    assert all(cell.valid for cell in found.cells if cell.backend == "right")


class Interrupts:
    """Counters that someone presses Ctrl-C in."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> Counters:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return ZERO


@pytest.mark.slow
@pytest.mark.parametrize("after, measured", [(1, 0), (12, 4)])
def test_what_was_measured_before_ctrl_c_is_kept(tmp_path: Path, after: int, measured: int) -> None:
    aim = target(tmp_path)
    plan = BenchPlan(
        [case(aim, tmp_path, name, RIGHT) for name in ("a", "b")], (1, 2), budget=30, limits=QUIET
    )
    found = run_plan(plan, counters=Interrupts(after))
    assert found.partial
    assert sum(cell.status == "ok" for cell in found.cells) == measured
    assert all("interrupted" in cell.reason for cell in found.cells if cell.status == "failed")
    assert Results.model_validate(found.as_dict()) == found


@pytest.mark.slow
def test_rounds_are_interleaved_and_shuffled(tmp_path: Path) -> None:
    aim, log = target(tmp_path), tmp_path / "log"
    body = f"def answer(pixels):\n    open({str(log)!r}, 'a').write('NAME ')\n    return right(pixels)"
    cases = [case(aim, tmp_path, name, body.replace("NAME", name)) for name in "abc"]
    found = measure(cases, (1,), budget=1.0)
    turns = [name for name, before in _turns(log.read_text().split()) if name != before]
    tail = turns[-3 * (found.rounds - 1) :]
    assert found.rounds >= 3
    assert len(set(zip(*[iter(tail)] * 3, strict=False))) > 1 or found.rounds < 4, "in a new order each time"


def _turns(names: list[str]) -> list[tuple[str, str]]:
    return list(zip(names, ["", *names], strict=False))


@pytest.mark.slow
def test_accuracy_beside_the_reference(digits: Exported) -> None:
    found = vitdeploy.bench(
        digits.folder, backends=ORT, artifacts=("fp32",), batches=(8,), threads=1, budget=0.3
    )
    (cell,) = found.cells
    assert cell.accuracy is not None
    assert cell.accuracy.images == 450
    assert cell.accuracy.top1 == cell.accuracy.reference_top1 > 0.97
    assert cell.accuracy.top5 is not None
    low, high = cell.accuracy.top1_interval
    assert -0.02 < low <= 0 <= high < 0.02


class Details(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def updated(self, stage: Stage) -> None:
        self.said.append(stage.detail)


@pytest.mark.slow
def test_progress(tmp_path: Path) -> None:
    plan = BenchPlan([case(target(tmp_path), tmp_path, "a", RIGHT)], (1,), budget=0.3, limits=QUIET)
    progress = Details()
    run_plan(plan, progress=progress, counters=quiet)
    assert "warm up 1 of 2" in progress.said[0]
    assert any("round 2 of 2 cells" in text and "%" in text for text in progress.said)


@pytest.mark.slow
def test_control_work_runs_in_every_round(tmp_path: Path) -> None:
    found = measure([case(target(tmp_path), tmp_path, "a", RIGHT)], (1,), budget=0.5)
    assert found.metronome is not None
    assert found.metronome.p50_ms > 0.1
    assert len(found.metronome.samples_ms) == found.rounds * found.metronome.round_samples


@pytest.mark.slow
def test_a_measurement_without_control_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_CONTROL_LIMIT", 1e-3)
    found = measure([case(target(tmp_path), tmp_path, "a", RIGHT)], (1,))
    assert found.metronome is None
    assert found.cells[0].valid


def test_a_case_names_itself(tmp_path: Path) -> None:
    aim = target(tmp_path)
    made = case(aim, tmp_path, "a", RIGHT, threads=2, concurrency=3)
    assert made.name == "a onnx-fp32 2 threads 3 callers"
    assert dataclasses.replace(made, threads=None, concurrency=1).name == "a onnx-fp32"
    assert dataclasses.replace(made, threads=None, concurrency=1, spin=True).name == "a onnx-fp32 spinning"


HEAVY = {"torch", "openvino", "tensorrt", "tensorrt_rtx", "triton", "transformers", "onnx", "matplotlib"}
IMPORTS = """
import json, sys
from vitdeploy.benchmark.backend_process import open_sessions
from vitdeploy.cli import main

if sys.argv[1] == "bench":
    assert main(sys.argv[1:]) == 0
else:
    open_sessions(json.loads(sys.argv[1]))
print(json.dumps(list(sys.modules)), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["measuring", "measured"])
def test_a_benchmark_of_one_backend_imports_only_that_backend(tmp_path: Path, process: str) -> None:
    root = str(write_bundle(tmp_path / "b").root)
    job = job_of(Bundle.open(Path(root)), "onnxruntime", "onnx-fp32", Options(), concurrency=1)
    arguments = {
        "measuring": ["bench", root, "--backend", "onnxruntime", "--batch", "1", "--budget", "0.1s"],
        "measured": [json.dumps(job)],
    }[process]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    backends = {name for name in imported if name.startswith("vitdeploy.backends.")}
    runs = ("base", "onnxruntime", "onnxruntime_providers", "onnxruntime_weights")
    others = backends - {f"vitdeploy.backends.{name}" for name in runs}
    assert others == set()
    assert imported & HEAVY == set()
    assert ("onnxruntime" in imported) == (process == "measured")


def test_shares_stand_in_the_place_of_threads_and_callers(tmp_path: Path) -> None:
    """Every backend of the CPU is measured in each; a GPU has one session."""
    (target,) = open_targets([write_bundle(tmp_path / "b")])
    shares = (Share(1, None), Share(2, 1), Share(2, 2))
    choices = Choices(backends=ORT, shares=shares, threads=(7,), concurrency=(9,))
    cases, _ = cases_of(target, choices)
    assert [(case.concurrency, case.threads) for case in cases] == list(shares)
    assert choices.ways(get_backend("tensorrt")) == [(None, 1)]
    assert dataclasses.replace(choices, device="cuda").ways(get_backend("torch")) == [(None, 1)]
