"""Image files sent to servers: wrong preprocessing is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import IMAGENET, ensemble, predict, scored, served
from tests.fakes.v2_server import V2Server
from tests.helpers.bundles import LABELS, SIZE, write_bundle
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Preprocess, Scores
from vitdeploy.scores import sigmoid, softmax
from vitdeploy.verification.live.images import image_files, score_error
from vitdeploy.verification.live.report import LiveReport
from vitdeploy.verification.live.round import LiveRequest, verify_live


def ask(bundle: Bundle, predict: Callable[[bytes, str], Any], **more: Any) -> LiveReport:
    with V2Server({"linear": served()}, name="vitdeploy", predict=predict) as server:
        return verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1], **more))


def test_a_right_server(bundle: Bundle) -> None:
    report = ask(bundle, predict())
    assert report.passed, report.failures
    assert [(record.image, record.format) for record in report.images] == [
        (f"image.{index}", kind) for index in (0, 1) for kind in ("PNG", "JPEG")
    ]
    for record in report.images:
        assert record.expected == record.answered
        assert record.classes == len(LABELS)
        assert record.error is not None
        assert record.error < record.bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, cause",
    [
        ({"bgr": True}, "BGR pixels: red and blue are swapped"),
        ({"statistics": IMAGENET}, "pixels normalised with ImageNet's mean and std"),
        ({"statistics": (np.zeros(3), np.ones(3))}, "pixels that are not normalised: 0 to 1 as they are"),
        ({"statistics": (np.zeros(3), np.ones(3)), "scale": 1.0}, "pixels from 0 to 255, neither scaled"),
        ({"scale": 1.0}, "pixels normalised without being scaled from 0..255 first"),
        ({"how": "nearest"}, "resized with the nearest filter, not bilinear"),
        ({"how": "bicubic"}, "resized with the bicubic filter, not bilinear"),
        ({"how": "rough"}, "resized without antialiasing"),
        ({"how": "cropped"}, "cropped from a shorter edge of 8"),
    ],
)
def test_wrong_preprocessing(bundle: Bundle, wrong: dict[str, Any], cause: str) -> None:
    report = ask(bundle, predict(**wrong))
    assert not report.passed
    assert all("scores: relative error" in f or "another class first" in f for f in report.failures)
    assert len(report.causes) == 1
    assert cause in report.causes[0]


@pytest.mark.slow
def test_squeezed_instead_of_cropped(tmp_path: Path) -> None:
    spec = Preprocess(size=(SIZE, SIZE), resize="shortest_edge", resize_edge=SIZE)
    made = write_bundle(tmp_path / "linear.bundle", preprocess=spec)
    assert ask(made, predict(how="cropped")).passed
    report = ask(made, predict())
    assert "squeezed to the model's size, not cropped" in report.causes[0]


@pytest.mark.slow
def test_mean_and_std_swapped(tmp_path: Path) -> None:
    spec = Preprocess(size=(SIZE, SIZE), mean=tuple(IMAGENET[0]), std=tuple(IMAGENET[1]))
    made = write_bundle(tmp_path / "linear.bundle", preprocess=spec)
    assert ask(made, predict(statistics=IMAGENET)).passed
    assert "mean and std swapped" in ask(made, predict(statistics=IMAGENET[::-1])).causes[0]
    backwards = (IMAGENET[0][::-1], IMAGENET[1][::-1])
    assert "in the order BGR" in ask(made, predict(statistics=backwards)).causes[0]


def test_wrong_tensors_are_not_blamed_on_preprocessing(bundle: Bundle) -> None:
    with V2Server(
        {"linear": served(lambda x: -x[:, 0, 0, :5])}, name="vitdeploy", predict=predict()
    ) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert not any("pixels" in cause for cause in report.causes)


@pytest.mark.slow
def test_labels_in_another_order(bundle: Bundle) -> None:
    report = ask(bundle, predict(labels=tuple(sorted(LABELS))))
    assert all("labels: class 2 is called 'eel'" in failure for failure in report.failures)
    assert "sorted by name" in report.causes[0]
    assert all(record.error is not None and record.error < record.bound for record in report.images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer, failure",
    [
        ({"predictions": []}, "not one list of label, index and score"),
        ({"predictions": [[]]}, "names no class"),
        ({"predictions": [[{"label": "cat"}]]}, "not one list of label, index and score"),
        ([1, 2], "not one list of label, index and score"),
        ({"predictions": [[{"label": "cat", "index": 0, "score": 12.5}]]}, "which are no probabilities"),
        ({"predictions": [[{"label": "cat", "index": 0, "score": float("nan")}]]}, "NaN or infinite"),
        ({"predictions": [[{"label": "cat", "index": 9, "score": 0.5}]]}, "classes that the bundle does not"),
        (
            {
                "predictions": [
                    [{"label": n, "index": i, "score": s} for i, n, s in ((0, "cat", 0.1), (1, "dog", 0.2))]
                ]
            },
            "the likeliest class is not first",
        ),
    ],
)
def test_answers_that_are_none(bundle: Bundle, answer: Any, failure: str) -> None:
    report = ask(bundle, lambda data, kind: answer)
    assert len(report.images) == 4
    assert all(failure in text for text in report.failures)


def test_errors(bundle: Bundle) -> None:
    def refuse(data: bytes, kind: str) -> Any:
        raise ValueError("no images today")

    report = ask(bundle, refuse)
    assert report.failures[0] == "image.0 as PNG sent to linear at :predict: HTTP 400: no images today"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "none"])
def test_other_scores_are_compared_with_what_the_bundle_makes_of_logits(tmp_path: Path, kind: Scores) -> None:
    made = write_bundle(tmp_path / "linear.bundle", scores=kind)
    assert ask(made, predict(scores=kind)).passed
    report = ask(made, predict(scores="softmax"))
    assert any("scores: " in failure for failure in report.failures)


def test_confident_answers_are_compared_too() -> None:
    logits = np.array([60.0, 0.0, -60.0, -100.0])
    scores = softmax(logits)
    assert score_error(logits, [0, 1, 2, 3], scores, "softmax") < 1e-9
    assert score_error(logits, [0, 1, 2, 3], scores.astype(np.float32), "softmax") < 1e-2
    assert score_error(logits, [0, 1, 2, 3], softmax(logits[[0, 2, 1, 3]]), "softmax") > 0.05


def test_sigmoids_tell_their_logits() -> None:
    logits = np.array([-30.0, -2.0, 0.0, 3.0, 40.0])
    scores = sigmoid(logits).astype(np.float32)
    assert score_error(logits, [0, 1, 2, 3, 4], scores, "sigmoid") < 1e-5
    assert score_error(logits, [1, 2, 3], sigmoid(logits[[1, 2, 3]] + 0.1), "sigmoid") > 1e-3
    assert score_error(logits, [0, 1, 2, 3, 4], logits, "none") == 0


def test_of_a_few_classes_an_error_counts_in_proportion() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=1000)
    actual = logits + 1e-3 * np.linalg.norm(logits) / np.sqrt(1000) * rng.normal(size=1000)
    order = np.argsort(-actual)
    whole = score_error(logits, order, softmax(actual)[order], "softmax")
    assert 0.8e-3 < whole < 1.2e-3
    part = score_error(logits, order[:5], softmax(actual)[order[:5]], "softmax")
    assert 0.05 * whole < part < whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", [V2Server, GrpcServer])
@pytest.mark.parametrize("top", [1, 3, 5])
def test_a_packaged_ensemble(bundle: Bundle, kind: type[V2Server] | type[GrpcServer], top: int) -> None:
    with kind({"linear": served(), "linear_image": ensemble(top)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert report.passed, report.failures
    assert [record.classes for record in report.images] == [top] * 4
    assert report.model == "linear"
    with kind({"linear": served(), "linear_image": ensemble(top, bgr=True)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert not report.passed
    if top > 1:
        assert "BGR pixels" in report.causes[0]


def test_the_ensemble_alone(bundle: Bundle) -> None:
    with V2Server({"linear": served(), "linear_image": ensemble()}) as server:
        report = verify_live(bundle, LiveRequest(server.url, model="linear_image"))
    assert report.passed, report.failures
    assert len(report.images) == 4
    assert any("takes image files, so no golden tensors were sent" in note for note in report.notes)


def test_what_is_not_sent_is_said(bundle: Bundle, tmp_path: Path) -> None:
    with V2Server({"linear": served()}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert any("no image files were sent: the server has no linear_image" in note for note in report.notes)
    with GrpcServer({"linear": served()}, name="vitdeploy") as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert any("over HTTP only" in note for note in report.notes)
    blind = write_bundle(tmp_path / "blind.bundle", name="linear", preprocess=None)
    assert any("says nothing of preprocessing" in note for note in ask(blind, predict()).notes)


def test_the_files_hold_the_golden_images(bundle: Bundle) -> None:
    files = image_files(bundle)
    assert [file.data[:4] for file in files] == [b"\x89PNG", b"\xff\xd8\xff\xe0"] * 2
    assert scored(np.zeros(5))[0]["score"] == pytest.approx(0.2)
