"""Engines of a bundle with several image sizes: one of each, with a name and a place of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fakes.machines import NEW, MakeMachine
from tests.helpers.several_sizes import SIZES, answer, several_sizes
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.errors import BundleError, ParityError
from vitdeploy.exporter.request import EngineRequest
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.tensorrt.engine_file import read_record

REQUEST = EngineRequest(("tensorrt",))


@pytest.mark.slow
def test_an_engine_of_every_size(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = add_engines(several_sizes(target, precisions=("fp16",)), REQUEST)
    bundle.verify()
    assert bundle.sizes == SIZES
    for index, size in enumerate(SIZES):
        suffix = f"{size[0]}x{size[1]}"
        name = f"tensorrt-fp16-sm_89-{suffix}" if index else "tensorrt-fp16-sm_89"
        stem = f"engines/sm_89/model.{suffix}.fp16" if index else "engines/sm_89/model.fp16"
        view = bundle.at_size(size)
        engine, source = view.artifact("tensorrt-fp16-sm_89"), view.artifact("onnx-fp16")
        assert (engine.name, engine.files) == (name, (f"{stem}.plan", f"{stem}.json"))
        assert (engine.image_size, engine.inputs) == (size if index else None, source.inputs)
        record = read_record(bundle.path(engine.files[1]))
        assert (record.source, record.source_sha256.keys()) == (source.name, set(source.files))
        proven = {(r.batch, r.passed) for r in view.manifest.parity if r.artifact == name}
        assert proven == {(1, True), (2, True), (8, True)}
        inputs = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
        with get_backend("tensorrt").load(bundle, engine, Options()) as session:
            found = session.run({"pixel_values": inputs})["logits"]
        np.testing.assert_allclose(found, answer(inputs), rtol=0, atol=2e-2)
    with pytest.raises(BundleError, match="already has tensorrt-fp16-sm_89"):
        add_engines(bundle, REQUEST)


@pytest.mark.slow
def test_an_engine_of_the_wrong_graph_is_caught(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = several_sizes(target, table_of={SIZES[2]: SIZES[1]})
    with pytest.raises(ParityError, match="tensorrt-fp32-sm_89-8x16"):
        add_engines(bundle, REQUEST)
