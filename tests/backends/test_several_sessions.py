"""Several sessions of an artifact: answers, closing one, and that the weights are there once."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.small_bundles import artifact, draft
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.errors import UsageError

BACKENDS = ("onnxruntime", "openvino")
WIDTH, LAYERS = 2048, 4
"""64 MiB of weights."""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of nothing but weights: to run an image through them takes a few kB."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "pixel_values"
    for number in range(LAYERS):
        matrix = (random.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"]))
        last = "logits" if number == LAYERS - 1 else f"r{number}"
        nodes.append(helper.make_node("Relu", [f"m{number}"], [last]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", WIDTH))
        for name in ("pixel_values", last)
    ]
    graph = helper.make_graph(nodes, "heavy", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = artifact("onnx-fp32", "model.onnx").model_copy(
        update={
            "inputs": (TensorSpec(name="pixel_values", dtype="float32", shape=("N", WIDTH)),),
            "outputs": (TensorSpec(name="logits", dtype="float32", shape=("N", WIDTH)),),
        }
    )
    with BundleWriter(tmp_path_factory.mktemp("heavy") / "heavy.bundle") as writer:
        onnx.save(model, writer.file("model.onnx"))
        writer.seal(draft("heavy", artifacts=(made,)))
        return writer.commit().root


_MEMORY = """
import gc, re, sys
from pathlib import Path
import numpy as np
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.machine.memory import give_back

def resident():
    gc.collect()
    give_back()
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, name, count = sys.argv[1:]
__import__(name)
bundle, backend = Bundle.open(folder), get_backend(name)
before = resident()
sessions = backend.load_several(bundle, bundle.artifact("fp32"), Options(threads=1), int(count))
for session in sessions:
    session.run({"pixel_values": np.zeros((1, 2048), np.float32)})
print(resident() - before)
"""


def memory(folder: Path, backend: str, count: int) -> int:
    """KiB that so many sessions take, in a process of their own."""
    command = [sys.executable, "-c", _MEMORY, str(folder), backend, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weights_are_there_once(heavy: Path, backend: str) -> None:
    one, two = memory(heavy, backend, 1), memory(heavy, backend, 2)
    assert one > 0.9 * LAYERS * WIDTH**2 * 4 / 1024
    assert two <= 1.25 * one


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_answer_at_the_same_time(digits_onnx: Path, backend: str, threads: int) -> None:
    """As one alone does, each its own caller; closing one leaves the others whole."""
    bundle = Bundle.open(digits_onnx)
    runtime, chosen, options = get_backend(backend), bundle.artifact("fp32"), Options(threads=threads)
    pixels = bundle.golden()["pixel_values"]
    with runtime.load(bundle, chosen, options) as alone:
        expected = [alone.run({"pixel_values": pixels[n : n + 1]})["logits"] for n in range(3)]
    sessions = runtime.load_several(bundle, chosen, options, 3)
    assert len({id(session) for session in sessions}) == 3
    ready = threading.Barrier(3)

    def call(number: int) -> list[np.ndarray]:
        ready.wait()
        return [
            sessions[number].run({"pixel_values": pixels[number : number + 1]})["logits"] for _ in range(20)
        ]

    with ThreadPoolExecutor(3) as pool:
        for number, found in enumerate(pool.map(call, range(3))):
            for logits in found:
                np.testing.assert_allclose(logits, expected[number], rtol=1e-4, atol=1e-4)
    sessions[0].close()
    with pytest.raises(UsageError, match="closed"):
        sessions[0].run({"pixel_values": pixels[:1]})
    for session in sessions[1:]:
        found = session.run({"pixel_values": pixels[:1]})["logits"]
        np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)
        session.close()


def test_none_stays_open_where_one_cannot_be_opened(
    digits_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, runtime, opened = Bundle.open(digits_onnx), get_backend("onnxruntime"), []
    load = type(runtime).load

    def load_twice(*arguments: object) -> object:
        if len(opened) == 2:
            raise UsageError("no third one")
        opened.append(load(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(type(runtime), "load", load_twice)
    with pytest.raises(UsageError, match="no third one"):
        runtime.load_several(bundle, bundle.artifact("fp32"), Options(threads=2), 3)
    for session in opened:
        with pytest.raises(UsageError, match="closed"):
            session.run({})
