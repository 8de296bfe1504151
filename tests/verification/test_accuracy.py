"""Right answers are counted, and the interval of their difference holds what it claims to hold."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitdeploy
from tests.helpers.bundles import LABELS, answer_images, random_image, write_bundle
from vitdeploy.bundle.files import sha256
from vitdeploy.data import digits_folder, digits_heldout
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.verification.accuracy import (
    AccuracyRecord,
    LabelledImages,
    bundled_images,
    check_max_drop,
    compare_accuracy,
    judge_drop,
    judge_quantised,
    paired_interval,
    score,
    top_classes,
)


def places(*rows: str) -> np.ndarray:
    """Each character is a class."""
    return np.array([[int(index) for index in row] for row in rows], np.int64)


LABELLED = np.array([0, 1, 2, 3], np.int64)
MODEL = places("01234", "10234", "01234", "98765")
REFERENCE = places("01234", "01234", "20134", "34567")


def test_counts() -> None:
    found = score("onnx-fp16", "onnxruntime", MODEL, REFERENCE, LABELLED)
    assert (found.images, found.correct, found.agree, found.top5) == (4, 2, 1, 3)
    assert score("m", "b", MODEL[:, :1], REFERENCE[:, :1], LABELLED).top5 is None


def test_comparison() -> None:
    found = compare_accuracy(MODEL, REFERENCE, LABELLED)
    assert (found.images, found.top1, found.top5) == (4, 0.5, 0.75)
    assert (found.reference_top1, found.reference_top5, found.top1_difference) == (0.75, 1.0, -0.25)
    assert found.top1_interval == paired_interval(both=1, first=1, second=2, trials=4)
    few = compare_accuracy(MODEL[:, :1], REFERENCE[:, :1], LABELLED)
    assert (few.top5, few.reference_top5) == (None, None)
    assert few.top1_interval == found.top1_interval


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="0, 0 and 0 images"):
        compare_accuracy(MODEL[:0], REFERENCE[:0], LABELLED[:0])
    with pytest.raises(ValueError, match="3, 4 and 4 images"):
        compare_accuracy(MODEL[:3], REFERENCE, LABELLED)


# --- the gate --------------------------------------------------------------------------------------------


def record(images: int, both: int, gained: int, lost: int) -> AccuracyRecord:
    """Of a model that is right with the reference, where it is wrong, and the other way round."""
    labels = np.zeros(images, np.int64)
    model, reference = np.ones((2, images, 1), np.int64)
    model[: both + gained] = 0
    reference[:both] = 0
    reference[both + gained : both + gained + lost] = 0
    return score("onnx-fp16", "onnxruntime", model, reference, labels)


@pytest.mark.parametrize(
    "drop, allowed, held",
    [
        (record(1000, 900, 0, 5), 0.5, True),  # exactly as much
        (record(1000, 900, 0, 6), 0.5, False),
        (record(1000, 900, 7, 14), 0.7, True),  # 0.7 is no binary fraction
        (record(1000, 900, 6, 0), 0.0, True),  # better than the reference
        (record(1000, 900, 0, 1), 0.0, False),
    ],
)
def test_the_observed_drop_decides(drop: AccuracyRecord, allowed: float, held: bool) -> None:
    assert judge_drop(drop, allowed)[0] is held


def test_what_is_said_of_a_drop() -> None:
    """Counts of Bentur et al., of the published interval above, as points; and as what it cannot tell."""
    found = record(images=21, both=1, gained=1, lost=7)
    assert found.top1_difference == pytest.approx(-6 / 21)
    held, said = judge_drop(found, 20)
    assert not held
    assert said == (
        "top-1 9.52 %, 28.57 points below the reference (95 % interval 2.56 to 50.69), "
        "more than the 20 allowed; 21 images cannot tell: the interval holds 20"
    )
    held, said = judge_drop(found, 51)
    assert held
    assert said.endswith("within the 51 allowed")


@pytest.mark.parametrize("most", [-0.1, 100.5, math.nan, math.inf])
def test_no_number_of_points(most: float) -> None:
    with pytest.raises(UsageError, match="not a number of percentage points"):
        check_max_drop(most, "data")


# --- the interval ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, low, high",
    [
        # Fagerland, Lydersen, Laake, "Recommended tests and confidence intervals for paired binomial
        # proportions", Statistics in Medicine 33 (2014): airway hyper-responsiveness of Bentur et al.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_published_example(table: tuple[int, int, int, int], low: float, high: float) -> None:
    both, first, second, neither = table
    found = paired_interval(both, first, second, both + first + second + neither)
    assert found == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_uncorrelated_shares_have_the_interval_of_independent_ones() -> None:
    """Then it is Newcombe's other one (his method 10 for independent shares), from two Wilson intervals."""
    from scipy.stats import binomtest

    both, first, second, neither = 12, 18, 8, 12
    one, other = (binomtest(k, 50).proportion_ci(0.95, method="wilson") for k in (30, 20))
    low = 0.2 - math.hypot(0.6 - one.low, other.high - 0.4)
    high = 0.2 + math.hypot(one.high - 0.6, 0.4 - other.low)
    found = paired_interval(both, first, second, both + first + second + neither)
    assert found == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


