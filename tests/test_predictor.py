"""Predictions equal a matrix product in float64, whatever the images come as and however many they are."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitdeploy
from tests.helpers.bundles import (
    FEATURES,
    LABELS,
    SIZE,
    SPEC,
    WEIGHT,
    answer,
    answer_images,
    random_image,
    write_bundle,
)
from tests.helpers.quantised_bundles import write_quantised
from vitdeploy.bundle.choices import write_choices
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, ImageError, UsageError
from vitdeploy.machine.identity import this_machine
from vitdeploy.predictor import Predictor
from vitdeploy.scores import softmax


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("predictor") / "b")


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Iterator[Predictor]:
    with vitdeploy.load(bundle) as loaded:
        yield loaded


def probabilities(images: list[Image.Image]) -> np.ndarray:
    logits = answer_images(images)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def assert_right(predictions: list[list], images: list[Image.Image]) -> None:
    expected = probabilities(images)
    assert len(predictions) == len(images)
    for found, row in zip(predictions, expected, strict=True):
        assert [p.index for p in found] == list(np.argsort(-row)[: len(found)])
        assert [p.label for p in found] == [LABELS[p.index] for p in found]
        assert [p.score for p in found] == pytest.approx([row[p.index] for p in found], abs=1e-5)


def test_all_classes_sum_to_one(predictor: Predictor) -> None:
    (found,) = predictor.predict(random_image(0), top_k=99)
    assert len(found) == len(LABELS)
    assert sum(p.score for p in found) == pytest.approx(1, abs=1e-12)
    assert_right([found], [random_image(0)])


@pytest.mark.parametrize("form", ["path", "str", "bytes", "file", "pillow", "array"])
def test_one_image_comes_as_anything(predictor: Predictor, tmp_path: Path, form: str) -> None:
    image = random_image(1)
    path = tmp_path / "one.png"
    image.save(path)
    data = path.read_bytes()
    sources = {"path": path, "str": str(path), "bytes": data, "file": io.BytesIO(data), "pillow": image}
    assert_right(predictor.predict(sources.get(form, np.asarray(image)), top_k=3), [image])


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 20])
def test_many_images(predictor: Predictor, count: int) -> None:
    images = [random_image(seed) for seed in range(count)]
    assert_right(predictor.predict(images), images)
    assert_right(predictor.predict(iter(images)), images)
    assert_right(predictor.predict(np.stack([np.asarray(image) for image in images])), images)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_fixed_batch_is_filled_up(tmp_path: Path, count: int) -> None:
    made = write_bundle(tmp_path / "b", batch=BatchRange(4, 4, 4))
    images = [random_image(seed) for seed in range(count)]
    with vitdeploy.load(made) as predictor:
        assert_right(predictor.predict(images), images)
        assert predictor.logits(images).shape == (count, len(LABELS))


def test_least_batch_above_one_is_filled_up(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", batch=BatchRange(3, 4, 8))
    images = [random_image(seed) for seed in range(5)]
    with vitdeploy.load(made) as predictor:
        assert_right(predictor.predict(images), images)


def test_uint8_input(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", kind="uint8")
    image = random_image(3).resize((31, 17))
    with vitdeploy.load(made) as predictor:
        assert predictor.preprocess(image).dtype == np.uint8
        assert_right(predictor.predict(image), [image])


def test_logits(predictor: Predictor) -> None:
    images = [random_image(seed) for seed in range(5)]
    np.testing.assert_allclose(predictor.logits(images), answer_images(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="no image"):
        predictor.logits([])


@pytest.mark.parametrize("batch", [None, BatchRange(4, 4, 4), BatchRange(3, 4, 8)])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_inputs_of_any_number(tmp_path: Path, batch: BatchRange | None, count: int) -> None:
    made = write_bundle(tmp_path / "b", batch=batch)
    inputs = np.random.default_rng(0).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)
    with vitdeploy.load(made) as predictor:
        np.testing.assert_allclose(predictor.run(inputs), answer(inputs), rtol=1e-4, atol=1e-4)
        few = inputs[: predictor.chunk]
        np.testing.assert_allclose(predictor.run_batch(few)["logits"], answer(few), rtol=1e-4, atol=1e-4)


def test_several_outputs_by_name(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", features=FEATURES)
    inputs = np.random.default_rng(0).normal(size=(9, 3, SIZE, SIZE)).astype(np.float32)
    images = [random_image(seed) for seed in range(3)]
    with vitdeploy.load(made) as predictor:
        for found in (predictor.run(inputs), predictor.outputs(inputs)):
            assert isinstance(found, dict)
            assert list(found) == ["logits", "features"]
            for name, weight in (("logits", WEIGHT), ("features", FEATURES)):
                expected = answer(inputs, weight=weight)
                np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)
        assert_right(predictor.predict(images), images)


def test_nothing_gives_nothing(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


def test_labels_are_indices_where_there_are_none(tmp_path: Path) -> None:
    with vitdeploy.load(write_bundle(tmp_path / "b", labels=None)) as predictor:
        (found,) = predictor.predict(random_image(0))
    assert [p.label for p in found] == [str(p.index) for p in found]


def test_stream_reads_no_further_than_its_batch(predictor: Predictor) -> None:
    taken = 0

    def images() -> Iterator[Image.Image]:
        nonlocal taken
        for seed in range(100):
            taken += 1
            yield random_image(seed)

    next(predictor.stream(images()))
    assert taken == predictor.chunk


def test_a_broken_image_among_many(predictor: Predictor) -> None:
    good = [random_image(seed) for seed in range(4)]
    mixed = [good[0], b"not an image", good[1], good[2], b"", good[3]]
    results = list(predictor.stream(mixed))
    assert [isinstance(result, ImageError) for result in results] == [False, True, False, False, True, False]
    assert_right([result for result in results if not isinstance(result, ImageError)], good)
    with pytest.raises(ImageError, match="not an image"):
        predictor.predict(mixed)


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8)), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_arrays_that_are_no_images(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="not an image"):
        predictor.predict(array)


def test_things_that_are_no_images(predictor: Predictor) -> None:
    with pytest.raises(ImageError, match="int"):
        predictor.predict(5)


def test_top_k_is_positive(predictor: Predictor) -> None:
    with pytest.raises(UsageError, match="top_k"):
        predictor.predict(random_image(0), top_k=0)


@pytest.mark.parametrize("output", ["features", "tokens"])
def test_features_are_no_classes(tmp_path: Path, output: str) -> None:
    made = write_bundle(tmp_path / "b", output=output, labels=None)
    with vitdeploy.load(made) as predictor:
        with pytest.raises(UsageError, match=output):
            predictor.predict(random_image(0))
        with pytest.raises(UsageError, match=output):
            predictor.logits(random_image(0))


@pytest.mark.parametrize("output", ["features", "embedding"])
@pytest.mark.parametrize("batch", [None, BatchRange(4, 4, 4)])
def test_vectors(tmp_path: Path, output: str, batch: BatchRange | None) -> None:
    """Whatever the batch; an image that cannot be read has its error in its place."""
    images = [random_image(seed) for seed in range(5)]
    mixed = [*images[:2], b"not an image", *images[2:]]
    with vitdeploy.load(write_bundle(tmp_path / "b", output=output, labels=None, batch=batch)) as predictor:
        assert (predictor.vectors.name, predictor.vectors.shape[1]) == (output, len(LABELS))
        found = predictor.embed(images)
        assert (found.shape, found.dtype) == ((5, len(LABELS)), np.float32)
        np.testing.assert_allclose(found, answer_images(images), rtol=1e-4, atol=1e-4)
        streamed = list(predictor.stream_vectors(mixed))
        assert isinstance(streamed.pop(2), ImageError)
        np.testing.assert_allclose(streamed, found, rtol=1e-5)
        with pytest.raises(ImageError, match="not an image"):
            predictor.embed(mixed)
        with pytest.raises(UsageError, match="no image"):
            predictor.embed([])


@pytest.mark.parametrize("output", ["logits", "tokens"])
def test_bundles_without_vectors(tmp_path: Path, output: str) -> None:
    with vitdeploy.load(write_bundle(tmp_path / "b", output=output, labels=None)) as predictor:
        for ask in (predictor.embed, lambda image: next(predictor.stream_vectors([image]))):
            with pytest.raises(UsageError, match=f"gives {output}, no vector") as caught:
                ask(random_image(0))
            assert caught.value.hint == "export with --output embedding"


def test_nan_is_no_vector(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", output="features", weight=np.full_like(WEIGHT, np.nan))
    with vitdeploy.load(made) as predictor:
        for ask in (predictor.embed, lambda image: next(predictor.stream_vectors([image]))):
            with pytest.raises(BundleError, match="NaN or infinite features"):
                ask(random_image(0))


def test_images_need_a_preprocessing(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", preprocess=None)
    with vitdeploy.load(made) as predictor, pytest.raises(UsageError, match="preprocessing"):
        predictor.predict(random_image(0))


def test_nan_is_no_prediction(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", weight=np.full_like(WEIGHT, np.nan))
    with vitdeploy.load(made) as predictor, pytest.raises(BundleError, match="NaN"):
        predictor.predict(random_image(0))


def test_the_most_exact_artifact_is_chosen(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("bf16", "fp16", "fp32"))
    with vitdeploy.load(made.root) as predictor:
        assert predictor.session.facts.artifact == "onnx-fp32"
    with vitdeploy.load(made.root, artifact="fp16") as predictor:
        assert predictor.session.facts.precision == "fp16"


@pytest.mark.slow
def test_the_most_exact_that_any_backend_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Predictor.open_most_exact(write_bundle(tmp_path / "a", precisions=("fp16", "fp32"))) as predictor:
        facts = predictor.session.facts
    assert (facts.artifact, facts.backend) == ("onnx-fp32", "onnxruntime")
    narrow = write_bundle(tmp_path / "b", precisions=("bf16",))
    with Predictor.open_most_exact(narrow) as predictor:
        facts = predictor.session.facts
    assert (facts.artifact, facts.backend) == ("onnx-bf16", "openvino")
    beside = write_quantised(tmp_path / "c", precisions=("bf16",))
    with Predictor.open_most_exact(beside) as predictor:
        assert predictor.session.facts.artifact == "onnx-bf16"
    with Predictor.open_most_exact(write_quantised(tmp_path / "d", precisions=())) as predictor:
        assert predictor.session.facts.artifact == "onnx-int8"
    monkeypatch.setattr("vitdeploy.predictor.all_backends", lambda: ())
    with pytest.raises(UsageError, match=r"onnx-bf16: .*bf16"):
        Predictor.open_most_exact(narrow)


def test_an_artifact_that_cannot_run_is_passed_over(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("bf16",))
    with pytest.raises(UsageError, match=r"onnx-bf16: .*bf16"):
        vitdeploy.load(made)


def test_unknown_names_get_a_suggestion(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        vitdeploy.load(bundle, backend="onnxrutnime")
    with pytest.raises(UsageError, match="did you mean 'onnx-fp32'"):
        vitdeploy.load(bundle, artifact="onx-fp32")


def test_closing(bundle: Bundle) -> None:
    with vitdeploy.load(bundle, threads=1) as predictor:
        predictor.predict(random_image(0))
    with pytest.raises(UsageError, match="closed"):
        predictor.predict(random_image(0))


def test_softmax_of_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([1e4, 1e4 - np.log(3)], np.float64)), [0.75, 0.25])


def test_preprocess_gives_what_the_network_reads(predictor: Predictor) -> None:
    image = random_image(2)
    pixels = predictor.preprocess(image)
    assert pixels.shape == (3, SIZE, SIZE)
    np.testing.assert_allclose(answer(pixels[None]), answer_images([image]))
    assert predictor.bundle.manifest.preprocess == SPEC


@pytest.mark.slow
def test_predicting_imports_what_it_runs_and_no_more(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    random_image(0).save(path)
    code = f"""
