"""The model compiled ahead of time: right at every batch size, and compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.models import pixels, random_state, random_vit
from tests.helpers.weights_bundles import CONFIG, SPEC, artifact, golden, write_weights
from vitdeploy.backends import aotinductor
from vitdeploy.backends.aotinductor import AotInductor, _Job
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError
from vitdeploy.machine.cache import cache_folder
from vitdeploy.model.reference import forward_float64
from vitdeploy.verification.local import runnable
from vitdeploy.verification.parity import check_session

Make = Callable[..., Bundle]

ONE_BLOCK = dataclasses.replace(CONFIG, depth=1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def entries() -> list[Path]:
    return sorted(path for path in (cache_folder() / aotinductor.KIND).iterdir() if path.is_dir())


class Compiler:
    """PyTorch's compiler, as far as the backend calls it: a package is the exported program itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", self.compile)
        monkeypatch.setattr("torch._inductor.aoti_load_package", self.load)

    def compile(
        self, program: torch.export.ExportedProgram, *, package_path: str, inductor_configs: dict[str, Any]
    ) -> str:
        assert not any(parameter.requires_grad for parameter in program.parameters())
        self.calls.append(inductor_configs)
        if self.failure is not None:
            raise self.failure
        torch.export.save(program, package_path)
        return package_path

    def load(self, path: str, device_index: int) -> Any:
        assert device_index == -1
        try:
            return torch.export.load(path).module()
        except Exception as error:
            raise RuntimeError("no\npackage") from error


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_graph_is_the_reference(
    weights_bundle: Make, compiler: Compiler, precision: ArtifactPrecision
) -> None:
    with AotInductor().load(weights_bundle(), artifact(precision), Options(threads=1)) as session:
        records = check_session(session, golden(), batches=[1, 2, 3, 4])
        assert all(record.passed for record in records), records
        assert session.facts.backend == "aotinductor"
        assert session.facts.executes == session.facts.precision == precision
        with pytest.raises(UsageError, match=f"onnx-{precision} serves 1 to 4"):
            session.run({"pixel_values": pixels(CONFIG, 5).numpy()})
        assert session.device_seconds is None
    assert compiler.calls == [{"cpp.dynamic_threads": True, "freezing": True}]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [BatchRange(1, 1, 1), BatchRange(4, 4, 4), BatchRange(1, 1, 2)])
def test_ranges_of_batch_sizes(weights_bundle: Make, compiler: Compiler, batch: BatchRange) -> None:
    chosen = artifact("fp32").model_copy(update={"batch": batch})
    with AotInductor().load(weights_bundle(), chosen, Options()) as session:
        records = check_session(session, golden(), batches=[batch.min, batch.max])
    assert all(record.passed for record in records)


@pytest.mark.slow
def test_weights_alone_take_any_batch_size(weights_bundle: Make, compiler: Compiler) -> None:
    with AotInductor().load(weights_bundle(), None, Options()) as session:
        assert session.facts.batch is None
        records = check_session(session, golden(), batches=[1, 2, 70])
    assert all(record.passed for record in records)


@pytest.mark.slow
def test_several_outputs(weights_bundle: Make, compiler: Compiler) -> None:
    others = ("tokens", "layer_0")
    for outputs in (("logits", *others), ("logits",)):  # one is not taken for the other
        with AotInductor().load(weights_bundle(outputs=outputs), None, Options()) as session:
            records = check_session(session, golden(others=others), batches=[3])
        assert [record.output or "logits" for record in records] == list(outputs)
        assert all(record.passed for record in records), records
    assert len(compiler.calls) == 2


