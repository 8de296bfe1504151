"""Engines of int8 and fp8 that the real TensorRT for RTX builds, on a machine that needs no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.helpers.commands import in_this_process
from tests.helpers.models import CONFIGS
from tests.helpers.quantised import declared, quantised_file
from tests.helpers.quantised_bundles import record, write_quantised
from tests.helpers.traces import NAMES, RANGE
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, TensorSpec
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.config import Precision
from vitdeploy.errors import ExportError, PrecisionError, UsageError
from vitdeploy.exporter.request import EngineRequest, ExportRequest, orders_of
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.flavours import lacks_fp8
from vitdeploy.tensorrt.proof import Layer, prove_network, require
from vitdeploy.tensorrt.records import BuildJob, BuildResult

CONFIG = dataclasses.replace(CONFIGS["vit"], depth=2)
SAID = {"int8": "int8", "fp8": "float8e4m3fn"}


def build(
    folder: Path, model: bytes, *targets: str, quantised: QuantisedGemms, precision: Precision = "fp16"
) -> BuildResult:
    path = folder / "model.onnx"
    path.write_bytes(model)
    job = BuildJob(
        flavour="tensorrt-rtx",
        onnx=str(path),
        input=TensorSpec(name=NAMES[0], dtype="float32", shape=("N", 3, *CONFIG.image_size)),
        precision=precision,
        islands=("norm", *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2))),
        quantised=quantised,
        profiles=(RANGE,),
        targets=tuple((target,) for target in targets),
        outputs=tuple(str(folder / f"{target}.plan") for target in targets),
    )
    return build_engines(job, lambda phase, fraction: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, attention, targets",
    [
        ("int8", False, ("sm_86", "sm_89", "sm_120")),
        ("fp8", False, ("sm_89", "sm_120")),
        ("fp8", True, ("sm_89", "sm_120")),
    ],
)
def test_engines_are_built_and_audited(
    tmp_path: Path, kind: Quantised, attention: bool, targets: tuple[str, ...]
) -> None:
    said = declared(CONFIG, kind, attention)
    result = build(tmp_path, quantised_file(CONFIG, kind, "fp16", attention), *targets, quantised=said)
    assert len(result.engines) == len(targets)
    assert all(engine.size > 0 for engine in result.engines)
    dtypes = {op.name: op.dtype for op in result.proof.ops if op.op == "MatMul"}
    narrow = {name.rsplit("/", 1)[0] for name, dtype in dtypes.items() if dtype == SAID[kind]}
    assert narrow == set(said.sites)
    assert set(dtypes.values()) == {SAID[kind], "float16"}
    (first, *_) = (place for place in result.fusion.places if place.pattern == "attention")
    assert first.fused, first.reason


@pytest.mark.slow
def test_a_zero_point_of_uint8_is_refused_by_name(tmp_path: Path) -> None:
    model = onnx.load_from_string(quantised_file(CONFIG, "int8", "fp16"))
    zero = next(t for t in model.graph.initializer if t.name == "blocks.0.mlp.fc1.input_zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(128, np.uint8), zero.name))
    for value in model.graph.value_info:
        if value.name == "blocks.0.mlp.fc1/QuantizeLinear":
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    with pytest.raises((ExportError, PrecisionError), match=r"blocks\.0\.mlp\.fc1"):
        build(tmp_path, model.SerializeToString(), "sm_89", quantised=declared(CONFIG, "int8"))
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.slow
def test_a_site_that_is_silently_float_is_refused_by_name(tmp_path: Path) -> None:
    model = onnx.load_from_string(quantised_file(CONFIG, "int8", "fp16"))
    node = next(n for n in model.graph.node if n.name == "blocks.1.mlp.fc2/MatMul")
    producers = {output: n for n in model.graph.node for output in n.output}
    node.input[0] = producers[producers[node.input[0]].input[0]].input[0]
    said = r"int8 where it is quantised, and fp16 everywhere: blocks\.1\.mlp\.fc2/MatMul \(float16\)"
    with pytest.raises(PrecisionError, match=said):
        build(tmp_path, model.SerializeToString(), "sm_89", quantised=declared(CONFIG, "int8"))


def layer(name: str, dtype: str, quantised: str | None = None) -> Layer:
    return Layer(name, "MATRIX_MULTIPLY", (dtype,), ("float16",), (name,), quantised=quantised)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers, sites, wrong",
    [
        ([layer("a/MatMul", "float16", "int8"), layer("b/MatMul", "float16")], ("a",), None),
        ([layer("a/MatMul", "float16", "int8"), layer("b/MatMul", "float32")], ("a",), "b/MatMul (float32)"),
        ([layer("a/MatMul", "float16")], ("a",), "a/MatMul (float16)"),
        ([layer("a/MatMul", "float16", "float8e4m3fn")], ("a",), "a/MatMul (float8e4m3fn)"),
        ([layer("a/MatMul", "float16", "uint8")], ("a",), "a/MatMul (uint8)"),
        ([layer("a/MatMul", "float16", "int8")], (), "a/MatMul (int8)"),
        ([layer("a/MatMul", "float16", "int8")], ("a", "b"), "b (undefined)"),
    ],
)
def test_what_is_declared_is_what_the_network_has(
    layers: Sequence[Layer], sites: tuple[str, ...], wrong: str | None
) -> None:
    said = QuantisedGemms(kind="int8", sites=sites)
    proof = prove_network(layers, "fp16", (), said)
    assert proof.ok == (wrong is None)
    if wrong is not None:
        with pytest.raises(PrecisionError) as caught:
            require(proof, "fp16", "it", said)
        assert caught.value.message.endswith(f"everywhere: {wrong}")


# --- fp8 for GPUs without it ----------------------------------------------------------------------------


def for_engines(artifact: Artifact) -> Artifact:
    """As it would be around a rest of fp16."""
    update = {"name": f"{artifact.name}-fp16", "quantisation": record(rest="fp16")}
    return artifact.model_copy(update=update)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    written = write_quantised(tmp_path / "made.bundle")
    artifacts = tuple(for_engines(a) if a.is_quantised else a for a in written.manifest.artifacts)
    with written.edit() as writer:
        writer.seal(written.manifest.model_copy(update={"artifacts": artifacts}))
        return writer.commit()


@pytest.mark.parametrize(
    "arch, lacks", [("sm_86", True), ("sm_80+", True), ("sm_89", False), ("sm_120", False)]
)
def test_which_gpus_lack_fp8(arch: str, lacks: bool) -> None:
    assert lacks_fp8(arch) == lacks


def test_an_export_is_refused_before_it_begins(tmp_path: Path) -> None:
    request = ExportRequest(
        model="digits",
        precisions=("fp8",),
        formats=("onnx", "tensorrt-rtx"),
        architectures=("sm_86", "sm_89"),
        calibration=tmp_path,
    )
    with pytest.raises(UsageError) as caught:
        orders_of(request.engines)
    assert caught.value.message == "TensorRT for RTX: sm_86 has no fp8"
    assert caught.value.hint == "sm_89, sm_120, sm_121 have it; int8 is for every GPU"


def test_engines_of_a_bundle_are_refused_in_one_line(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--format", "tensorrt-rtx", "--arch", "sm_86")
    result = in_this_process(capsys, "engine", bundle.root, *flags)
    assert result.code == 2
    assert "sm_86 has no fp8" in result.err
    assert len(Bundle.open(bundle.root).manifest.artifacts) == len(bundle.manifest.artifacts)


@pytest.mark.slow
def test_engines_of_a_bundle_say_what_is_quantised(bundle: Bundle) -> None:
    request = EngineRequest(("tensorrt-rtx",), ("sm_86",), precisions=("int8",))
    made = add_engines(bundle, request)
    engine = made.artifact("tensorrt-rtx-int8-fp16-sm_86")
    assert (engine.precision, engine.quantisation) == ("int8", record(rest="fp16"))
    assert engine.path == "engines/sm_86-rtx/model.int8.fp16.plan"
    assert engine.proof is not None
    assert [(op.name, op.dtype) for op in engine.proof.ops] == [("head/MatMul", "int8")]
    more = add_engines(made, EngineRequest(("tensorrt-rtx",), ("sm_89",), precisions=("fp8",)))
    assert more.artifact("tensorrt-rtx-fp8-fp16-sm_89").precision == "fp8"
