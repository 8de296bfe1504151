"""EP-context models: what is asked of ONNX Runtime, and what becomes of what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.fakes.onnxruntime import CUDA, RTX, TENSORRT, TENSORRT_OPTIONS, Double, Settings
from vitdeploy.backends import onnxruntime_providers as providers
from vitdeploy.backends.onnxruntime_context import export_ep_context
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import ViTConfig
from vitdeploy.errors import BundleError, DeviceUnavailable, ExportError, UsageError

pytestmark = pytest.mark.usefixtures("nvidia_machine")
MODEL = ViTConfig(image_size=(4, 4), patch_size=4)


def context_model(engine: bytes, embed: int, operators: tuple[str, ...] = ("EPContext",)) -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            operator,
            ["pixel_values"],
            [f"logits{index}"],
            domain="com.microsoft",
            ep_cache_context=engine,
            embed_mode=embed,
        )
        for index, operator in enumerate(operators)
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["N", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits0", TensorProto.FLOAT, ["N", 5])
    return helper.make_model(helper.make_graph(nodes, "context", [pixels], [logits]))


class Compiler:
    """ModelCompiler: writes what the plugin wrote when it was run, engine names with the path given."""

    operators: tuple[str, ...] = ("EPContext",)
    names_it = True

    def __init__(self, settings: Any, path: Any, embed_compiled_data_into_model: bool, flags: Any) -> None:
        self.embed, self.flags, self.settings = embed_compiled_data_into_model, flags, settings

    def compile_to_file(self, target: str) -> None:
        assert self.flags == onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
        assert len(self.settings.added) == 1
        engine = Path(target).with_name("NvTensorRTRTX_1_0.engine")
        if not self.embed and self.names_it:
            engine.write_bytes(b"vtrt")
        content = b"vtrt" if self.embed else str(engine).encode()
        onnx.save(context_model(content, int(self.embed), self.operators), target)


def rtx_library(compiler: type[Compiler] = Compiler) -> Double:
    return Double(RTX, ModelCompiler=compiler, SessionOptions=Settings)


def export(bundle: Bundle, provider: str, target: Path, **arguments: Any) -> Any:
    return export_ep_context(bundle, bundle.manifest.artifacts[0], provider, target, **arguments)


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("built_in", [True, False])
def test_rtx_contexts(
    make_bundle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rtx_plugin: Path,
    embed: bool,
    built_in: bool,
) -> None:
    library = Double(*[RTX] * built_in, ModelCompiler=Compiler, SessionOptions=Settings)
    monkeypatch.setattr(providers, "open_library", lambda: library)
    result = export(make_bundle(), "tensorrt-rtx", tmp_path / "context", embed=embed)
    assert library.registered == ([] if built_in else [(RTX, str(rtx_plugin))])
    assert sorted(result.files) == sorted(path.name for path in result.folder.iterdir())
    (node,) = onnx.load(result.model).graph.node
    content = {attribute.name: attribute.s for attribute in node.attribute}["ep_cache_context"]
    if embed:
        assert (result.files, content) == (("model.onnx",), b"vtrt")
    else:
        assert content == b"NvTensorRTRTX_1_0.engine"
        assert (result.folder / content.decode()).read_bytes() == b"vtrt"


@pytest.mark.parametrize("embed", [True, False])
def test_tensorrt_contexts(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embed: bool
) -> None:
    """Its provider writes the model when the session is made, the engine beside it as its cache."""
    asked: dict[str, str] = {}

    def session(path: Any, settings: Any, providers: Any, enable_fallback: int) -> Any:
        (name, options), (behind, _) = providers
        assert (name, behind, enable_fallback) == (TENSORRT, CUDA, 0)
        asked.update(options)
        target = Path(options["trt_ep_context_file_path"])
        target.with_name("TRTKernel_sm89.engine").write_bytes(b"engine")
        content = b"engine" if embed else b"TRTKernel_sm89.engine"
        onnx.save(context_model(content, int(embed)), target)

    monkeypatch.setattr(providers, "open_library", lambda: Double(TENSORRT, InferenceSession=session))
    result = export(make_bundle(), "tensorrt", tmp_path / "context", embed=embed)
    assert result.model.is_file()
    assert set(asked) <= TENSORRT_OPTIONS
    assert (asked["trt_dump_ep_context_model"], asked["trt_ep_context_embed_mode"]) == ("1", str(int(embed)))
    assert asked.get("trt_engine_cache_enable") == (None if embed else "1")
    assert "trt_engine_cache_path" not in asked  # an engine from the cache would not be written
    assert asked["trt_profile_max_shapes"] == "pixel_values:8x3x4x4"


def test_a_context_of_a_part_is_refused_for_our_own_graphs(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Partly(Compiler):
        operators = ("EPContext", "Gelu")

    monkeypatch.setattr(providers, "open_library", lambda: rtx_library(Partly))
    with pytest.raises(ExportError, match="compiles 1 parts of it and leaves Gelu"):
        export(make_bundle(model=MODEL), "tensorrt-rtx", tmp_path / "context")
    assert not (tmp_path / "context").exists()
    assert export(
        make_bundle(), "tensorrt-rtx", tmp_path / "context"
    ).model.is_file()  # a user's may be split


@pytest.mark.parametrize(
    "operators, embed, message",
    [(("Gelu",), True, "compiles 0 parts"), (("EPContext",), False, "did not write")],
)
def test_a_context_without_its_engine_is_refused(
    make_bundle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operators: tuple[str, ...],
    embed: bool,
    message: str,
) -> None:
    class Broken(Compiler):
        names_it = False

    Broken.operators = operators
    monkeypatch.setattr(providers, "open_library", lambda: rtx_library(Broken))
    with pytest.raises(ExportError, match=message):
        export(make_bundle(), "tensorrt-rtx", tmp_path / "context", embed=embed)
    assert [path.name for path in tmp_path.iterdir() if "context" in path.name or path.name[0] == "."] == []


def test_the_real_compiler_without_a_provider_that_compiles(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own compile API, given the CPU in place of TensorRT: an error, and no file."""

    monkeypatch.setattr(providers, "open_library", lambda: Double(RTX))
    monkeypatch.setattr(providers.Setup, "add_to", lambda self, settings: None)
    with pytest.raises(ExportError, match=r"cannot compile it: .*Unable to compile any nodes") as caught:
        export(make_bundle(), "tensorrt-rtx", tmp_path / "context")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "context").exists()


