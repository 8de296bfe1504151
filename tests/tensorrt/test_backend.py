"""The backends ``tensorrt`` and ``tensorrt-rtx`` on the double: what runs, and what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitdeploy
from tests.fakes.machines import L4, NEW, OLD, RTX, MakeMachine, go_to
from tests.helpers.bundles import (
    FEATURES,
    LABELS,
    WEIGHT,
    answer,
    answer_images,
    graph,
    random_image,
    write_bundle,
)
from tests.helpers.engine_bundles import PLAN, RECORD, each, engines, images, loads, name_of, reseal
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.errors import BundleError, DeviceUnavailable, MissingDependency, UsageError, VitdeployError
from vitdeploy.exporter.request import EngineRequest
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.machine.gpus import Gpu
from vitdeploy.verification.local import verify_bundle

H100, A10 = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA A10", (8, 6))


@pytest.mark.slow
@each
def test_verify_load_and_predict(version: str, machine: MakeMachine, target: Path) -> None:
    machine(version)
    name = name_of(version)
    engines(target, version)
    report = verify_bundle(target, backends=[name])
    assert report.passed
    proven = {(record.artifact, record.batch) for record in report.parity}
    assert proven == {(f"{name}-{p}-sm_89", size) for p in ("fp32", "fp16") for size in (1, 2, 8)}
    with vitdeploy.load(target, backend=name) as predictor:
        facts = predictor.session.facts
        assert (facts.backend, facts.artifact, facts.device) == (name, f"{name}-fp32-sm_89", "cuda:0")
        assert facts.versions == {name: version.removeprefix("rtx-")}
        pictures = [random_image(seed) for seed in range(3)]
        expected = answer_images(pictures)
        np.testing.assert_allclose(predictor.logits(pictures), expected, atol=1e-3)
        (best, *_) = predictor.predict(pictures[0])[0]
        assert best.label == LABELS[int(expected[0].argmax())]


def test_an_engine_gives_all_outputs(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    add_engines(write_bundle(target, features=FEATURES), EngineRequest(("tensorrt",)))
    with vitdeploy.load(target, backend="tensorrt") as predictor:
        found = predictor.outputs(images(3))
    for name, weight in (("logits", WEIGHT), ("features", FEATURES)):
        np.testing.assert_allclose(found[name], answer(images(3), weight=weight), atol=1e-3)
    report = verify_bundle(target, backends=["tensorrt"])
    assert report.passed
    assert {record.output for record in report.parity} == {"logits", "features"}


@pytest.mark.slow
@each
def test_tensors_on_the_gpu(version: str, machine: MakeMachine, target: Path) -> None:
    machine(version)
    bundle = engines(target, version)
    backend = get_backend(name_of(version))
    with backend.load(bundle, bundle.artifact(f"{backend.name}-fp32-sm_89"), Options()) as session:
        given = torch.from_numpy(images(3))
        results = session.run_tensors({"pixel_values": given})  # type: ignore[attr-defined]
        np.testing.assert_allclose(results["logits"], answer(images(3)), atol=1e-3)
        with pytest.raises(UsageError, match="must lie on the GPU"):
            session.run_tensors({"pixel_values": images(3)})  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_session_says_what_is_fused(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    report = verify_bundle(engines(target), backends=["tensorrt"])
    assert {fusion.artifact for fusion in report.fusion} <= {"tensorrt-fp32-sm_89", "tensorrt-fp16-sm_89"}


def test_a_session_tells_the_time_on_the_gpu_when_asked(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    engines(target)
    with vitdeploy.load(target, backend="tensorrt") as predictor:
        session = predictor.session
        session.run({"pixel_values": images(2)})
        assert session.device_seconds is None
        session.timed = True
        session.run({"pixel_values": images(2)})
        assert session.device_seconds == 3  # of the double's clock: upload, engine, download


@pytest.mark.slow
@pytest.mark.parametrize("gpu, arch", [(L4, "sm_89"), (H100, "sm_90")])
def test_of_many_engines_the_gpus_own_is_taken(
    gpu: Gpu, arch: str, machine: MakeMachine, target: Path
) -> None:
    machine(NEW)
    bundle = engines(target)
    machine(NEW, H100)
    add_engines(bundle, EngineRequest(("tensorrt",)))
    machine(NEW, gpu)
    with vitdeploy.load(target, backend="tensorrt") as predictor:
        assert predictor.session.facts.artifact == f"tensorrt-fp32-{arch}"
    report = verify_bundle(target, backends=["tensorrt"])
    assert report.passed
    assert {skipped.artifact[-5:] for skipped in report.skipped if skipped.artifact[:4] != "onnx"} == {
        "sm_90" if arch == "sm_89" else "sm_89"
    }


@pytest.mark.slow
def test_a_fat_engine_of_rtx_runs_on_each_of_its_gpus(machine: MakeMachine, target: Path) -> None:
    machine(RTX)
    engines(target, RTX, "sm_86+sm_89", "sm_120")
    for gpu, name in ((L4, "sm_86+sm_89"), (A10, "sm_86+sm_89"), (Gpu("RTX 5090", (12, 0)), "sm_120")):
        machine(RTX, gpu)
        with vitdeploy.load(target, backend="tensorrt-rtx") as predictor:
            assert predictor.session.facts.artifact == f"tensorrt-rtx-fp32-{name}"
            np.testing.assert_allclose(
                predictor.session.run({"pixel_values": images(2)})["logits"], answer(images(2)), atol=1e-3
            )


@pytest.mark.slow
@each
def test_engines_for_another_gpu(version: str, machine: MakeMachine, target: Path) -> None:
    machine(version)
    bundle = engines(target, version)
    here = machine(version, H100)
    name = name_of(version)
    backend, artifact = get_backend(name), bundle.artifact(f"{name}-fp32-sm_89")
    assert backend.supports(bundle.manifest, artifact) == "it is for sm_89, and the GPU here is sm_90"
    attempts: tuple[Callable[[], object], ...] = (
        lambda: verify_bundle(bundle, backends=[name]),
        lambda: vitdeploy.load(target, backend=name),
        lambda: vitdeploy.load(target, backend=name, artifact=artifact.name),
    )
    for attempt in attempts:
        with pytest.raises(DeviceUnavailable, match="is for sm_89, and th") as caught:
            attempt()
        assert caught.value.exit_code == 3
    assert "vitdeploy engine " in str(caught.value.hint)
    assert loads(here) == 0


@pytest.mark.slow
def test_the_second_gpu_is_taken_where_the_first_does_not_fit(
    machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(NEW)
    engines(target)
    monkeypatch.setattr("vitdeploy.backends.tensorrt.find_gpus", lambda: [H100, L4])
    with vitdeploy.load(target, backend="tensorrt") as predictor:
        assert predictor.session.facts.device == "cuda:1"
    with pytest.raises(DeviceUnavailable, match=r"this GPU \(NVIDIA H100\) is sm_90"):
        vitdeploy.load(target, backend="tensorrt", device="cuda:0")
    with pytest.raises(DeviceUnavailable, match="there is no cuda:2"):
        vitdeploy.load(target, backend="tensorrt", device="cuda:2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "built, running, relation",
    [(OLD, NEW, "newer"), (NEW, "10.16.1.11", "older"), ("10.16.1.11", NEW, "newer")],
)
def test_another_version_of_the_library(
    built: str, running: str, relation: str, machine: MakeMachine, target: Path
) -> None:
    machine(built)
    engines(target, built)
    here = machine(running)
    message = f"built by version {built}, and the library is {relation}: {running}"
    with pytest.raises(BundleError, match=message) as caught:
        vitdeploy.load(target, backend="tensorrt")
    assert f"vitdeploy engine {target} --format tensorrt --precision fp32 --force" in str(caught.value.hint)
    assert loads(here) == 0


@pytest.mark.slow
@pytest.mark.parametrize("running, runs", [("10.16.1.11", True), (NEW, True), (OLD, False)])
def test_a_version_compatible_engine(running: str, runs: bool, machine: MakeMachine, target: Path) -> None:
    machine("10.16.1.11")
    engines(target, "10.16.1.11", version_compatible=True)
    here = machine(running)
    if runs:
        with vitdeploy.load(target, backend="tensorrt") as predictor:
            predictor.session.run({"pixel_values": images(1)})
        assert here.assigned("engine_host_code_allowed") == [True]
    else:
        with pytest.raises(BundleError, match="the library is older"):
            vitdeploy.load(target, backend="tensorrt")
        assert loads(here) == 0


@pytest.mark.slow
def test_other_engines_may_bring_no_code_for_the_host(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    engines(target)
    here = machine(NEW)
    vitdeploy.load(target, backend="tensorrt").close()
    assert not here.assigned("engine_host_code_allowed")


@pytest.mark.slow
def test_a_runtime_that_refuses(machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW)
    engines(target)
    here = machine(NEW)

    def refuse(self: Any, serialized_engine: Any) -> None:
        self._played.error("Error Code 1: Cuda\n(out of memory)")

    monkeypatch.setattr(here.library.Runtime, "deserialize_cuda_engine", refuse)
    with pytest.raises(BundleError, match=r"TensorRT does not take it: Error Code 1: Cuda \(out of memory\)"):
        vitdeploy.load(target, backend="tensorrt")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.16.1.11", NEW])
def test_a_stripped_engine_takes_the_weights_of_its_onnx(
    version: str, machine: MakeMachine, target: Path
) -> None:
    machine(version)
    bundle = engines(target, version, weights="stripped")
    assert WEIGHT.tobytes() not in bundle.path(PLAN).read_bytes()
    here = machine(version)
    assert verify_bundle(bundle, backends=["tensorrt"]).passed
    assert here.calls("refit_from_file")[0]["model"].endswith("model.onnx")
    assert here.calls("refit_cuda_engine")


def other_weights(folder: Path) -> None:
    path = folder / "model.onnx"
    data = graph("fp32", "float", 2 * WEIGHT)
    path.unlink()
    path.write_bytes(data)


@pytest.mark.slow
def test_other_weights_are_not_put_into_a_stripped_engine(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    reseal(engines(target, weights="stripped"), other_weights)
    here = machine(NEW)
    with pytest.raises(BundleError, match="not the file whose weights the engine needs"):
        vitdeploy.load(target, backend="tensorrt")
    assert not here.calls("refit_from_file")


@pytest.mark.slow
def test_a_record_without_hashes_of_its_weights(machine: MakeMachine, target: Path) -> None:
    def forget(folder: Path) -> None:
        fields = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(fields | {"source_sha256": {}}))

    machine(NEW)
    reseal(engines(target, weights="stripped"), forget)
    with pytest.raises(BundleError, match="not the file whose weights the engine needs"):
        vitdeploy.load(target, backend="tensorrt")


@pytest.mark.slow
def test_weights_that_do_not_fit(machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW)
    engines(target, weights="stripped")
    here = machine(NEW)
    monkeypatch.setattr(here.library.OnnxParserRefitter, "refit_from_file", lambda self, model: False)
    with pytest.raises(BundleError, match="its weights do not fit the engine"):
        vitdeploy.load(target, backend="tensorrt")


@pytest.mark.slow
def test_an_engine_that_fails_while_it_runs(
    machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW)
    engines(target)

    def fail(self: Any, stream_handle: int) -> bool:
        self._played.error("Error Code 1: Cuda Runtime (an illegal\nmemory access)")
        return False

    with vitdeploy.load(target, backend="tensorrt") as predictor:
        monkeypatch.setattr(here.library.IExecutionContext, "execute_async_v3", fail)
        message = r"tensorrt-fp32-sm_89: .* batch size 2; TensorRT said: .* \(an illegal memory access\)"
        with pytest.raises(BundleError, match=message):
            predictor.session.run({"pixel_values": images(2)})
        with pytest.raises(UsageError, match="batch size 9, but tensorrt-fp32-sm_89 serves 1 to 8") as caught:
            predictor.session.run({"pixel_values": images(9)})
    assert str(caught.value.hint).startswith("vitdeploy engine ")
    assert str(caught.value.hint).endswith("--precision fp32 --force --profile MIN,OPT,MAX")


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy.tensorrt.flavours.Flavour.is_installed", False)


def no_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy.tensorrt.cuda.cuda_core_installed", lambda: False)


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(monkeypatch, NEW, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "take_away, reason, hint",
    [
        (no_library, "tensorrt is not installed", 'pip install "vitdeploy[tensorrt]"'),
        (no_cuda_core, "cuda-core is not installed", 'pip install "vitdeploy[tensorrt]"'),
        (no_gpu, "no NVIDIA GPU answers", "its engines can be built without one, not run"),
    ],
)
def test_what_is_missing_is_said(
    take_away: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    hint: str,
    machine: MakeMachine,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(NEW)
    bundle = engines(target)
    take_away(monkeypatch)
    state = get_backend("tensorrt").availability()
    assert (state.ok, state.reason, state.hint) == (False, reason, hint)
    with pytest.raises(VitdeployError, match=reason) as caught:
        verify_bundle(bundle, backends=["tensorrt"])
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_no_gpu_at_load_time(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    engines(target)
    here = machine(NEW, None)
    with pytest.raises(DeviceUnavailable, match="does not run here: no NVIDIA GPU answers") as caught:
        vitdeploy.load(target, backend="tensorrt")
    assert caught.value.exit_code == 3
    assert loads(here) == 0


@pytest.mark.slow
def test_no_library_at_load_time(machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW)
    engines(target)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency) as caught:
        vitdeploy.load(target, backend="tensorrt")
    assert caught.value.exit_code == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "artifact, options, message",
    [
        ("onnx-fp32", {}, "it runs tensorrt engines only"),
        ("tensorrt-fp32-sm_89", {"provider": "cuda"}, "takes no provider"),
        ("tensorrt-fp32-sm_89", {"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_options_that_make_no_sense(
    artifact: str, options: dict[str, str], message: str, machine: MakeMachine, target: Path
) -> None:
    machine(NEW)
    engines(target)
    with pytest.raises(UsageError, match=message):
        vitdeploy.load(target, backend="tensorrt", artifact=artifact, **options)  # type: ignore[arg-type]
