"""What all runtimes share: the registry and the checks before a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.weights_bundles import artifact, write_weights
from vitdeploy.backends.base import (
    Array,
    Backend,
    Options,
    Session,
    SessionFacts,
    all_backends,
    backend_names,
    get_backend,
    reader_of,
    split_device,
)
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import UsageError
from vitdeploy.predictor import EXACTNESS

FROM_WEIGHTS = ("torch", "torch-compile", "aotinductor", "triton")


def facts(batch: BatchRange | None, *inputs: TensorSpec) -> SessionFacts:
    return SessionFacts(
        backend="echo",
        artifact="onnx-fp32",
        precision="fp32",
        executes="fp32",
        device="cpu",
        provider="cpu",
        batch=batch,
        inputs=inputs or (TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, 4, 4)),),
        outputs=(),
        versions={},
    )


class Echo(Session):
    closed = 0

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(inputs)

    def _close(self) -> None:
        self.closed += 1


def test_every_backend_answers_under_its_name() -> None:
    assert [backend.name for backend in all_backends()] == list(backend_names())
    for backend in all_backends():
        assert backend.traits.summary
        state = backend.availability()
        assert state.ok or backend.traits.needs_gpu, state
        assert state.ok != bool(state.reason)


def row(backend: Backend) -> str:
    """What the documentation's table says of a backend."""
    traits = backend.traits
    reads = ", ".join((*traits.formats, *(["weights"] if traits.name in FROM_WEIGHTS else [])))
    cells = (
        f"`{traits.name}`",
        traits.summary,
        reads,
        ", ".join(traits.precisions),
        ", ".join(traits.devices),
    )
    return f"| {' | '.join(cells)} | `{traits.install}` |"


def test_the_documentation_lists_what_backends_state() -> None:
    text = (ROOT / "docs/backends.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [row(backend) for backend in all_backends()]


@pytest.mark.parametrize("backend", all_backends(), ids=lambda backend: backend.name)
def test_what_a_backend_refuses_is_none_of_its_precisions(backend: Backend, tmp_path: Path) -> None:
    made = write_weights(tmp_path / "b")
    refused = {
        precision
        for precision in EXACTNESS
        if backend.supports(made.manifest, artifact(precision)) is not None
    }
    if "onnx" in backend.formats or not backend.formats or backend.name == "triton":
        assert refused.isdisjoint(set(backend.traits.precisions) - {"bf16"})
        assert set(EXACTNESS) - refused <= set(backend.traits.precisions)


def test_the_first_that_reads_an_artifact() -> None:
    made = artifact("fp16")
    assert reader_of(made).name == "onnxruntime"
    for name in ("tensorrt", "tensorrt-rtx"):
        assert reader_of(made.model_copy(update={"format": name})).name == name
    assert reader_of(made.model_copy(update={"format": "triton-aot"})).name == "triton"
    with pytest.raises(UsageError, match="no backend reads onnx-fp16, whose format is other"):
        reader_of(made.model_copy(update={"format": "other"}))


@pytest.mark.slow
def test_one_backends_traits_import_no_other() -> None:
    script = (
        "import sys; from vitdeploy.backends.base import get_backend\n"
        "assert get_backend('openvino').traits.extras == ('openvino',)\n"
        "print(sorted(name for name in sys.modules if name.startswith('vitdeploy.backends.')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "['vitdeploy.backends.base', 'vitdeploy.backends.openvino']\n"


def test_unknown_backends_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown backend 'onnxruntim'; did you mean 'onnxruntime'"):
        get_backend("onnxruntim")


@pytest.mark.slow
def test_looking_a_backend_up_imports_no_runtime() -> None:
    script = (
        "import sys; from vitdeploy.backends.base import all_backends\n"
        "for backend in all_backends(): backend.availability()\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'openvino') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "needs the input 'pixel_values'"),
        ({"pixel_value": (1, 3, 4, 4)}, "no input 'pixel_value'; did you mean 'pixel_values'"),
        ({"pixel_values": (1, 3, 4)}, r"must have the shape \(N, 3, 4, 4\), not \(1, 3, 4\)"),
        ({"pixel_values": (1, 4, 4, 3)}, r"must have the shape \(N, 3, 4, 4\), not \(1, 4, 4, 3\)"),
        ({"pixel_values": ()}, r"must have the shape \(N, 3, 4, 4\), not \(\)"),
        ({"pixel_values": (9, 3, 4, 4)}, "batch size 9, but onnx-fp32 serves 2 to 8"),
        ({"pixel_values": (1, 3, 4, 4)}, "batch size 1, but onnx-fp32 serves 2 to 8"),
        ({"pixel_values": (0, 3, 4, 4)}, "batch size 0"),
    ],
)
def test_wrong_inputs_say_what_is_wanted(inputs: dict[str, tuple[int, ...]], message: str) -> None:
    arrays = {name: np.zeros(shape, np.float32) for name, shape in inputs.items()}
    with Echo(facts(BatchRange(2, 4, 8))) as session, pytest.raises(UsageError, match=message):
        session.run(arrays)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64", ">f4", "O"])
def test_a_wrong_dtype_is_not_converted(dtype: str) -> None:
    with Echo(facts(None)) as session, pytest.raises(UsageError, match="pixel_values must be float32, not"):
        session.run({"pixel_values": np.zeros((1, 3, 4, 4), dtype)})


def test_a_fixed_batch_says_so() -> None:
    with Echo(facts(BatchRange(4, 4, 4))) as session, pytest.raises(UsageError, match=r"onnx-fp32 serves 4$"):
        session.run({"pixel_values": np.zeros((3, 3, 4, 4), np.float32)})


def test_inputs_share_their_batch_size() -> None:
    both = [TensorSpec(name=name, dtype="float32", shape=("N", 2)) for name in ("a", "b")]
    session = Echo(facts(None, *both))
    arrays: dict[str, Any] = {"a": np.zeros((3, 2), np.float32), "b": np.zeros((3, 2), np.float32)}
    assert set(session.run(arrays)) == {"a", "b"}
    with pytest.raises(UsageError, match="b must have the shape"):
        session.run(arrays | {"b": np.zeros((2, 2), np.float32)})


def test_runtimes_get_contiguous_arrays() -> None:
    transposed = np.zeros((2, 4, 4, 3), np.float32).transpose(0, 3, 1, 2)
    assert Echo(facts(None)).run({"pixel_values": transposed})["pixel_values"].flags.c_contiguous


def test_a_closed_session_does_not_run() -> None:
    with Echo(facts(None)) as session:
        pass
    session.close()
    assert session.closed == 1
    with pytest.raises(UsageError, match="closed"):
        session.run({"pixel_values": np.zeros((1, 3, 4, 4), np.float32)})


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="threads must be at least 1, not 0"):
        Options(threads=0)


@pytest.mark.parametrize(
    "text, device", [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:2", ("cuda", 2))]
)
def test_devices(text: str, device: tuple[str, int]) -> None:
    assert split_device(text) == device


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", ""])
def test_unknown_devices(text: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        split_device(text)