def test_what_is_refused_before_anything_is_compiled(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle()
    target = tmp_path / "context"
    with pytest.raises(UsageError, match="'cuda' compiles no engines"):
        export(bundle, "cuda", target)
    with pytest.raises(UsageError, match="compiles for the GPU it finds, not for sm_89"):
        export(bundle, "tensorrt", target, arch="sm_89")
    engine = bundle.manifest.artifacts[0].model_copy(update={"format": "tensorrt"})
    with pytest.raises(UsageError, match="made from ONNX"):
        export_ep_context(bundle, engine, "tensorrt", target)
    with pytest.raises(DeviceUnavailable, match="has no tensorrt provider here"):
        export(bundle, "tensorrt", target)
    target.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(bundle, "tensorrt", target)
    monkeypatch.setattr(providers, "open_library", rtx_library)
    assert export(bundle, "tensorrt-rtx", target, force=True).model.is_file()
    bundle.path("model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        export(bundle, "tensorrt-rtx", target, force=True)
    assert (target / "model.onnx").is_file()


def test_a_full_disk_leaves_nothing(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Compiler):
        def compile_to_file(self, target: str) -> None:
            super().compile_to_file(target)
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(providers, "open_library", lambda: rtx_library(Full))
    with pytest.raises(ExportError, match="cannot compile it: No space left"):
        export(make_bundle(), "tensorrt-rtx", tmp_path / "new" / "context")
    assert not (tmp_path / "new").exists()
