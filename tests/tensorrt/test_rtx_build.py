"""Engines that the real TensorRT for RTX builds, on a machine that needs no GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto

from tests.helpers.onnx_graphs import WIDTH, foreign, in_bfloat16, quantised
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange, Precision
from vitdeploy.errors import ExportError, PrecisionError
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.engine_file import read_header
from vitdeploy.tensorrt.records import BuildJob, BuildResult

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
INPUT = TensorSpec(name="x", dtype="float16", shape=("N", WIDTH))


def quiet(phase: str, fraction: float) -> None:
    assert phase
    assert 0 <= fraction <= 1


def build(folder: Path, model: onnx.ModelProto, *targets: str, precision: Precision = "fp16") -> BuildResult:
    """One engine of a small graph for each target."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return build_engines(job(path, *targets, precision=precision), quiet)


def job(path: Path, *targets: str, **fields: Any) -> BuildJob:
    return BuildJob(
        **{
            "flavour": "tensorrt-rtx",
            "onnx": str(path),
            "input": INPUT,
            "precision": "fp16",
            "islands": (),
            "profiles": (BatchRange(1, 8, 64),),
            "targets": tuple(tuple(target.split("+")) for target in targets),
            "outputs": tuple(str(path.with_name(f"{target}.plan")) for target in targets),
            **fields,
        }
    )


class Log(tensorrt_rtx.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity.name == "ERROR":
            self.errors.append(text)


def said_of(data: bytes) -> str:
    """What TensorRT's own runtime says when it is given an engine here, where no GPU is."""
    log = Log()
    assert tensorrt_rtx.Runtime(log).deserialize_cuda_engine(data) is None
    return log.errors[0]


@pytest.mark.slow
def test_quantised_products_are_proven_by_what_feeds_them(tmp_path: Path) -> None:
    for element_type, dtype in ((TensorProto.INT8, "int8"), (TensorProto.FLOAT8E4M3FN, "float8e4m3fn")):
        result = build(tmp_path / dtype, quantised(element_type), "sm_89", "sm_120")
        assert [(op.name, op.dtype) for op in result.proof.ops] == [("fc/MatMul", dtype)]
        assert result.proof.ok


@pytest.mark.slow
@pytest.mark.parametrize("kind, target, lacking", [("fp8", "sm_80", "fp8"), ("bf16", "sm_75", "b16")])
def test_a_type_that_the_gpu_lacks_is_an_error_that_names_it(
    tmp_path: Path, kind: str, target: str, lacking: str
) -> None:
    model = in_bfloat16() if kind == "bf16" else quantised(TensorProto.FLOAT8E4M3FN)
    said = rf"no engine for {target}: .*target\(s\) {target.replace('_', '')}.*{lacking}"
    with pytest.raises(ExportError, match=said):
        build(tmp_path, model, target, precision="bf16" if kind == "bf16" else "fp16")
    assert not (tmp_path / f"{target}.plan").exists()


@pytest.mark.slow
def test_every_operator_that_tensorrt_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        build(tmp_path, foreign(), "sm_89")
    for place in (
        "Magic at blocks.0.magic/Magic",
        "Unique at blocks.1/Unique",
        "Bernoulli at blocks.2.noise/Bernoulli",
    ):
        assert place in caught.value.message
    assert "MatMul" not in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"", b"junk", b"\x08\x0a"])
def test_a_file_that_is_no_graph(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"model\.onnx"):
        build_engines(job(path, "sm_89"), quiet)


@pytest.mark.slow
def test_a_graph_in_another_precision_is_refused_before_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match=r"would not be fp32 everywhere: fc/MatMul \(bfloat16\)"):
        build(tmp_path, in_bfloat16(), "sm_89", precision="fp32")
    assert list(tmp_path.glob("*.plan")) == []


@pytest.mark.slow
def test_engines_are_raw_deterministic_and_relocatable(tmp_path: Path) -> None:
    model = quantised(TensorProto.INT8)
    build(tmp_path / "here", model, "sm_89", "sm_80+sm_120")
    build(tmp_path / "there", model, "sm_89", "sm_80+sm_120")
    for name in ("sm_89.plan", "sm_80+sm_120.plan"):
        here, there = (tmp_path / place / name for place in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
        assert str(tmp_path).encode() not in here.read_bytes()
    data = (tmp_path / "here/sm_89.plan").read_bytes()
    header = read_header(data[:64], "it")
    assert (header.targets, header.size) == (("sm_89",), len(data))
    assert header.version_text == tensorrt_rtx.__version__
    assert read_header((tmp_path / "here/sm_80+sm_120.plan").read_bytes()[:64], "it").targets == (
        "sm_80",
        "sm_120",
    )


@pytest.mark.slow
def test_the_runtime_itself_accepts_the_header_where_it_is(tmp_path: Path) -> None:
    """Without a GPU it gets as far as CUDA with our bytes, and no further than the header with others."""
    build(tmp_path, quantised(TensorProto.INT8), "sm_89")
    data = (tmp_path / "sm_89.plan").read_bytes()
    assert "Cuda Runtime" in said_of(data)
    assert "magicTag" in said_of(b"name" * 16 + data)
    assert "header.size == blobSize" in said_of(data[:-1])


@pytest.mark.slow
def test_settings_reach_the_builder(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantised(TensorProto.INT8), path)
    plain = build_engines(job(path, "sm_89"), quiet)
    two = build_engines(job(path, "sm_89", profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 64))), quiet)
    assert two.engines[0].size > plain.engines[0].size


@pytest.mark.slow
def test_several_targets_are_built_from_one_parse(tmp_path: Path) -> None:
    phases: list[tuple[str, float]] = []
    path = tmp_path / "model.onnx"
    onnx.save(quantised(TensorProto.INT8), path)
    result = build_engines(job(path, *TARGETS), lambda *step: phases.append(step))
    assert len(result.engines) == 6
    assert [phase for phase, _ in phases].count("parsing") == 1
    fractions = [fraction for _, fraction in phases]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9
    assert len({(tmp_path / f"{target}.plan").read_bytes() for target in TARGETS}) == 6


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def killed(number: signal.Signals) -> None:
    """Send a signal to this process's builder as soon as there is one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in children_of(os.getpid()):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"vitdeploy.tensorrt.child" in command:
                time.sleep(0.3)
                os.kill(child, number)
                return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, message", [(signal.SIGKILL, "was killed"), (signal.SIGSEGV, "died of SIGSEGV")]
)
def test_a_builder_that_dies_is_an_error_and_no_crash(
    tmp_path: Path, number: signal.Signals, message: str
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantised(TensorProto.INT8), path)
    killer = threading.Thread(target=killed, args=(number,))
    killer.start()
    with pytest.raises(ExportError, match=f"the builder of TensorRT for RTX {message}") as caught:
        build_engines(job(path, *TARGETS), quiet)
    killer.join()
    assert caught.value.hint


@pytest.mark.slow
def test_a_builder_ends_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantised(TensorProto.INT8), path)
    text = job(path, *TARGETS).model_dump_json()
    script = (
        "import sys\nfrom vitdeploy.tensorrt.child import build_engines\n"
        "from vitdeploy.tensorrt.records import BuildJob\n"
        "job = BuildJob.model_validate_json(sys.argv[1])\n"
        "build_engines(job, lambda *step: print('building', flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, text], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    (child,) = children_of(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