@pytest.mark.slow
@given(st.lists(st.integers(0, 200), min_size=4, max_size=4).filter(any))
def test_any_counts(table: list[int]) -> None:
    both, first, second, _ = table
    trials = sum(table)
    low, high = paired_interval(both, first, second, trials)
    difference = (first - second) / trials
    assert -1 <= low <= difference <= high <= 1
    assert low < high
    mirrored = paired_interval(both, second, first, trials)
    assert mirrored == (pytest.approx(-high, abs=1e-12), pytest.approx(-low, abs=1e-12))


@pytest.mark.parametrize("table", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_one_image_says_next_to_nothing(table: tuple[int, int, int]) -> None:
    low, high = paired_interval(*table, 1)
    assert high - low > 1


@pytest.mark.parametrize("both", [0, 225, 446, 450])
def test_models_that_never_differ(both: int) -> None:
    low, high = paired_interval(both, 0, 0, 450)
    assert low == pytest.approx(-high, abs=1e-12)
    assert 0.001 < high < 0.03


@pytest.mark.parametrize(
    "trials, shares",
    [
        (450, (0.97, 0.01, 0.012, 0.008)),  # like digits: nearly all right, both times
        (100, (0.7, 0.1, 0.05, 0.15)),
        (30, (0.4, 0.2, 0.2, 0.2)),
    ],
)
def test_it_holds_the_true_difference_as_often_as_it_says(
    trials: int, shares: tuple[float, float, float, float]
) -> None:
    drawn = np.random.default_rng(0).multinomial(trials, shares, size=4000)
    true = shares[1] - shares[2]
    intervals = [paired_interval(*map(int, row[:3]), trials) for row in drawn]
    held = np.mean([low <= true <= high for low, high in intervals])
    assert 0.935 < held < 0.995  # 0.95 within what 4000 draws tell; conservative where failures are rare


# --- models ---------------------------------------------------------------------------------------------


def test_few_classes_have_first_places_only(tmp_path: Path) -> None:
    images = [random_image(seed) for seed in range(7)]
    with vitdeploy.load(write_bundle(tmp_path / "b")) as predictor:
        found = top_classes(predictor, LabelledImages(tuple(images), np.zeros(7, np.int64)))
    assert len(LABELS) == 5
    assert (found.shape, found.dtype) == ((7, 1), np.int64)
    assert found[:, 0].tolist() == answer_images(images).argmax(axis=1).tolist()


def test_nan_is_no_answer(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", weight=np.full((192, 5), np.nan, np.float32))
    images = LabelledImages((random_image(0),), np.zeros(1, np.int64))
    with vitdeploy.load(made) as predictor, pytest.raises(BundleError, match="NaN"):
        top_classes(predictor, images)


def test_features_are_no_places(tmp_path: Path) -> None:
    images = LabelledImages((random_image(0),), np.zeros(1, np.int64))
    made = write_bundle(tmp_path / "b", output="features", labels=None)
    with vitdeploy.load(made) as predictor, pytest.raises(UsageError, match="features"):
        top_classes(predictor, images)


@pytest.mark.slow
def test_the_digits_bundle_has_its_own_images(tmp_path: Path) -> None:
    made = vitdeploy.export("digits", tmp_path / "digits")
    images = bundled_images(made.manifest)
    assert images is not None
    assert len(images.images) == len(images.labels) == 450
    with vitdeploy.load(made) as predictor:
        found = top_classes(predictor, images)
    with vitdeploy.load(made, backend="torch") as predictor:
        comparison = compare_accuracy(found, top_classes(predictor, images), images.labels)
    assert found.shape == (450, 5)
    assert comparison.top1 == comparison.reference_top1 == 446 / 450
    assert comparison.top5 is not None
    assert comparison.top1 <= comparison.top5 <= 1


def test_which_bundles_have_images(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b").manifest
    assert bundled_images(manifest) is None
    source = {"model.safetensors": sha256(digits_folder() / "model.safetensors")}
    provenance = manifest.provenance.model_copy(update={"source_files": source})
    digits = manifest.model_copy(update={"provenance": provenance})
    images = bundled_images(digits)
    assert images is not None
    assert np.array_equal(np.stack([np.asarray(image) for image in images.images]), digits_heldout()[0])
    features = {"output": "features", "outputs": ("features",)}
    assert bundled_images(digits.model_copy(update=features)) is None


@pytest.mark.parametrize(
    "lost, gained, images, held",
    [
        (0, 0, 50, True),
        (3, 0, 50, True),  # six points, of which few images are no proof
        (40, 30, 1000, True),  # one point
        (40, 0, 1000, False),  # four points
        (0, 40, 1000, True),
    ],
)
def test_what_quantisation_may_cost_is_judged_by_the_interval(
    lost: int, gained: int, images: int, held: bool
) -> None:
    labels = np.zeros(images, np.int64)
    reference, model = np.zeros((images, 1), np.int64), np.zeros((images, 1), np.int64)
    model[:lost] = 1
    reference[lost : lost + gained] = 1
    found, said = judge_quantised(score("onnx-int8", "onnxruntime", model, reference, labels))
    assert found == held
    assert f"of {images} images" in said
    assert ("wholly beyond the 1 " in said) != held
