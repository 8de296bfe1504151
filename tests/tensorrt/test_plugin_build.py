"""Engines with plugins, from the ONNX to a proven engine of the double: what the parser is given."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest

from tests.fakes.machines import L4, NEW, Machine, MakeMachine
from tests.helpers.commands import in_a_process
from vitdeploy.bundle.folder import Bundle
from vitdeploy.exporter.engine_request import EngineRequest
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.tensorrt.engine_file import read_record


class Plugins:
    """A parser that knows our operator, as TensorRT's does once the plugin is registered."""

    def __init__(self, here: Machine, marked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registered: list[Any] = []
        self.parsed: list[Path] = []
        self._marked = marked
        self._parse = here.library.OnnxParser.parse_from_file
        monkeypatch.setattr("vitdeploy.tensorrt.plugins.register_plugins", self._register)
        monkeypatch.setattr(
            here.library.OnnxParser, "parse_from_file", lambda parser, path: self._read(parser, Path(path))
        )

    def _register(self, library: Any, kernels: Any) -> None:
        assert not self.parsed
        self.registered += kernels

    def _read(self, parser: Any, path: Path) -> bool:
        model = onnx.load(path)
        operators = [node.op_type for node in model.graph.node]
        if "fused_attention" not in operators:
            return bool(self._parse(parser, str(path)))
        assert self.registered
        assert not model.functions
        self.parsed.append(path)
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, "plain.onnx")
            onnx.save(onnx.inliner.inline_local_functions(onnx.load(self._marked)), plain)
            return bool(self._parse(parser, str(plain)))


@pytest.mark.slow
def test_an_engine_of_each_graph_and_one_with_the_kernel(
    machine: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "digits.bundle"
    flags = ("--fp16", "--plugins", "--format", "onnx", "--batch", "1,2,4")
    assert in_a_process("export", "-m", "digits", *flags, "-o", folder).code == 0
    here = machine(NEW, L4)
    plugins = Plugins(here, folder / "model.fp16.plugins.onnx", monkeypatch)
    bundle = add_engines(Bundle.open(folder), EngineRequest(("tensorrt",), plugins=True))
    bundle.verify()
    names = [artifact.name for artifact in bundle.manifest.artifacts]
    assert names == ["onnx-fp16", "onnx-fp16-plugins", "tensorrt-fp16-sm_89", "tensorrt-fp16-plugins-sm_89"]
    engine = bundle.artifact("tensorrt-fp16-plugins-sm_89")
    assert engine.path == "engines/sm_89/model.fp16.plugins.plan"
    record = read_record(bundle.path(engine.files[1]))
    assert record.plugins
    assert record.source == "onnx-fp16-plugins"
    assert not read_record(bundle.path("engines/sm_89/model.fp16.json")).plugins
    (kernel,) = plugins.registered
    assert kernel.spec.plugin == "vitdeploy::fused_attention"
    (parsed,) = plugins.parsed
    assert not parsed.exists()
    assert [r.passed for r in bundle.manifest.parity if r.artifact == engine.name] == [True] * 3
