"""Bundles of several image sizes, measured beside each other: which, with what proof, and what is picked."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitdeploy
from tests.helpers.bundles import write_bundle
from tests.helpers.sample_results import SUBJECT, cell, sample_results
from tests.helpers.several_sizes import SIZES, several_sizes
from vitdeploy.benchmark.cases import Choices, cases_of, open_targets
from vitdeploy.benchmark.ranking import choice_of, pick
from vitdeploy.benchmark.report import html_text
from vitdeploy.benchmark.results import Results
from vitdeploy.benchmark.tables import side_by_side
from vitdeploy.benchmark.views import markdown_text
from vitdeploy.bundle.choices import write_choices
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.machine.identity import this_machine
from vitdeploy.predictor import choice_for_this_machine

ORT = ("onnxruntime",)


@pytest.mark.slow
def test_sizes_are_chosen_among_those_that_bundles_have(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many")
    alone = write_bundle(tmp_path / "alone")  # of 8 x 8 pixels
    both = open_targets([bundle, alone])
    assert [target.record.image_size for target in both] == [*SIZES, (8, 8)]
    assert [target.record.flops for target in both] == [64, 256, 128, None]
    assert len({target.name for target in both}) == 2
    assert [t.record.image_size for t in open_targets([bundle], [(16, 16), (8, 8)])] == [(16, 16), (8, 8)]
    with pytest.raises(UsageError, match="there is no image size 32x32") as caught:
        open_targets([bundle], [(8, 8), (32, 32)])
    assert caught.value.hint == "the bundle has 8x8, 16x16, 8x16"
    with pytest.raises(UsageError, match="there is no image size 16x16"):
        open_targets([bundle, alone], [(16, 16)])


@pytest.mark.slow
def test_a_case_is_of_one_size_and_named_as_at_the_first(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many", precisions=("fp32", "fp16"))
    choices = Choices(backends=ORT, artifacts=("fp32",))
    cases = [case for target in open_targets([bundle]) for case in cases_of(target, choices)[0]]
    assert [(case.artifact, case.job["artifact"], case.job["image_size"]) for case in cases] == [
        ("onnx-fp32", "onnx-fp32", None),
        ("onnx-fp32", "onnx-fp32-16x16", (16, 16)),
        ("onnx-fp32", "onnx-fp32-8x16", (8, 16)),
    ]
    by_name = Choices(backends=ORT, artifacts=("onnx-fp16",))
    assert len(cases_of(open_targets([bundle], [(16, 16)])[0], by_name)[0]) == 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Results]:
    bundle = several_sizes(tmp_path_factory.mktemp("sizes") / "many")
    return bundle, vitdeploy.bench(bundle, backends=ORT, batches=(1, 2), budget=0.3)


@pytest.mark.slow
def test_every_size_is_proven_and_measured(measured: tuple[Bundle, Results]) -> None:
    _, found = measured
    assert [(c.image_size, c.artifact, c.batch) for c in found.cells] == [
        (size, "onnx-fp32", batch) for size in SIZES for batch in (1, 2)
    ]
    assert all(cell.valid for cell in found.cells)
    assert [subject.image_size for subject in found.subjects] == list(SIZES)
    assert len({found.key(cell) for cell in found.cells}) == 6
    assert "8x16" in markdown_text(found)


@pytest.mark.slow
def test_the_graph_of_another_size_is_wrong(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many", table_of={(16, 16): (8, 8)})
    found = vitdeploy.bench(bundle, backends=ORT, image_sizes=(8, 16), batches=(1,), budget=0.1)
    assert [(cell.image_size, cell.valid) for cell in found.cells] == [((8, 8), True), ((16, 16), False)]


@pytest.mark.slow
def test_a_choice_for_each_size(measured: tuple[Bundle, Results], tmp_path: Path) -> None:
    _, results = measured
    bundle = several_sizes(tmp_path / "many")
    name = results.subjects[0].name
    for size, place in ((SIZES[0], None), (SIZES[1], SIZES[1])):
        found = pick(results, name, "latency", image_size=size)
        assert found.image_size == size
        bundle = write_choices(bundle, choice_of(found, results, "latency", None, place))
    machine = this_machine()
    kept = [(c.image_size, c.artifact) for c in Bundle.open(bundle.root).manifest.choices]
    assert kept == [(None, "onnx-fp32"), ((16, 16), "onnx-fp32-16x16")]
    for size, artifact in zip(SIZES, ("onnx-fp32", "onnx-fp32-16x16", "onnx-fp32-8x16"), strict=True):
        (choice,) = bundle.at_size(size).manifest.choices
        # Where nothing was picked for a size, what was for the first one is taken.
        assert (choice.machine, choice.artifact, choice.image_size) == (machine, artifact, None)
        chosen, _ = choice_for_this_machine(bundle.at_size(size))
        assert chosen == choice
    again = choice_of(
        pick(results, name, "throughput", image_size=SIZES[1]), results, "throughput", None, SIZES[1]
    )
    assert [c.goal for c in write_choices(bundle, again).manifest.choices] == ["latency", "throughput"]


@pytest.mark.slow
def test_a_choice_for_a_further_size_alone_is_not_the_first_ones(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many")
    results = sample_results(cells=(cell(subject="linear", image_size=(16, 16), p50_ms=1.0),))
    choice = choice_of(results.cells[0], results, "latency", None, (16, 16))
    bundle = write_choices(bundle, choice.model_copy(update={"machine": this_machine()}))
    assert choice_for_this_machine(bundle)[0] is None
    assert bundle.at_size((8, 8)).manifest.choices == ()
    assert bundle.at_size((8, 16)).manifest.choices == ()
    (own,) = bundle.at_size((16, 16)).manifest.choices
    assert own.artifact == "onnx-fp32-16x16"


# --- one table for several models ---------------------------------------------------------------------------


def several() -> Results:
    sized = SUBJECT.model_copy(update={"flops": 35_100_000_000})
    larger = sized.model_copy(update={"image_size": (384, 384), "flops": 111_000_000_000})
    resnet = SUBJECT.model_copy(
        update={"name": "resnet", "model": "timm-resnet50", "parameters": 25_557_032, "flops": 8_178_000_000}
    )
    cells = (
        cell(p50_ms=80.0),
        cell(p50_ms=300.0, image_size=(384, 384)),
        cell(p50_ms=30.0, subject="resnet"),
        cell(p50_ms=None, subject="resnet", batch=8, status="failed", reason="out of memory"),
    )
    return sample_results(subjects=(sized, larger, resnet), cells=cells)


def test_models_and_sizes_stand_in_one_table() -> None:
    table = side_by_side(several())
    titles = [column.title for column in table.columns]
    assert titles[:4] == ["model", "size", "GFLOPs", "M params"]
    assert [row.entries[:4] for row in table.rows[:3]] == [
        ("vit_base_patch16_224", "224x224", "35.1", "86.6"),
        ("vit_base_patch16_224", "384x384", "111", "86.6"),
        ("timm-resnet50", "224x224", "8.18", "25.6"),
    ]
    assert (table.rows[3].kind, table.rows[3].note) == ("failed", "FAILED: out of memory")
    text = markdown_text(several())
    assert "### Side by side" in text
    assert text.index("### Side by side") < text.index("384×384")
    assert "### Side by side" not in markdown_text(sample_results())


@pytest.mark.slow
def test_the_report_has_the_table_of_several_models() -> None:
    page = html_text(several())
    assert page.count('<h2 id="side-by-side">Side by side</h2>') == 1
    assert "384x384" in page
    assert page.count("<figcaption>Latency against image size, vit-b16, batch 1</figcaption>") == 1
    assert "Latency against image size, resnet" not in page, "it has one"
    assert "Side by side" not in html_text(sample_results())


def test_bundles_of_one_model_are_told_apart() -> None:
    other = SUBJECT.model_copy(update={"name": "vit-b16 (other)"})
    results = sample_results(subjects=(SUBJECT, other), cells=(cell(), cell(subject="vit-b16 (other)")))
    assert [row.entries[0] for row in side_by_side(results).rows] == ["vit-b16", "vit-b16 (other)"]
