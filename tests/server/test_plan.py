"""Plans of served bundles: measured once, kept for this machine, followed; what is asked for wins."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.asgi import application
from tests.helpers.several_sizes import several_sizes
from vitdeploy.backends.base import Options
from vitdeploy.bundle.choices import files_of, write_choices
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.errors import UsageError
from vitdeploy.machine.identity import this_machine
from vitdeploy.machine.processors import Share
from vitdeploy.predictor import Predictor, choose
from vitdeploy.server import loading, plan, repository
from vitdeploy.server.loading import LoadedBundle, ModelSettings, load_bundle
from vitdeploy.server.plan import Wanted, keeps, kept_plan, plan_line

BRIEF = 0.02
"""Seconds: enough to measure something."""


@pytest.fixture
def own(linear: Path, tmp_path: Path) -> Path:
    """A copy of the linear classifier that a test may change."""
    return Path(shutil.copytree(linear, tmp_path / "served" / "linear.bundle"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processors, whatever this one has."""
    monkeypatch.setattr(plan, "processors", lambda: 4)
    monkeypatch.setattr(plan, "cores", lambda: 4)


@contextmanager
def loaded(bundle: Path, **settings: Any) -> Iterator[LoadedBundle]:
    found = load_bundle(bundle, ModelSettings(**{"plan_seconds": BRIEF, **settings}))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The plans that were measured."""
    found: list[Choice] = []

    def measure(*arguments: Any) -> Any:
        result = plan.measured_plan(*arguments)
        found.append(result[0])
        return result

    monkeypatch.setattr(loading, "measured_plan", measure)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_real_model(digits_onnx: Path, tmp_path: Path, backend: str) -> None:
    """The plan is one of this machine's, its sessions answer rightly, and the next start has it."""
    folder = Path(shutil.copytree(digits_onnx, tmp_path / "digits.bundle"))
    with loaded(folder, backend=backend, plan_seconds=1.0) as first:
        (size,) = first.sizes
        assert size.plan is not None
        assert Share(size.plan.concurrency, size.plan.threads) in Wanted().shares
        assert len(size.predictors) == size.plan.concurrency
        assert size.rules.gather == size.plan.batch
        assert (size.plan.goal, size.plan.backend, size.plan.artifact) == ("serving", backend, "onnx-fp32")
        (line,) = first.notes
        assert line == f"plan: {plan_line(size.plan)}"
        pixels = size.view.golden()["pixel_values"][:1]
        answers = [predictor.outputs(pixels)["logits"] for predictor in size.predictors]
        first_predictor, *others = size.predictors
        first_predictor.close()
        for predictor in others:  # what one had in common with the rest is still theirs
            assert np.array_equal(predictor.outputs(pixels)["logits"], answers[0])
    with loaded(folder, backend=backend) as again:
        assert again.sizes[0].plan == size.plan
        assert again.notes[0].endswith(f", as measured on {size.plan.created[:10]}")
    assert Bundle.open(folder).manifest.choices == (size.plan,)
    Bundle.open(folder).verify()


def test_measured_once(own: Path, measured: list[Choice]) -> None:
    for _ in range(2):
        with loaded(own) as found:
            assert found.bundle.manifest.choices == tuple(measured)
            assert found.bundle.manifest.digest == Bundle.open(own).manifest.digest
    assert len(measured) == 1
    with Predictor.open(own) as predictor:
        assert (predictor.note, predictor.chunk) == ("", Bundle.open(own).artifact("fp32").batch.opt)


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {"onnxruntime": "1.0"}},
        {"files": {"model.onnx": "0" * 64}},
        {"machine": ("another",)},
        {"backend": "openvino"},
        {"max_latency_ms": 5.0},
    ],
    ids=str,
)
def test_what_holds_no_more_is_measured_again(
    own: Path, measured: list[Choice], change: dict[str, Any]
) -> None:
    with loaded(own) as found:
        before = found.sizes[0].plan
    assert before is not None
    write_choices(Bundle.open(own), before.model_copy(update=change))
    again = Bundle.open(own)
    others = [choice for choice in again.manifest.choices if choice != before]
    assert len(others) == 1
    write_only(again, others[0])
    with loaded(own):
        assert len(measured) == 2
    kept = Bundle.open(own).manifest.choices
    assert measured[1] in kept
    assert len(kept) == (2 if {"machine", "backend"} & {*change} else 1), "in the place of the old one"


def write_only(bundle: Bundle, choice: Choice) -> None:
    with bundle.edit() as writer:
        writer.seal(bundle.manifest.model_copy(update={"choices": (choice,)}))
        writer.commit()


def test_a_bundle_that_cannot_be_written(own: Path, measured: list[Choice]) -> None:
    (own / "mine.txt").write_text("a file of the user's, which no new manifest may swallow")
    with loaded(own) as found:
        assert found.sizes[0].plan == measured[0]
        assert "the plan is measured again at the next start" in found.notes[1]
    assert Bundle.open(own).manifest.choices == ()


def test_nothing_is_measured_without_time(own: Path, measured: list[Choice]) -> None:
    with loaded(own, plan_seconds=0.0) as found:
        assert (found.sizes[0].plan, found.notes, len(found.sizes[0].predictors)) == (None, (), 1)
    with loaded(own) as found:
        kept = found.sizes[0].plan
    with loaded(own, plan_seconds=0.0) as found:
        assert found.sizes[0].plan == kept
    assert len(measured) == 1


