"""Engines of Qwen's towers by the real TensorRT for RTX: precision proof and fusion."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.test_qwen import CONFIGS, deployed, inputs_of, random_tower
from vitdeploy.bundle.manifest import input_spec
from vitdeploy.config import BatchRange
from vitdeploy.exporter.graph import trace
from vitdeploy.exporter.onnx import INPUT, save_streaming
from vitdeploy.model.precision import PrecisionPlan, island_names
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.records import BuildJob

TARGETS = (("sm_89",), ("sm_120",))
BATCH = BatchRange(1, 4, 8)
ATTENTIONS = {"qwen2": 3, "qwen2_5": 7, "whole_windows": 3, "qwen3": 3}
"""Of three blocks; where windows are of three sizes, one for each."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_generation_is_built_in_fp16(name: str, tmp_path: Path) -> None:
    config, plan = CONFIGS[name], PrecisionPlan.of("fp16")
    model = deployed(random_tower(config), config.outputs, precision="fp16")
    islands, path = island_names(model, plan), tmp_path / "model.onnx"
    names = (INPUT, *config.outputs)
    save_streaming(trace(model, inputs_of(config)["float"].float(), batch=BATCH, opset=20, names=names), path)
    job = BuildJob(
        flavour="tensorrt-rtx",
        onnx=str(path),
        input=input_spec(config, "float"),
        precision="fp16",
        islands=islands,
        profiles=(BATCH,),
        targets=TARGETS,
        outputs=tuple(str(tmp_path / f"{arch}.plan") for (arch,) in TARGETS),
    )
    result = build_engines(job, lambda *_: None)
    assert all(
        engine.size == Path(file).stat().st_size
        for engine, file in zip(result.engines, job.outputs, strict=True)
    )
    assert result.proof.ok
    assert all(op.island for op in result.proof.ops if op.dtype != "float16")
    count = ATTENTIONS[name]
    assert result.fusion.lines()[0] == f"{count}/{count} attention can be fused"
    assert not any("not fused" in line for line in result.fusion.lines())
