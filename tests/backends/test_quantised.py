"""Quantised artifacts on every runtime: they compute what the file says, or say that they do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import vitdeploy
from tests.fakes.onnxruntime import CUDA, TENSORRT, Double
from tests.helpers.quantised_bundles import (
    held_out,
    quantised_answer,
    quantised_graph,
    record,
    write_quantised,
)
from tests.helpers.weights_bundles import artifact, write_weights
from vitdeploy.backends import onnxruntime as ort_module
from vitdeploy.backends import onnxruntime_providers as providers
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.openvino import hinted
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.verification.local import emulated
from vitdeploy.verification.parity import check_session

KINDS: Any = ("int8", "fp8")
EXECUTES = {
    ("onnxruntime", "int8"): "int8+fp32",
    ("onnxruntime", "fp8"): "fp32",
    ("openvino", "int8"): "int8",
    ("openvino", "fp8"): "fp32",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_quantised(tmp_path / "quantised.bundle")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runs_what_the_file_says(bundle: Bundle, name: str, kind: Any) -> None:
    chosen = bundle.artifact(f"onnx-{kind}")
    inputs = held_out()["pixel_values"]
    with get_backend(name).load(bundle, chosen, Options(threads=1)) as session:
        assert session.facts.executes == EXECUTES[name, kind]
        assert (emulated(session.facts) is None) == (kind == "int8")
        found = session.run({"pixel_values": inputs})["logits"]
        assert all(one.passed for one in check_session(session, bundle.golden(chosen)))
    # OpenVINO rounds to fp8 by way of fp16.
    wanted = quantised_answer(inputs, kind, by_half=(name, kind) == ("openvino", "fp8"))
    assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)


def test_onnx_runtime_s_optimised_graph_tells_what_it_widens(bundle: Bundle, tmp_path: Path) -> None:
    """A session's statement is no reading: `verify` looks at the graph."""
    backend = get_backend("onnxruntime")
    assert [backend.widened(bundle, artifact) for artifact in bundle.manifest.artifacts] == [(), (), ()]
    wide = with_a_float_weight(tmp_path / "wide")
    assert backend.widened(wide, wide.artifact("int8")) == ("head",)
    notes = vitdeploy.verify(wide, backends=["onnxruntime"], batches=[1]).notes
    assert "onnx-int8 on onnxruntime computes 1 of its 1 quantised GEMMs in floats: head" in notes


def test_emulation_is_said(bundle: Bundle) -> None:
    with get_backend("openvino").load(bundle, bundle.artifact("fp8"), Options()) as session:
        assert emulated(session.facts) == (
            "onnx-fp8 on openvino computes in fp32: fp8 is emulated there, which proves its answers and says "
            "nothing of its speed"
        )
    with get_backend("onnxruntime").load(bundle, bundle.artifact("fp32"), Options()) as session:
        assert emulated(session.facts) is None


def with_a_float_weight(folder: Path) -> Bundle:
    """Its pixels are rounded, and multiplied in floats."""
    model = onnx.load_from_string(quantised_graph("int8"))
    plain = numpy_helper.from_array(np.ones((192, 5), np.float32), "plain")
    model.graph.initializer.append(plain)
    model.graph.node[-1].input[1] = plain.name
    made = write_quantised(folder, kinds=("int8",))
    with made.edit() as writer:
        writer.file("model.int8.onnx").write_bytes(model.SerializeToString())
        writer.seal(made.manifest)
        return writer.commit()


def test_a_runtime_that_widens_int8_is_found_out(tmp_path: Path) -> None:
    """OpenVINO's statement is read from the compiled graph."""
    wide = with_a_float_weight(tmp_path / "b")
    with get_backend("openvino").load(wide, wide.artifact("int8"), Options()) as session:
        assert session.facts.executes in ("bf16", "fp32")
        assert "int8 is emulated there" in str(emulated(session.facts))


@pytest.mark.parametrize(
    "precision, rest, hint",
    [
        ("int8", "fp32", "bf16"),
        ("int8", "fp16", "fp16"),
        ("fp8", "fp32", "fp32"),
        ("fp8", "fp16", "fp16"),
    ],
)
def test_what_openvino_is_asked_for(precision: Any, rest: Any, hint: str) -> None:
    made = artifact(precision).model_copy(update={"quantisation": record(rest=rest)})
    assert hinted(made) == hint


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, kind) for name in ("torch", "torch-compile", "aotinductor") for kind in KINDS),
        ("triton", "int8"),  # fp8 it computes
    ],
)
def test_what_builds_the_model_from_weights_refuses(tmp_path: Path, name: str, kind: Any) -> None:
    reason = get_backend(name).supports(write_weights(tmp_path / "b").manifest, artifact(kind))
    assert reason is not None
    assert reason.endswith(f"onnx-{kind} is {kind}")
    assert len(reason) < 100


@pytest.mark.usefixtures("nvidia_machine")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_providers(bundle: Bundle, kind: Any) -> None:
    chosen = bundle.artifact(f"onnx-{kind}")
    double = Double(TENSORRT, CUDA, version="1.28.0")
    assert providers.set_up(double, bundle, chosen, "cuda").executes == "fp32"
    setup = providers.set_up(double, bundle, chosen, "tensorrt")
    assert "in types that TensorRT chooses" in setup.executes
    assert setup.providers[0][1].get("trt_int8_enable") == ("1" if kind == "int8" else None)


def test_threads_spin_where_asked(bundle: Bundle) -> None:
    for spin in (False, True):
        settings = ort_module.session_settings(onnxruntime, None, "cpu", spin=spin)
        assert settings.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))
    chosen = bundle.artifact("int8")
    with get_backend("onnxruntime").load(bundle, chosen, Options(spin=True, threads=1)) as session:
        assert session.run({"pixel_values": held_out()["pixel_values"]})["logits"].shape == (6, 5)
    with pytest.raises(UsageError, match="the openvino backend has no threads that can be told to spin"):
        get_backend("openvino").load(bundle, chosen, Options(spin=True))


@pytest.mark.parametrize(
    "precision, executes, said",
    [
        ("int8", "int8", False),
        ("int8", "bf16+int8", False),
        ("int8", "int8+fp16, in fp32 where this CPU has no kernel for it", False),
        ("int8", "int8, in types that TensorRT chooses layer by layer", False),
        ("int8", "bf16", True),
        ("fp8", "fp32", True),
        ("bf16", "fp32", False),
    ],
)
def test_where_8_bits_are_missing(bundle: Bundle, precision: Any, executes: str, said: bool) -> None:
    with get_backend("onnxruntime").load(bundle, bundle.artifact("int8"), Options()) as session:
        facts = dataclasses.replace(session.facts, precision=precision, executes=executes)
    assert (emulated(facts) is not None) == said
