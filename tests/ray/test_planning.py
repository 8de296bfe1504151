"""How a job is planned: actors and threads that fit the machines, pieces that keep all of them busy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import write_bundle
from tests.helpers.quantised_bundles import write_quantised
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError, VitdeployError
from vitdeploy.ray.job import JobRequest, allot, cut, make_plan, on_gpu
from vitdeploy.ray.work import ActorPlan, Item, RayResources, Stamp

STAMP = Stamp(1, 2)


@pytest.mark.parametrize(
    "cpus, workers, threads, expected",
    [
        ((2,), None, None, (2, 1)),
        ((2,), 1, None, (1, 2)),
        ((1,), None, None, (1, 1)),
        ((64,), None, None, (8, 8)),
        ((64,), None, 4, (16, 4)),
        ((8,), 3, None, (3, 2)),
        ((4, 4), 1, None, (1, 4)),
        ((3, 3), 3, None, (3, 1)),
        ((64, 2), None, None, (10, 6)),
    ],
)
def test_sessions_share_the_processors(
    cpus: tuple[int, ...], workers: int | None, threads: int | None, expected: tuple[int, int]
) -> None:
    assert allot(RayResources(cpus), workers, threads, gpu=False, most=10**6) == expected


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 128), min_size=1, max_size=6),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.integers(1, 1000),
)
def test_what_is_allotted_can_be_placed(
    cpus: list[int], workers: int | None, threads: int | None, most: int
) -> None:
    try:
        many, each = allot(RayResources(tuple(cpus)), workers, threads, gpu=False, most=most)
    except UsageError:  # fewer would fit
        assert (workers or 1) * (threads or 1) > min(cpus)
        return
    assert 1 <= many <= most
    assert many <= sum(count // each for count in cpus)
    assert threads is None or each == threads


def test_what_others_take_is_left_to_them() -> None:
    busy = RayResources((8,), free=3)
    assert allot(busy, None, None, gpu=False, most=100) == (3, 1)
    assert allot(busy, 1, None, gpu=False, most=100) == (1, 3)
    assert allot(busy, 4, 2, gpu=False, most=100) == (4, 2)  # asked for: it waits


def test_no_more_sessions_than_images() -> None:
    assert allot(RayResources((16,)), None, None, gpu=False, most=1) == (1, 16)


def test_a_gpu_has_one_session() -> None:
    assert allot(RayResources((16, 16), gpus=2), None, None, gpu=True, most=100) == (2, 16)
    with pytest.raises(DeviceUnavailable, match="no GPU"):
        allot(RayResources((16,)), None, None, gpu=True, most=100)
    with pytest.raises(UsageError, match="do not fit"):
        allot(RayResources((16,), gpus=1), 2, None, gpu=True, most=100)


def test_what_does_not_fit_is_refused_not_waited_for() -> None:
    with pytest.raises(UsageError, match=r"3 workers with 1 threads each do not fit: Ray has 2 CPUs"):
        allot(RayResources((2,)), 3, 1, gpu=False, most=100)
    with pytest.raises(UsageError, match="do not fit"):
        allot(RayResources((2, 2)), None, 3, gpu=False, most=100)


@pytest.mark.slow
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 64))
def test_pieces_are_the_whole_in_full_batches(count: int, workers: int, batch: int) -> None:
    items = [Item(f"/{number}", STAMP) for number in range(count)]
    pieces = list(cut(items, workers, batch))
    assert [item for piece in pieces for item in piece] == items
    assert all(len(piece) % batch == 0 for piece in pieces[:-1])
    assert all(len(piece) < 128 + batch for piece in pieces)


def test_a_row_group_is_a_piece() -> None:
    items = [Item("/a", STAMP, group, group * 10, 10) for group in range(3)]
    assert list(cut(items, 2, 8)) == [[item] for item in items]


def request(bundle: Path, **fields: object) -> JobRequest:
    return JobRequest(bundle=bundle, inputs=("x",), output=bundle.parent / "out", **fields)  # type: ignore[arg-type]


def test_the_plan_says_what_actors_run(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp16", "fp32"), batch=BatchRange(1, 4, 16))
    plan, note = make_plan(request(made.root, top_k=3))
    assert (plan.backend, plan.artifact, plan.batch, plan.top_k) == ("onnxruntime", "onnx-fp32", 4, 3)
    assert (plan.digest, note) == (made.manifest.digest, "")
    assert Path(plan.bundle).is_absolute()
    assert make_plan(request(made.root, artifact="fp16", batch=16))[0].artifact == "onnx-fp16"


def test_a_quantised_plan_is_said(tmp_path: Path) -> None:
    both = write_quantised(tmp_path / "a").root
    plan, note = make_plan(request(both))
    assert (plan.artifact, note) == ("onnx-fp32", "")
    plan, note = make_plan(request(both, artifact="int8"))
    assert (plan.artifact, note) == ("onnx-int8", "")
    plan, note = make_plan(request(write_quantised(tmp_path / "b", precisions=()).root))
    assert plan.artifact == "onnx-int8"
    assert note.startswith("onnx-int8 is quantised; the onnxruntime backend runs no other artifact")


@pytest.mark.parametrize(
    "backend, provider, takes_gpu",
    [
        ("onnxruntime", None, False),
        ("onnxruntime", "cpu", False),
        ("onnxruntime", "cuda", True),
        ("onnxruntime", "tensorrt-rtx", True),
        ("openvino", None, False),
        ("torch", None, False),
        ("triton", None, True),
        ("tensorrt", None, True),
        ("tensorrt-rtx", None, True),
    ],
)
def test_who_takes_a_gpu(backend: str, provider: str | None, takes_gpu: bool) -> None:
    assert on_gpu(ActorPlan("/b", "d", backend, None, provider, 1, None, 5)) == takes_gpu


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch": 17}, "at most 8"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"artifact": "int4"}, "no artifact 'int4'"),
        ({"backend": "onnxrutnime"}, "did you mean 'onnxruntime'"),
    ],
)
def test_what_cannot_be_planned(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    made = write_bundle(tmp_path / "b")
    with pytest.raises(VitdeployError, match=message):
        make_plan(request(made.root, **fields))


def test_vectors_are_planned_with_their_columns(tmp_path: Path) -> None:
    assert make_plan(request(write_bundle(tmp_path / "l").root))[0].vector is None
    for output in ("features", "embedding"):
        made = write_bundle(tmp_path / output, output=output, labels=None)
        assert make_plan(request(made.root))[0].vector == 5


def test_bundles_without_either(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives tokens, neither classes nor a vector"):
        make_plan(request(write_bundle(tmp_path / "t", output="tokens", labels=None).root))
    with pytest.raises(BundleError):
        make_plan(request(tmp_path))
