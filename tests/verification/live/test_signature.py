"""Class names through the classification extension."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fakes.v2_models import served
from tests.fakes.v2_server import V2Server
from tests.helpers.bundles import LABELS
from vitdeploy.bundle.folder import Bundle
from vitdeploy.verification.live.client import AnswerError
from vitdeploy.verification.live.round import LiveRequest, verify_live
from vitdeploy.verification.live.signature import compare_labels, read_classes

FEW = {"calls": 5, "batches": [1]}


@pytest.mark.parametrize(
    "labels, failure, cause",
    [
        (sorted(LABELS), "class 2 is called 'eel', in the bundle 'tiger_cat' (3 of 5", "sorted by name"),
        (
            ["background", *LABELS[:-1]],
            "class 0 is called 'background', in the bundle 'cat'",
            "one class too late",
        ),
        ([*LABELS[1:], "end"], "class 0 is called 'dog', in the bundle 'cat'", "one class too early"),
        (LABELS[::-1], "class 0 is called 'fox', in the bundle 'cat' (4 of 5", "another order"),
        (list("vwxyz"), "class 0 is called 'v', in the bundle 'cat' (5 of 5", "those of another model"),
    ],
)
def test_wrong_labels(bundle: Bundle, labels: list[str], failure: str, cause: str) -> None:
    with V2Server({"linear": served(labels=tuple(labels))}) as server:
        report = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert failure in report.failures[0]
    assert len(report.failures) == 1
    assert cause in report.causes[0]
    assert report.labels == 5


def test_one_wrong_name(bundle: Bundle) -> None:
    labels = ("cat", "dog", "tiger cat", "eel", "fox")
    with V2Server({"linear": served(labels=labels)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert report.failures == (
        "labels: class 2 is called 'tiger cat', in the bundle 'tiger_cat' (1 of 5 names differ)",
    )
    assert report.causes == ()


def test_servers_without_labels(bundle: Bundle) -> None:
    with V2Server({"linear": served(labels=())}) as server:
        report = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert report.passed
    assert any("no labels beside this model" in note for note in report.notes)
    with V2Server({"linear": served()}, extensions=()) as server:
        report = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert report.passed
    assert any("names no classes for tensors" in note for note in report.notes)


def test_what_is_read() -> None:
    texts = np.array([[b"1.5:2:a:b", b"-1:0:caf\xc3\xa9"]], dtype=object)
    assert read_classes(texts) == {2: "a:b", 0: "café"}
    assert read_classes(np.array([b"1.5:2"], dtype=object)) == {}
    for broken in (np.zeros(3), np.array([b"hello"], dtype=object), None):
        with pytest.raises(AnswerError):
            read_classes(broken)


def test_white_space_does_not_count() -> None:
    assert compare_labels({0: "a  b"}, ["a b\n"]) == ((), ())
    assert compare_labels({3: "a"}, ["a"])[0]
