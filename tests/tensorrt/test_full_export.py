"""Engines of the full TensorRT in a bundle: their names, their records, their proof on the double."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.machines import FULL, L4, NEW, OLD, RTX, Machine, MakeMachine
from tests.helpers.bundles import WEIGHT, graph, write_bundle
from tests.helpers.small_bundles import siblings
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable, MissingDependency, ParityError, UsageError
from vitdeploy.exporter.request import EngineRequest, orders_of
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.machine.gpus import Gpu
from vitdeploy.progress import Progress
from vitdeploy.tensorrt.engine_file import read_record
from vitdeploy.tensorrt.records import BuildSettings

H100 = Gpu("NVIDIA H100", (9, 0))


class Heard(Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def request(
    *formats: str,
    arch: tuple[str, ...] = (),
    profiles: Any = (),
    precisions: tuple[str, ...] = (),
    **settings: Any,
) -> EngineRequest:
    return EngineRequest(formats or ("tensorrt",), arch, profiles, BuildSettings.of(**settings), precisions)


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_engines_of_every_precision_are_added_and_proven(
    version: str, machine: MakeMachine, target: Path
) -> None:
    here = machine(version)
    bundle = add_engines(write_bundle(target, precisions=("fp32", "fp16")), request())
    bundle.verify()
    for precision in ("fp32", "fp16"):
        engine, source = bundle.artifact(f"tensorrt-{precision}-sm_89"), bundle.artifact(f"onnx-{precision}")
        stem = f"engines/sm_89/model.{precision}"
        assert (engine.path, engine.files) == (f"{stem}.plan", (f"{stem}.plan", f"{stem}.json"))
        assert (engine.format, engine.precision, engine.targets) == ("tensorrt", precision, ("sm_89",))
        assert (engine.inputs, engine.outputs, engine.batch) == (source.inputs, source.outputs, source.batch)
        assert engine.proof is not None
        assert engine.proof.ok
        record = read_record(bundle.path(f"{stem}.json"))
        data = bundle.path(engine.path).read_bytes()
        assert (record.flavour, record.version, record.gpu) == ("tensorrt", version, "NVIDIA L4")
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert record.source == source.name
        assert record.source_sha256 == {name: bundle.manifest.files[name].sha256 for name in source.files}
        assert record.profiles == (source.batch,)
        assert record.proof == engine.proof
        proven = [(r.backend, r.batch, r.passed) for r in bundle.manifest.parity if r.artifact == engine.name]
        assert proven == [("tensorrt", size, True) for size in (1, 2, 8)]
    assert len(here.calls("parse_from_file")) == 2
    assert siblings(target) == [target.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, hardware, gpu, targets",
    [
        (OLD, "ampere_plus", L4, "sm_80+"),
        (NEW, "ampere_plus", H100, "sm_80+"),
        (NEW, "same_compute_capability", L4, "sm_89"),
        (NEW, "none", H100, "sm_90"),
    ],
)
def test_targets(
    version: str, hardware: str, gpu: Gpu, targets: str, machine: MakeMachine, target: Path
) -> None:
    machine(version, gpu)
    bundle = add_engines(write_bundle(target), request(hardware=hardware))
    engine = bundle.artifact(f"tensorrt-fp32-{targets}")
    assert engine.targets == (targets,)
    assert engine.path == f"engines/{targets}/model.fp32.plan"


def test_several_profiles(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    profiles = (BatchRange(5, 8, 16), BatchRange(1, 1, 4))
    bundle = add_engines(write_bundle(target), request(profiles=profiles))
    engine = bundle.artifact("tensorrt-fp32-sm_89")
    assert read_record(bundle.path(engine.files[1])).profiles == (BatchRange(1, 1, 4), BatchRange(5, 8, 16))
    assert engine.batch == BatchRange(1, 8, 16)
    assert [record.batch for record in bundle.manifest.parity if record.artifact == engine.name] == [1, 8, 16]


@pytest.mark.slow
def test_a_name_that_exists_needs_force(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = add_engines(write_bundle(target), request())
    with pytest.raises(BundleError, match="already has tensorrt-fp32-sm_89") as caught:
        add_engines(bundle, request())
    assert caught.value.hint == "--force replaces it"
    again = add_engines(bundle, request(level=0), force=True)
    assert [artifact.name for artifact in again.manifest.artifacts] == ["onnx-fp32", "tensorrt-fp32-sm_89"]
    assert len(again.manifest.parity) == 3
    record = read_record(again.path("engines/sm_89/model.fp32.json"))
    assert record.settings.level == 0


@pytest.mark.slow
def test_another_gpus_engine_stands_beside(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = add_engines(write_bundle(target), request())
    machine(NEW, H100)
    bundle = add_engines(bundle, request())
    names = [artifact.name for artifact in bundle.manifest.artifacts]
    assert names == ["onnx-fp32", "tensorrt-fp32-sm_89", "tensorrt-fp32-sm_90"]
    assert {record.artifact for record in bundle.manifest.parity} == set(names[1:])


def unchanged(bundle: Bundle) -> None:
    """The bundle on disk is what it was, and nothing lies beside it."""
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    bundle.verify()
    assert siblings(bundle.root) == [bundle.root.name]


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_an_engine_that_computes_something_else_changes_nothing(
    version: str, machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(version)
    bundle = write_bundle(target)
    wrong(here, monkeypatch, graph("fp32", "float", 1.01 * WEIGHT))
    with pytest.raises(
        ParityError, match="tensorrt-fp32-sm_89 on tensorrt, batch 1: relative error"
    ) as caught:
        add_engines(bundle, request())
    assert caught.value.exit_code == 5
    unchanged(bundle)


def wrong(here: Machine, monkeypatch: pytest.MonkeyPatch, model: bytes) -> None:
    """Have every loaded engine compute another graph."""
    original = here.library.Runtime.deserialize_cuda_engine

    def deserialize_cuda_engine(self: Any, serialized_engine: Any) -> Any:
        engine = original(self, serialized_engine)
        engine._played.model = model
        return engine

    monkeypatch.setattr(here.library.Runtime, "deserialize_cuda_engine", deserialize_cuda_engine)


def test_an_engine_that_cannot_be_built_changes_nothing(
    machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW)
    bundle = write_bundle(target, precisions=("fp32", "fp16"))
    original = here.library.Builder.build_serialized_network

    def second_fails(self: Any, network: Any, config: Any) -> Any:
        if len(here.calls("create_network")) > 1:
            raise KeyboardInterrupt
        return original(self, network, config)

    monkeypatch.setattr(here.library.Builder, "build_serialized_network", second_fails)
    with pytest.raises(KeyboardInterrupt):
        add_engines(bundle, request())
    unchanged(bundle)


def test_the_unused_gpu_is_said(machine: MakeMachine, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW)
    monkeypatch.setattr("vitdeploy.tensorrt.cuda.cuda_core_installed", lambda: False)
    heard = Heard()
    bundle = add_engines(write_bundle(target), request(), progress=heard)
    assert not bundle.manifest.parity
    (note,) = heard.notes
    assert note.startswith("tensorrt-fp32-sm_89: built, not yet run (cuda-core is not installed)")


def test_only_the_precisions_that_are_asked_for(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = write_bundle(target, precisions=("fp32", "fp16"))
    names = [a.name for a in add_engines(bundle, request(precisions=("fp16",))).manifest.artifacts]
    assert names == ["onnx-fp32", "onnx-fp16", "tensorrt-fp16-sm_89"]
    with pytest.raises(UsageError, match="has no ONNX artifact in bf16") as caught:
        add_engines(Bundle.open(target), request(precisions=("bf16",)))
    assert caught.value.hint == "it has onnx-fp32, onnx-fp16"


def test_a_fixed_batch_size(machine: MakeMachine, target: Path) -> None:
    machine(NEW)
    bundle = write_bundle(target, batch=BatchRange(4, 4, 4))
    with pytest.raises(UsageError, match="has the fixed batch size 4: no other profile fits"):
        add_engines(bundle, request(profiles=(BatchRange(1, 2, 8),)))
    engine = add_engines(bundle, request()).artifact("tensorrt-fp32-sm_89")
    assert engine.batch == BatchRange(4, 4, 4)


@pytest.mark.slow
def test_auto_takes_what_is_here_and_says_what_is_not(machine: MakeMachine) -> None:
    machine(RTX)
    machine(NEW)
    orders, notes = orders_of(request("auto"))
    assert [(order.flavour.name, order.groups) for order in orders] == [
        ("tensorrt", ((),)),
        ("tensorrt-rtx", (("sm_89",),)),
    ]
    assert not notes
    machine(RTX, None)
    machine(NEW, None)
    orders, notes = orders_of(request("auto"))
    assert not orders
    assert "there is none" in notes[0]
    assert "builds for the GPUs that you name" in notes[1]


def test_what_is_named_must_be_there(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW, None)
    with pytest.raises(DeviceUnavailable, match="the GPU that is here: there is none") as caught:
        orders_of(request())
    assert "tensorrt-rtx builds anywhere" in str(caught.value.hint)
    machine(NEW)
    with pytest.raises(UsageError, match="builds for the GPU that is here, sm_89, not for sm_120"):
        orders_of(request(arch=("sm_120",)))
    assert orders_of(request(arch=("sm_89",)))[0]
    monkeypatch.setattr("vitdeploy.tensorrt.flavours.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="a TensorRT engine needs the library 'tensorrt'") as missing:
        orders_of(request())
    assert (missing.value.exit_code, missing.value.hint) == (3, 'pip install "vitdeploy[tensorrt]"')


@pytest.mark.parametrize(
    "values, message",
    [
        ({"level": 6}, "optimization level 6 does not exist"),
        ({"workspace": 0}, "the workspace must have at least one byte"),
        ({"hardware": "ampere"}, "unknown hardware 'ampere'; did you mean 'ampere_plus'"),
        ({"weights": "striped"}, "unknown weights 'striped'; did you mean 'stripped'"),
        ({"profiles": (BatchRange(1, 1, 1), BatchRange(4, 4, 8))}, "no profile serves batch sizes 2 to 3"),
    ],
)
def test_values_that_no_build_could_serve(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(**values)
