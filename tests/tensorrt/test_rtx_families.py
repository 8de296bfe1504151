"""Engines of every family's structure by the real TensorRT for RTX: precision proof and fusion."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.models import CONFIGS, pixels, random_state
from tests.helpers.swins import SWINS
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange, ModelConfig, Preprocess, layer_of
from vitdeploy.exporter.graph import trace
from vitdeploy.exporter.onnx import INPUT, save_streaming
from vitdeploy.model.precision import PrecisionPlan, island_names
from vitdeploy.model.registry import architecture_of, build_reference
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.records import BuildJob

TARGETS = (("sm_89",), ("sm_120",))
BATCH = BatchRange(1, 4, 8)
FAMILIES = (
    *("clip", "zero_shot", "siglip", "dinov3", "eva02", "beit", "beit_codes", "blip"),
    *("hybrid", "hybrid_root"),
)
MODELS: dict[str, ModelConfig] = {
    **{name: CONFIGS[name] for name in FAMILIES},
    **{f"swin_{name}": SWINS[name] for name in ("v1", "padded_late", "v2", "v2_padded")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_built_in_fp16(name: str, tmp_path: Path) -> None:
    config, plan = MODELS[name], PrecisionPlan.of("fp16")
    (output, *_) = config.outputs
    assert layer_of(output) is None
    model = architecture_of(config).deploy(
        build_reference(config, random_state(config, seed=0)),
        plan,
        outputs=(output,),
        input_kind="float",
        preprocess=Preprocess(),
    )
    islands, path = island_names(model, plan), tmp_path / "model.onnx"
    save_streaming(trace(model, pixels(config, 1), batch=BATCH, opset=20, names=(INPUT, output)), path)
    job = BuildJob(
        flavour="tensorrt-rtx",
        onnx=str(path),
        input=TensorSpec(name=INPUT, dtype="float32", shape=("N", 3, *config.image_size)),
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
    wide = {op.op for op in result.proof.ops if op.dtype != "float16"}
    assert wide <= {"LayerNormalization", "ReduceMean"}
    assert all(op.island for op in result.proof.ops if op.dtype != "float16")
    attentions = config.depth + (getattr(config, "pool", None) == "probe")
    assert result.fusion.lines()[0] == f"{attentions}/{attentions} attention can be fused"
    assert not any("not fused" in line for line in result.fusion.lines())