@pytest.mark.slow
def test_uint8_images_are_normalised_by_the_session(weights_bundle: Make, compiler: Compiler) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(5, *CONFIG.image_size, 3), dtype=np.uint8)
    exact = (images / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    reference = forward_float64(random_vit(CONFIG), torch.from_numpy(exact.transpose(0, 3, 1, 2)))
    with AotInductor().load(weights_bundle(input="uint8"), None, Options()) as session:
        records = check_session(session, {"pixel_values": images, "reference": reference.numpy()})
    assert all(record.passed for record in records), records


@pytest.mark.slow
def test_it_is_compiled_once(weights_bundle: Make, compiler: Compiler) -> None:
    for _ in range(2):
        with AotInductor().load(weights_bundle(), artifact("fp32"), Options()) as session:
            assert all(record.passed for record in check_session(session, golden(), batches=[3]))
    assert len(compiler.calls) == 1
    assert len(entries()) == 1


@pytest.mark.slow
def test_whatever_changes_the_code_changes_the_entry(
    weights_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = BatchRange(1, 2, 4)

    def name(precision: ArtifactPrecision = "fp32", batch: BatchRange | None = usual, **bundle: Any) -> str:
        return _Job(weights_bundle(**bundle), precision, batch, "cpu").name

    same = name()
    assert name() == same
    names = [
        same,
        name("bf16"),
        name(batch=None),
        name(batch=BatchRange(1, 2, 8)),
        name(batch=BatchRange(1, 4, 4)),
        name(output="features"),
        name(input="uint8"),
        name(state=random_state(CONFIG, seed=1)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(aotinductor, "cpu_info", lambda: {"model name": "another"})
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        names.append(_Job(weights_bundle(), "fp32", usual, "cuda:0").name)
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [RuntimeError("g++\nsays no"), OSError("disk full"), TypeError("odd")])
def test_a_failed_compilation(weights_bundle: Make, compiler: Compiler, failure: Exception) -> None:
    compiler.failure = failure
    with pytest.raises(BundleError, match="AOTInductor failed: ") as caught:
        AotInductor().load(weights_bundle(), None, Options())
    assert "\n" not in caught.value.message
    assert not entries()
    compiler.failure = None
    AotInductor().load(weights_bundle(), None, Options()).close()


@pytest.mark.slow
def test_a_new_package_that_does_not_load(
    weights_bundle: Make, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, device_index: int) -> None:
        raise RuntimeError("no such\nsymbol")

    monkeypatch.setattr("torch._inductor.aoti_load_package", refuse)
    with pytest.raises(BundleError, match="cannot be compiled: no such symbol"):
        AotInductor().load(weights_bundle(), None, Options())


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    availability = get_backend("aotinductor").availability()
    assert (availability.ok, availability.hint) == (False, "install g++")
    assert availability.reason == "AOTInductor needs a C++ compiler"


def test_a_missing_gpu_is_an_error(weights_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="finds 0 CUDA devices, not cuda:0"):
        AotInductor().load(weights_bundle(), None, Options(device="cuda:0"))


@pytest.mark.parametrize(
    "backends, models, listed",
    [(None, False, False), (None, True, True), (["aotinductor"], False, True), (["torch"], False, False)],
)
def test_it_is_verified_by_name_only_and_measured_by_default(
    weights_bundle: Make, backends: list[str] | None, models: bool, listed: bool
) -> None:
    bundle = weights_bundle()
    bundle.manifest = bundle.manifest.model_copy(update={"artifacts": (artifact("fp32"),)})
    pairs = runnable(bundle, backends, models=models)
    found = [(p.name, p.reason) for p in pairs if p.backend.name == "aotinductor"]
    assert found == ([("onnx-fp32", None)] if listed else [])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, Path]]:
    """A model of one block (the compiler takes seconds for each), compiled into a cache of its own."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        bundle = write_weights(folder / "bundle", ONE_BLOCK)
        AotInductor().load(bundle, artifact("fp32"), Options(threads=2)).close()
        yield bundle, folder


@pytest.mark.slow
def test_compiled_for_real(compiled: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, folder = compiled
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(
        "torch._inductor.aoti_compile_and_package", lambda *_, **__: pytest.fail("compiled again")
    )
    for threads in (1, 2):
        with AotInductor().load(bundle, artifact("fp32"), Options(threads=threads)) as session:
            records = check_session(session, golden(ONE_BLOCK), batches=[1, 2, 3, 4])
            assert all(record.passed for record in records), records
