"""The reference model as a backend: from weights alone, in a given precision, from bytes too."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.torch_events import CudaClock
from tests.helpers.models import CONFIGS, pixels, random_state, random_vit
from tests.helpers.weights_bundles import CONFIG, SPEC, artifact, golden
from vitdeploy.backends.aotinductor import AotInductor
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.torch import DeviceTimer, Torch, _no_tf32
from vitdeploy.backends.torch_compile import TorchCompile
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.errors import BundleError, DeviceUnavailable, MissingDependency, UsageError
from vitdeploy.model.reference import forward_float64
from vitdeploy.verification.parity import check_session

Make = Callable[..., Bundle]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_alone_give_the_reference(weights_bundle: Make, name: str) -> None:
    config = CONFIGS[name]
    with Torch().load(weights_bundle(config), None, Options()) as session:
        records = check_session(session, golden(config))
    assert [record.failures for record in records] == [(), ()]
    assert [record.batch for record in records] == [1, 8]
    assert records[0].artifact == WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "features", "tokens"])
def test_every_output(weights_bundle: Make, output: str) -> None:
    with Torch().load(weights_bundle(output=output), None, Options()) as session:
        assert all(record.passed for record in check_session(session, golden(output=output), batches=[3]))
        shape = session.run({"pixel_values": golden()["pixel_values"]})[output].shape
    spec = session.facts.outputs[0]
    assert spec.name == output
    assert shape[1:] == spec.shape[1:]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [Torch(), TorchCompile()])
def test_several_outputs(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch, backend: Torch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, options: compile_(f, fullgraph=fullgraph, backend="eager")
    )
    outputs, others = ("logits", "tokens", "layer_1"), ("tokens", "layer_1")
    with backend.load(weights_bundle(outputs=outputs), None, Options()) as session:
        records = check_session(session, golden(others=others), batches=[1, 3])
    assert [record.output for record in records] == 2 * list(outputs)
    assert all(record.passed for record in records), records


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_artifacts_precision(weights_bundle: Make, precision: ArtifactPrecision) -> None:
    with Torch().load(weights_bundle(), artifact(precision), Options()) as session:
        records = check_session(session, golden())
        assert all(record.passed for record in records), records
        assert session.facts.executes == session.facts.precision == precision
        assert session.facts.artifact == f"onnx-{precision}"
        with pytest.raises(UsageError, match=f"onnx-{precision} serves 1 to 4"):
            session.run({"pixel_values": pixels(CONFIG, 5).numpy()})
    relative = records[0].metrics.relative
    assert relative is not None
    least = {"fp32": 1e-9, "fp16": 1e-5, "bf16": 1e-4}[precision]  # it did compute in that precision
    assert relative > least


@pytest.mark.parametrize("backend", [Torch, TorchCompile, AotInductor])
def test_reasons_why_not(weights_bundle: Make, make_bundle: Any, backend: type[Torch]) -> None:
    own = make_bundle()
    assert "a module of the user's own" in str(backend().supports(own.manifest, None))
    with pytest.raises(UsageError, match=r"cannot run onnx-fp32 .* module of the user's own"):
        backend().load(own, own.manifest.artifacts[0], Options())
    with_model = own.manifest.model_copy(update={"model": CONFIG})
    assert backend().supports(with_model, None) == f"the bundle has no {WEIGHTS}"
    manifest = weights_bundle().manifest
    assert "fp32 islands" in str(backend().supports(manifest, artifact("mixed")))
    assert backend().supports(manifest, artifact("fp16")) is None


def test_uint8_images_are_normalised_by_the_session(weights_bundle: Make) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(5, *CONFIG.image_size, 3), dtype=np.uint8)
    exact = (images / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    reference = forward_float64(random_vit(CONFIG), torch.from_numpy(exact.transpose(0, 3, 1, 2)))
    with Torch().load(weights_bundle(input="uint8"), None, Options()) as session:
        assert session.facts.inputs[0].dtype == "uint8"
        records = check_session(session, {"pixel_values": images, "reference": reference.numpy()})
    assert all(record.passed for record in records), records


def test_threads_are_set_for_the_run_only(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    with Torch().load(weights_bundle(), None, Options(threads=before + 1)) as session:
        monkeypatch.setattr(session, "_forward", lambda x: seen.append(torch.get_num_threads()) or x)
        session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_missing_gpu_is_an_error(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="finds 0 CUDA devices, not cuda:0"):
        Torch().load(weights_bundle(), None, Options(device="cuda:0"))


def test_options_it_has_no_use_for(weights_bundle: Make) -> None:
    with pytest.raises(UsageError, match="torch backend takes no provider"):
        Torch().load(weights_bundle(), None, Options(provider="cuda"))


def test_convolutions_on_a_gpu_are_not_in_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with _no_tf32("cuda:0"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("damage", ["flipped", "missing", "shape", "garbage"])
def test_weights_that_are_not_this_models(weights_bundle: Make, damage: str) -> None:
    state = random_state(CONFIG)
    if damage == "missing":
        del state["blocks.1.mlp.fc1.weight"]
    if damage == "shape":
        state["head.bias"] = torch.zeros(11)
    bundle = weights_bundle(state=state)
    if damage == "flipped":
        path = bundle.path(WEIGHTS)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    if damage == "garbage":
        with bundle.edit() as writer:
            writer.file(WEIGHTS).write_bytes(b"\xff" * 100)
            writer.seal(bundle.manifest)
            bundle = writer.commit()
    with pytest.raises(BundleError, match=r"weights\.safetensors") as caught:
        Torch().load(Bundle.open(bundle.root), None, Options())
    assert "\n" not in caught.value.message


def test_without_the_library(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = weights_bundle()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency) as caught:
        Torch().load(bundle, None, Options())
    assert caught.value.hint == 'pip install "vitdeploy[export]"'


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    availability = get_backend("torch-compile").availability()
    assert not availability.ok
    assert availability.reason == "torch.compile needs a C++ compiler"


@pytest.mark.slow
@pytest.mark.parametrize("precision, batches", [("fp32", [1, 2, 4]), ("bf16", [2, 4])])
def test_compiled(weights_bundle: Make, precision: ArtifactPrecision, batches: list[int]) -> None:
    from torch._inductor import config

    one_block = dataclasses.replace(CONFIG, depth=1)  # the compiler takes seconds for each
    # The compiler's pool of processes takes longer to start than a model as small as this to compile.
    with (
        config.patch(compile_threads=1),
        TorchCompile().load(weights_bundle(one_block), artifact(precision), Options(threads=1)) as session,
    ):
        assert session.facts.backend == "torch-compile"
        records = check_session(session, golden(one_block), batches=batches)
    assert [record.batch for record in records] == batches
    assert all(record.passed for record in records), records


@pytest.mark.slow
def test_sessions_do_not_use_up_each_others_compilations(
    weights_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler gives one piece of code eight versions; ten models must each get their own."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, options: compile_(f, fullgraph=fullgraph, backend="eager")
    )
    for config in CONFIGS.values():
        with TorchCompile().load(weights_bundle(config), None, Options()) as session:
            (record,) = check_session(session, golden(config), batches=[1])
            assert record.passed


@pytest.mark.parametrize("timed, seconds", [(True, 2.5), (False, None)])
def test_time_on_the_gpu(
    weights_bundle: Make, cuda_clock: CudaClock, monkeypatch: pytest.MonkeyPatch, timed: bool, seconds: float
) -> None:
    """The session of a GPU, with the model on the CPU in its place."""
    with Torch().load(weights_bundle(), None, Options()) as session:
        session.facts = dataclasses.replace(session.facts, device="cuda:0")
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
        forward = session._forward

        def slow(pixels: torch.Tensor) -> torch.Tensor:
            cuda_clock.now += 2.5
            return forward(pixels)

        monkeypatch.setattr(session, "_forward", slow)
        session.timed = timed
        for _ in range(2):
            session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
            assert session.device_seconds == seconds
        session.timed = False
        session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
        assert session.device_seconds is None


def test_the_cpu_has_no_clock_of_its_own(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", None)
    with Torch().load(weights_bundle(), None, Options()) as session:
        session.timed = True
        session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
        assert session.device_seconds is None


def test_a_failed_run_keeps_its_error(cuda_clock: CudaClock) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), DeviceTimer("cuda:0", True):
        raise RuntimeError("out of memory")
    assert cuda_clock.records == 1
