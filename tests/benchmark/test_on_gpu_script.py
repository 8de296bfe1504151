"""benchmarks/on_gpu.sh, end to end on a tiny model in the interpreter: it must work before it sees a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


def on_gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_every_script_runs_and_the_record_is_complete(tmp_path: Path) -> None:
    done = on_gpu("--smoke", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "smoke.json").read_text())
    assert [step["status"] for step in record["steps"]] == ["done"] * 3
    assert record["environment"]["versions"]["torch"]
    assert record["ceilings"]["matmul_flops"] > 0
    (cell,) = record["end_to_end"]["default"]
    names = ["vitdeploy", "eager", "sdpa", "compile default", "compile max-autotune"]
    assert list(cell["contestants"]) == names
    for facts in cell["contestants"].values():
        assert facts["relative_error"] < 5e-3
        assert facts["same_class"] == 1.0
        assert facts["median_ms"] > 0
        assert len(facts["samples_ms"]) == 2
    kernels = {row["kernel"] for row in record["kernels"]}
    assert {"layernorm_linear", "linear_residual", "patch_embed", "head_linear"} <= kernels
    assert {"attention", "absorbed_attention", "add_layernorm"} <= kernels
    assert all(row["wrong"] is None and row["floor_us"] > 0 for row in record["kernels"])


@pytest.mark.slow
def test_without_a_gpu_there_is_one_clear_line(tmp_path: Path) -> None:
    done = on_gpu("--output", tmp_path)
    assert done.returncode == 3
    assert done.stderr == "on_gpu: needs an NVIDIA GPU, and PyTorch sees none (--smoke runs without)\n"
    assert not list(tmp_path.iterdir())


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