@pytest.mark.parametrize("picked", ["latency", "throughput"])
def test_what_was_picked(own: Path, measured: list[Choice], picked: str) -> None:
    """For throughput it is how to serve, too; for latency it is what to serve."""
    bundle = Bundle.open(own)
    choice = Choice(
        machine=this_machine(), goal=picked, backend="openvino", provider=None, artifact="onnx-fp32",
        threads=1, batch=2, concurrency=2, p50_ms=1.0, images_per_s=1000.0, created="2026-11-21T00:00:00Z",
    )  # fmt: skip
    write_choices(bundle, choice)
    with loaded(own) as found:
        (size,) = found.sizes
        assert size.predictors[0].session.facts.backend == "openvino"
        if picked == "throughput":
            assert (len(size.predictors), size.rules.gather, measured) == (2, 2, [])
            assert found.notes[0].endswith(", as picked for throughput on 2026-11-21")
        else:
            assert [one.backend for one in measured] == ["openvino"]
    goals = [one.goal for one in Bundle.open(own).manifest.choices]
    assert goals == (["throughput"] if picked == "throughput" else ["latency", "serving"])
    again = write_choices(Bundle.open(own), choice.model_copy(update={"goal": "throughput", "batch": 4}))
    assert [(one.goal, one.batch) for one in again.manifest.choices] == [("throughput", 4)], (
        "the plan is older"
    )


def test_what_the_user_says_wins(own: Path, measured: list[Choice], machine: None) -> None:
    with loaded(own):
        pass
    with loaded(own, instances=2) as found:
        assert (len(found.sizes[0].predictors), measured[1].threads) == (2, 2)
    with loaded(own, options=Options(threads=1), max_batch=2) as found:
        assert (measured[2].threads, measured[2].batch, found.sizes[0].rules.gather) == (1, 2, 2)
    with loaded(own, instances=3, options=Options(threads=1), max_batch=2) as found:
        assert (len(found.sizes[0].predictors), found.sizes[0].plan, len(measured)) == (3, None, 3)
    with loaded(own, buckets=(1, 4)):
        assert measured[3].batch in (1, 4, 8)
    assert Bundle.open(own).manifest.choices == (measured[0],), "a plan for nobody else"


def test_what_is_left_to_search(machine: None) -> None:
    assert Wanted().shares == (Share(1, None), Share(2, 2), Share(4, 1))
    assert Wanted(sessions=3).shares == (Share(3, 1),)
    assert Wanted(sessions=1).shares == (Share(1, None),)
    assert Wanted(threads=2).shares == (Share(1, 2), Share(2, 2))
    assert Wanted(threads=8).shares == (Share(1, 8),)
    assert Wanted(sessions=2, threads=8).shares == (Share(2, 8),)


def test_a_latency_that_nothing_keeps(own: Path) -> None:
    with loaded(own, max_latency_ms=1e-6) as found:
        (size,) = found.sizes
        assert size.plan is not None
        assert not keeps(size.plan)
        assert found.notes[0].endswith("; no plan keeps 1e-06 ms, this one comes nearest")
    assert Bundle.open(own).manifest.choices == (), "the next start may be luckier"
    with loaded(own, max_latency_ms=1e6) as found:
        assert found.sizes[0].plan == Bundle.open(own).manifest.choices[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"plan_seconds": 1.0, "instances": 1, "max_batch": 1, "options": Options(threads=1)}],
)
def test_a_latency_without_a_plan(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--max-latency-ms chooses among plans"):
        ModelSettings(max_latency_ms=5.0, **settings)


def test_every_image_size_has_its_own(tmp_path: Path, measured: list[Choice]) -> None:
    root = several_sizes(tmp_path / "many").root
    with loaded(root) as found:
        sizes = [size.plan and size.plan.image_size for size in found.sizes]
        assert sizes == [None, *(size.view.place for size in found.sizes[1:])]
        assert found.bundle.manifest.choices == tuple(measured)
    with loaded(root) as found:
        assert len(measured) == len(found.sizes)
        assert [size.plan for size in found.sizes] == measured
    view = Bundle.open(root).at_size(found.bundle.sizes[1])
    assert kept_plan(view, choose(view, None, None, Options()), None) == measured[1]
    assert [choice.goal for choice in view.manifest.choices] == ["serving"]


def test_a_server_does_not_load_again_what_it_wrote(
    own: Path, twice: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Choice]
) -> None:
    """Its watcher takes the bundle with the plan for what it serves; another that is put there is loaded, and
    runs by the same plan."""
    states: list[Any] = []

    async def main() -> None:
        async with application(own, plan_seconds=BRIEF) as served:
            (entry,) = served.service.repository._entries.values()
            assert entry.manifest == repository._manifest_state(own)
            digest = (await served.ask("GET", "/v2/models/linear")).document["parameters"]["bundle_digest"]
            assert digest == Bundle.open(own).manifest.digest
            states.append(entry.plans)
            shutil.rmtree(own)
            shutil.copytree(twice, own)
            assert entry.manifest != repository._manifest_state(own)
            assert (await served.ask("POST", "/v2/repository/models/linear/load")).status == 200
            states.append(entry.plans)

    asyncio.run(main())
    assert states[0] == states[1] == {None: measured[0]}
    assert len(measured) == 1
    assert Bundle.open(own).manifest.choices == ()


def test_files_of_an_artifact(linear: Path) -> None:
    bundle = Bundle.open(linear)
    artifact = bundle.artifact("fp32")
    assert set(files_of(bundle, artifact)) == set(artifact.files)
    assert files_of(bundle, None) == {}
