"""Engines in memory, on the double's runtime and a GPU that is none: numerics, profiles, buffers, graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.gpu import FakeGpu
from tests.fakes.tensorrt import VERSIONS, calls_of, make_tensorrt
from tests.fakes.tensorrt_builds import Built
from tests.helpers.bundles import SIZE, WEIGHT, answer, graph
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.machine.cache import CacheFile
from vitdeploy.tensorrt.caches import KernelCache
from vitdeploy.tensorrt.session import Engine

RTX = "rtx-1.7.1.116"
NEW = "11.4.0.106"
PROFILES = (BatchRange(1, 1, 1), BatchRange(1, 4, 8), BatchRange(8, 16, 32))
INPUT = TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, SIZE, SIZE))
OUTPUT = TensorSpec(name="logits", dtype="float32", shape=("N", WEIGHT.shape[1]))


class Loaded:
    """An engine of the linear classifier with several profiles."""

    def __init__(
        self, version: str = NEW, *, graphs: bool = True, kernels: KernelCache | None = None
    ) -> None:
        self.library = make_tensorrt(version)
        built = Built(self.library, graph("fp32", "float", WEIGHT), shapes=_shapes(PROFILES[0]))
        for batch in PROFILES[1:]:
            profile = built.builder.create_optimization_profile()
            profile.set_shape("pixel_values", *_shapes(batch))
            built.config.add_optimization_profile(profile)
        self.gpu = FakeGpu(self.library)
        self.native = built.engine()
        self.engine = Engine(
            self.library, self.native, self.gpu, (INPUT,), (OUTPUT,), PROFILES, graphs=graphs, kernels=kernels
        )

    def check(self, batch: int, seed: int = 0) -> None:
        """Run one batch and hold it against the answer in float64."""
        images = pixels(batch, seed)
        logits = self.engine.run({"pixel_values": images})["logits"]
        assert (logits.shape, logits.dtype) == ((batch, WEIGHT.shape[1]), np.float32)
        np.testing.assert_allclose(logits, answer(images), rtol=1e-5, atol=1e-4)
        assert not self.gpu.queued  # waited for before it was read

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [call.arguments for call in calls_of(self.library) if call.name == name]


def _shapes(batch: BatchRange) -> list[tuple[int, ...]]:
    return [(size, 3, SIZE, SIZE) for size in (batch.min, batch.opt, batch.max)]


def pixels(batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_batch_of_every_profile_is_computed(version: str) -> None:
    loaded = Loaded(version)
    for batch in range(1, PROFILES[-1].max + 1):
        loaded.check(batch, seed=batch)


@pytest.mark.parametrize("batch, profile", [(1, 0), (2, 1), (8, 1), (9, 2), (32, 2)])
def test_the_tightest_profile_is_taken(batch: int, profile: int) -> None:
    loaded = Loaded()
    loaded.check(batch)
    assert loaded.calls("set_optimization_profile_async") == [{"profile_index": profile, "stream_handle": 77}]


@pytest.mark.parametrize("batch", [0, 33])
def test_a_batch_outside_says_the_profiles(batch: int) -> None:
    with pytest.raises(UsageError, match=f"batch size {batch}, .* serve 1 to 1, 1 to 8, 8 to 32"):
        Loaded().engine.run({"pixel_values": pixels(batch)})


@pytest.mark.slow
def test_buffers_are_made_once() -> None:
    loaded = Loaded()
    assert loaded.gpu.allocations == 4  # of two tensors, on both sides
    for batch in (1, 32, 5, 5, 5, 1):
        loaded.check(batch, seed=batch)
    assert loaded.gpu.allocations == 5  # and the memory that all contexts work in
    loaded.engine.close()
    assert not loaded.gpu.alive


def test_results_stay_what_they_are() -> None:
    loaded = Loaded()
    first = loaded.engine.run({"pixel_values": pixels(3, 1)})["logits"]
    kept = first.copy()
    loaded.check(3, seed=2)
    np.testing.assert_array_equal(first, kept)


def test_a_graph_is_captured_when_a_batch_size_comes_again() -> None:
    loaded = Loaded()
    for run in range(5):
        loaded.check(4, seed=run)
        assert loaded.gpu.captures == (run >= 1)
        assert loaded.gpu.launches == max(0, run - 1)
    assert len(loaded.calls("create_execution_context")) == 2  # a graph's is its own
    assert len({call["memory"] for call in loaded.calls("set_device_memory")}) == 1


def test_no_memory_for_a_graph_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    loaded.check(4)
    monkeypatch.setattr(loaded.library.ICudaEngine, "create_execution_context", lambda *arguments: None)
    for run in range(3):
        loaded.check(4, seed=run)
    assert loaded.gpu.captures == 0


def test_a_graph_is_replayed_between_other_batch_sizes() -> None:
    loaded = Loaded()
    for run in range(4):
        for batch in (3, 6, 16, 1):
            loaded.check(batch, seed=10 * run + batch)
    assert loaded.gpu.captures == 4
    assert loaded.gpu.launches == 8


def test_at_most_sixteen_batch_sizes_have_graphs() -> None:
    loaded = Loaded()
    for run in range(4):
        for batch in range(9, 33):
            loaded.check(batch, seed=run)
    assert loaded.gpu.captures == 16
    assert loaded.gpu.launches == 2 * 16


@pytest.mark.parametrize("graphs", [True, False])
def test_the_time_on_the_gpu_is_that_of_one_run_and_its_copies(graphs: bool) -> None:
    loaded = Loaded(graphs=graphs)
    for run in range(5):  # the second captures a graph, which is no part of the time
        loaded.engine.run({"pixel_values": pixels(4, run)}, timed=True)
        assert loaded.engine.device_seconds == 3  # upload, engine, download
        assert not loaded.gpu.queued
    loaded.check(4)
    assert loaded.engine.device_seconds is None


def test_without_graphs_nothing_is_captured() -> None:
    loaded = Loaded(RTX, graphs=False)
    for run in range(4):
        loaded.check(2, seed=run)
    assert (loaded.gpu.captures, loaded.gpu.launches) == (0, 0)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=30))
def test_any_sequence_of_batch_sizes(batches: list[int]) -> None:
    loaded = Loaded()
    for run, batch in enumerate(batches):
        loaded.check(batch, seed=run)


def test_tensors_on_the_gpu_are_computed_where_they_lie() -> None:
    loaded = Loaded()
    loaded.check(2)
    loaded.check(9)
    made = loaded.gpu.allocations
    for batch in (2, 9, 2):
        images = pixels(batch, batch)
        results = loaded.engine.run_tensors({"pixel_values": torch.from_numpy(images)})
        logits = torch.from_dlpack(results["logits"])
        torch.testing.assert_close(logits.double(), torch.from_numpy(answer(images)), rtol=1e-5, atol=1e-4)
        assert not loaded.gpu.queued
    assert loaded.gpu.allocations == made + 3  # one result each, and no staging
    assert loaded.gpu.captures == 0


def test_a_graph_survives_runs_on_tensors() -> None:
    loaded = Loaded()
    for run in range(3):
        loaded.check(4, seed=run)
    loaded.engine.run_tensors({"pixel_values": torch.from_numpy(pixels(4, 9))})
    loaded.check(4, seed=10)
    assert loaded.gpu.launches == 2


GOOD = torch.zeros(2, 3, SIZE, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "needs the input 'pixel_values'"),
        ({"pixel_values": GOOD.half()}, r"must be \(N, 3, 8, 8\) float32, not \(2, 3, 8, 8\) float16"),
        ({"pixel_values": GOOD[:, :2]}, r"must be \(N, 3, 8, 8\) float32"),
        ({"pixel_values": GOOD[0]}, r"must be \(N, 3, 8, 8\) float32"),
        ({"pixel_values": torch.tensor(0.0)}, r"must be \(N, 3, 8, 8\) float32, not \(\)"),
        ({"pixel_values": GOOD.numpy()}, "must lie on the GPU"),
        ({"pixel_values": GOOD.transpose(2, 3)}, "row by row without gaps"),
        ({"pixel_values": [1.0]}, "list is no tensor"),
        ({"pixel_values": torch.zeros(33, 3, SIZE, SIZE)}, "batch size 33"),
        ({"pixel_values": torch.zeros(0, 3, SIZE, SIZE)}, "batch size 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Loaded().engine.run_tensors(tensors)


@pytest.mark.parametrize("take", ["run", "run_tensors"])
def test_an_engine_that_fails_says_so(take: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    context = loaded.library.IExecutionContext
    monkeypatch.setattr(context, "execute_async_v3", lambda self, stream_handle: False)
    images = pixels(2) if take == "run" else torch.from_numpy(pixels(2))
    with pytest.raises(BundleError, match="could not run the engine at batch size 2"):
        getattr(loaded.engine, take)({"pixel_values": images})


@pytest.mark.parametrize("failing", ["set_input_shape", "set_tensor_address"])
def test_nothing_is_executed_after_a_refusal(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    monkeypatch.setattr(loaded.library.IExecutionContext, failing, lambda *arguments: False)
    with pytest.raises(BundleError, match="could not run"):
        loaded.engine.run({"pixel_values": pixels(2)})
    assert not loaded.calls("execute_async_v3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, method, result",
    [
        ("ICudaEngine", "create_execution_context", None),
        ("IExecutionContext", "set_optimization_profile_async", False),
    ],
)
def test_no_execution_context(owner: str, method: str, result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    monkeypatch.setattr(getattr(loaded.library, owner), method, lambda *arguments: result)
    with pytest.raises(BundleError, match="no execution context"):
        loaded.engine.run({"pixel_values": pixels(2)})


@pytest.mark.parametrize("profiles", [PROFILES[:2], (*PROFILES[:2], BatchRange(8, 16, 64)), PROFILES[::-1]])
def test_profiles_other_than_the_records_are_refused(profiles: tuple[BatchRange, ...]) -> None:
    loaded = Loaded()
    with pytest.raises(BundleError, match=r"the engine's profiles are \[\(1, 1, 1\), \(1, 4, 8\)"):
        Engine(loaded.library, loaded.native, loaded.gpu, (INPUT,), (OUTPUT,), profiles, graphs=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fixed_batch_size(version: str) -> None:
    library = make_tensorrt(version)
    built = Built(library, graph("fp32", "float", WEIGHT, batch=4), shapes=[(4, 3, SIZE, SIZE)] * 3)
    fixed = (INPUT.model_copy(update={"shape": (4, 3, SIZE, SIZE)}),)
    logits = (OUTPUT.model_copy(update={"shape": (4, WEIGHT.shape[1])}),)
    engine = Engine(
        library, built.engine(), FakeGpu(library), fixed, logits, (BatchRange(4, 4, 4),), graphs=True
    )
    for run in range(3):
        images = pixels(4, run)
        np.testing.assert_allclose(engine.run({"pixel_values": images})["logits"], answer(images), atol=1e-4)
    with pytest.raises(UsageError, match="serve 4 to 4"):
        engine.run({"pixel_values": pixels(2)})


def test_rtx_records_its_own_graphs(tmp_path: Path) -> None:
    loaded = Loaded(RTX, graphs=False, kernels=KernelCache(CacheFile(tmp_path / "rtx")))
    loaded.check(2)
    (strategy,) = loaded.calls("cuda_graph_strategy=")
    assert strategy["value"] is loaded.library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_kernels_that_rtx_compiles_are_kept(tmp_path: Path) -> None:
    kernels = KernelCache(CacheFile(tmp_path / "kernels" / "rtx"))
    first = Loaded(RTX, graphs=False, kernels=kernels)
    first.check(1)
    first.check(2)
    first.engine.close()
    kept = kernels.file.read()
    assert kept.startswith(b"runtime cache")
    second = Loaded(RTX, graphs=False, kernels=kernels)
    second.check(2)
    assert [bytes(call["blob"]) for call in second.calls("deserialize")] == [kept]
    assert len(second.calls("set_runtime_cache")) == 1
    second.check(16)
    second.engine.close()
    assert len(kernels.file.read()) > len(kept)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"junk"), lambda path: path.mkdir()])
def test_a_spoiled_kernel_cache_is_no_error(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    spoil(tmp_path / "rtx")
    loaded = Loaded(RTX, graphs=False, kernels=KernelCache(CacheFile(tmp_path / "rtx")))
    loaded.check(2)
    loaded.engine.close()


@pytest.mark.slow
def test_a_closed_engine_that_never_ran(tmp_path: Path) -> None:
    kernels = KernelCache(CacheFile(tmp_path / "rtx"))
    Loaded(RTX, graphs=False, kernels=kernels).engine.close()
    assert not kernels.file.path.exists()
