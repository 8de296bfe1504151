"""``vitdeploy export --plugins``: our kernels as operators that every runtime still runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

import vitdeploy
from tests.helpers.bundles import write_bundle
from tests.helpers.commands import in_a_process
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import ParityMetrics
from vitdeploy.errors import UsageError
from vitdeploy.exporter.engine_request import EngineRequest
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.tensorrt import add_engines

RTX = ("tensorrt-rtx",)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model in fp16 and bf16, with and without operators."""
    folder = tmp_path_factory.mktemp("plugins") / "digits.bundle"
    result = in_a_process(
        "export", "-m", "digits", "--fp16", "--bf16", "--plugins", "--format", "onnx", "-o", folder
    )
    assert result.code == 0, result.err
    for text in (
        "fused_attention: 3 of 4 blocks (blocks.3.attn: the absorbed last block",
        "model.fp16.plugins",
    ):
        assert text in result.out + result.err
    return folder


def metrics(bundle: Bundle, artifact: str, backend: str) -> list[ParityMetrics]:
    return [r.metrics for r in bundle.manifest.parity if (r.artifact, r.backend) == (artifact, backend)]


@pytest.mark.slow
@pytest.mark.parametrize("precision, backend", [("fp16", "onnxruntime"), ("bf16", "openvino")])
def test_the_twin_computes_the_same(exported: Path, precision: str, backend: str) -> None:
    bundle = Bundle.open(exported)
    plain = metrics(bundle, f"onnx-{precision}", backend)
    assert len(plain) == 3
    assert metrics(bundle, f"onnx-{precision}-plugins", backend) == plain
    twin = bundle.artifact(f"onnx-{precision}-plugins")
    assert twin.proof == bundle.artifact(f"onnx-{precision}").proof
    nodes = [node.op_type for node in onnx.load(bundle.path(twin.path)).graph.node]
    assert nodes.count("fused_attention") == 3
    assert twin.nodes == len(nodes)


@pytest.mark.slow
def test_it_is_proven_again_and_never_chosen_unasked(exported: Path) -> None:
    report = vitdeploy.verify(exported, batches=[1, 3])
    assert report.passed, report.failures
    assert {"onnx-fp16-plugins", "onnx-bf16-plugins"} <= {record.artifact for record in report.parity}
    with vitdeploy.load(exported) as model:
        assert model.session.facts.artifact == "onnx-fp16"


@pytest.mark.slow
def test_engines_of_tensorrt_for_rtx_are_of_the_plain_graphs(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "digits.bundle"))
    result = in_a_process("export", "-m", folder, "--format", *RTX, "--arch", "sm_89", "--precision", "fp16")
    assert result.code == 0, result.err
    names = [artifact.name for artifact in Bundle.open(folder).manifest.artifacts]
    assert names[4:] == ["tensorrt-rtx-fp16-sm_89"]


@pytest.mark.slow
def test_operators_are_marked_in_a_bundle_that_has_none(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "digits.bundle"))
    bundle = Bundle.open(folder)
    with bundle.edit() as writer:
        (writer.directory / "model.fp16.plugins.onnx").unlink()
        kept = tuple(a for a in bundle.manifest.artifacts if a.name != "onnx-fp16-plugins")
        parity = tuple(r for r in bundle.manifest.parity if r.artifact != "onnx-fp16-plugins")
        writer.seal(bundle.manifest.model_copy(update={"artifacts": kept, "parity": parity}))
        writer.commit()
    request = EngineRequest(RTX, ("sm_89",), plugins=True)
    again = add_engines(Bundle.open(folder), request, precisions=["fp16"])
    assert [artifact.name for artifact in again.manifest.artifacts][-2:] == [
        "onnx-fp16-plugins",
        "tensorrt-rtx-fp16-sm_89",
    ]
    assert metrics(again, "onnx-fp16-plugins", "onnxruntime") == metrics(bundle, "onnx-fp16", "onnxruntime")


def test_fp32_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="compute in fp16 or bf16, not in fp32"):
        ExportRequest(plugins=True)


def test_a_bundle_of_fp32_is_refused(exported_fp32: Bundle) -> None:
    with pytest.raises(UsageError, match="compute in fp16 or bf16, not in fp32"):
        add_engines(exported_fp32, EngineRequest(RTX, ("sm_89",), plugins=True))


@pytest.fixture
def exported_fp32(tmp_path: Path) -> Bundle:
    from tests.helpers.weights_bundles import CONFIG

    return write_bundle(tmp_path / "b", model=CONFIG, labels=None)


def test_a_module_of_the_users_own_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", precisions=("fp16",))
    with pytest.raises(UsageError, match="plugins are for ViTs that vitdeploy knows"):
        add_engines(bundle, EngineRequest(RTX, ("sm_89",), plugins=True))