import sys, vitdeploy
assert "numpy" not in sys.modules
with vitdeploy.load({str(bundle.root)!r}) as predictor:
    predictor.predict({str(path)!r})
print(*({{"torch", "onnx", "transformers", "timm", "typer", "rich"}} & set(sys.modules)))
rooms = ("vitdeploy.tensorrt", "vitdeploy.cli", "vitdeploy.model", "vitdeploy.backends.")
runs = ("vitdeploy.backends.base", "vitdeploy.backends.onnxruntime")
print(*(name for name in sys.modules if name.startswith(rooms) and not name.startswith(runs)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_quantised_artifact_is_never_chosen_unsaid(tmp_path: Path) -> None:
    both = write_quantised(tmp_path / "a")
    with vitdeploy.load(both) as predictor:
        assert (predictor.session.facts.artifact, predictor.note) == ("onnx-fp32", "")
    with vitdeploy.load(both, artifact="int8") as predictor:
        assert (predictor.session.facts.precision, predictor.note) == ("int8", "")
    alone = write_quantised(tmp_path / "b", precisions=())
    with vitdeploy.load(alone) as predictor:
        assert predictor.session.facts.artifact == "onnx-int8"
        assert predictor.note == (
            "onnx-int8 is quantised; the onnxruntime backend runs no other artifact of the bundle"
        )


def test_a_choice_may_be_quantised(tmp_path: Path) -> None:
    choice = Choice(
        machine=this_machine(),
        goal="latency",
        backend="onnxruntime",
        provider="cpu",
        artifact="onnx-int8",
        threads=1,
        batch=4,
        spin=True,
        p50_ms=1.0,
        images_per_s=1.0,
        created="2026-11-21T03:00:00Z",
    )
    made = write_choices(write_quantised(tmp_path / "b"), choice)
    with vitdeploy.load(made.root) as predictor:
        assert (predictor.session.facts.artifact, predictor.chunk) == ("onnx-int8", 4)
        assert predictor.note == (
            "onnxruntime onnx-int8, 1 thread, spinning: picked for latency on this machine on 2026-11-21"
        )
    assert "spin" not in choice.model_copy(update={"spin": False}).model_dump()
