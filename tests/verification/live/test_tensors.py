"""Golden tensors against servers that are right, and against servers that are wrong in known ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import linear, served
from tests.fakes.v2_server import Array, V2Server
from tests.helpers.bundles import LABELS, WEIGHT, golden_arrays, write_bundle
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.verification.live.round import LiveRequest, verify_live


def records(parity: tuple[ParityRecord, ...]) -> list[tuple[str, str, int]]:
    return [(record.backend, record.provider, record.batch) for record in parity]


def test_a_right_server_over_http(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server:
        report = verify_live(bundle, LiveRequest(server.url))
    assert report.passed
    report.check()
    assert records(report.parity) == [
        ("http", encoding, size) for encoding in ("binary", "json") for size in (1, 3, 8)
    ]
    assert report.worst is not None
    assert 0 < report.worst < 1e-6
    assert report.fits == "fp32"
    assert report.labels == len(LABELS)
    assert report.latency is not None
    assert report.latency.calls == 100
    assert 0 < report.latency.median_ms <= report.latency.p90_ms <= report.latency.p99_ms
    assert {("binary", 1), ("binary", 3), ("binary", 8), ("json", 1), ("json", 3)} <= set(server.batches)
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert document["ok"] is True
    assert "seconds" not in document["latency"]


def test_a_right_server_over_grpc(bundle: Bundle) -> None:
    with GrpcServer({"linear": served()}) as server:
        report = verify_live(bundle, LiveRequest(server.url))
    assert report.passed, report.failures
    assert records(report.parity) == [("grpc", "protobuf", size) for size in (1, 3, 8)]
    assert report.labels == len(LABELS)


@pytest.mark.parametrize(
    "most, wanted, sent",
    [
        (8, None, [1, 3, 8]),
        (2, None, [1, 2]),
        (64, None, [1, 3, 32]),
        (64, (5, 50), [5, 50]),
        (None, None, [1, 3, 8]),
    ],
)
def test_batch_sizes(
    bundle: Bundle, most: int | None, wanted: tuple[int, ...] | None, sent: list[int]
) -> None:
    with V2Server({"linear": served(max_batch=most)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, batches=wanted, calls=5))
    assert report.passed, report.failures
    assert [record.batch for record in report.parity if record.provider == "binary"] == sent


def test_a_batch_size_the_server_does_not_take(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server, pytest.raises(UsageError, match="takes 1 to 8"):
        verify_live(bundle, LiveRequest(server.url, batches=[9]))


def test_a_model_for_one_batch_size(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "fixed.bundle", name="linear", batch=BatchRange(4, 4, 4))
    fixed = served(
        input=("pixel_values", "FP32", [4, 3, 8, 8]), output=("logits", "FP32", [4, 5]), max_batch=0
    )
    with V2Server({"linear": fixed}) as server:
        report = verify_live(made, LiveRequest(server.url, calls=5))
    assert report.passed, report.failures
    assert {rows for _, rows in server.batches} == {4}
    assert report.latency is not None
    assert report.latency.batch == 4


@pytest.mark.slow
def test_images_as_uint8(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "linear.bundle", kind="uint8")

    def run(images: Array) -> Array:
        assert images.dtype == np.uint8
        return linear()((images.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2))

    right = served(run, input=("pixel_values", "UINT8", [-1, 8, 8, 3]))
    with V2Server({"linear": right}) as server:
        report = verify_live(made, LiveRequest(server.url, calls=5))
    assert report.passed, report.failures
    swapped = served(lambda x: run(x[..., ::-1]), input=("pixel_values", "UINT8", [-1, 8, 8, 3]))
    with V2Server({"linear": swapped}) as server:
        report = verify_live(made, LiveRequest(server.url, calls=5))
    assert "BGR images" in report.causes[0]


@pytest.mark.parametrize("encodings, taken", [(("binary",), "binary"), (("json",), "json")])
def test_a_server_that_takes_one_encoding_only(
    bundle: Bundle, encodings: tuple[str, ...], taken: str
) -> None:
    with V2Server({"linear": served()}, encodings=encodings) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5))
    assert report.passed, report.failures
    assert {record.provider for record in report.parity} == {taken}
    assert any("the server refuses" in note and "not supported" in note for note in report.notes)
    assert report.latency is not None
    assert report.latency.encoding == taken


def test_a_server_that_takes_none(bundle: Bundle) -> None:
    with V2Server({"linear": served()}, encodings=()) as server:
        report = verify_live(bundle, LiveRequest(server.url))
    assert not report.passed
    assert len(report.failures) == 2
    with pytest.raises(ParityError, match="does not answer as"):
        report.check()


def test_a_batch_that_the_server_refuses(bundle: Bundle) -> None:
    with V2Server({"linear": served(max_batch=None)}) as server:
        server.models["linear"].versions["1"] = refuse_above(3)
        report = verify_live(bundle, LiveRequest(server.url, calls=5))
    assert report.failures == (
        "linear over http (binary), batch 8: HTTP 400: too many",
        "linear over http (json), batch 8: HTTP 400: too many",
    )


def refuse_above(most: int) -> Callable[[Array], Array]:
    def run(inputs: Array) -> Array:
        if len(inputs) > most:
            raise ValueError("too many")
        return linear()(inputs)

    return run


@pytest.mark.parametrize(
    "fault, message",
    [
        ("error", "HTTP 500: the model is on fire"),
        ("html", "HTTP 502: without a word"),
        ("garbage", "the answer is not of the v2 protocol"),
        ("liar", "the answer is not of the v2 protocol"),
        ("no-output", "the answer lacks the output logits; it has none at all"),
    ],
)
def test_broken_answers(bundle: Bundle, fault: str, message: str) -> None:
    with V2Server({"linear": served()}, fault=fault) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5))
    assert not report.passed
    assert message in report.failures[0]
    assert all("\n" not in failure for failure in report.failures)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_errors_over_grpc(bundle: Bundle, code: grpc.StatusCode) -> None:
    with GrpcServer({"linear": served()}, code=code) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5))
    assert any(f"{code.name}: the model is on fire" in failure for failure in report.failures)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"input": ("input", "FP32", [-1, 3, 8, 8])}, "the input is named input, the bundle's pixel_values"),
        ({"input": ("pixel_values", "FP16", [-1, 3, 8, 8])}, "pixel_values is FP16, the bundle's FP32"),
        (
            {"input": ("pixel_values", "FP32", [-1, 8, 8, 3])},
            "channels are last in one and first in the other",
        ),
        ({"input": ("pixel_values", "FP32", [-1, 3, 16, 16])}, "a model for other images"),
        (
            {"input": ("pixel_values", "FP32", [3, 8, 8])},
            "has the shape [3, 8, 8], the bundle's [-1, 3, 8, 8]",
        ),
        ({"output": ("probs", "FP32", [-1, 5])}, "the output is named probs, the bundle's logits"),
        ({"output": ("logits", "FP32", [-1, 7])}, "a model with other classes"),
    ],
)
def test_another_signature(bundle: Bundle, facts: dict[str, object], message: str) -> None:
    with V2Server({"linear": served(**facts)}) as server:
        report = verify_live(bundle, LiveRequest(server.url))
    assert message in report.failures[0]
    assert server.batches == []
    assert any("no golden tensors were sent" in note for note in report.notes)


def permuted(order: list[int]) -> Callable[[Array], Array]:
    return lambda x: linear()(x)[:, order]


def mixed_up(inputs: Array) -> Array:
    return np.roll(linear()(inputs), 1, axis=0)


def with_nan(inputs: Array) -> Array:
    logits = linear()(inputs)
    logits[0, 2] = np.nan
    return logits


def softmax(inputs: Array) -> Array:
    exponents = np.exp(linear()(inputs).astype(np.float64))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, cause",
    [
        (lambda x: linear()(x[:, ::-1]), "BGR tensors: the server swaps red and blue"),
        (lambda x: linear()((x - 0.5) / 0.5), "normalised twice"),
        (lambda x: linear()(x * 0.5 + 0.5), "not normalised"),
        (lambda x: linear()(x / 255), "divided by 255"),
        (lambda x: linear()(x.transpose(0, 1, 3, 2)), "rows and columns swapped"),
        (lambda x: linear()(x.transpose(0, 2, 3, 1)), "channels are last"),
        (permuted([4, 0, 1, 2, 3]), "column 0 of the answer is the bundle's class 4 (5 of 5 are elsewhere)"),
        (permuted([0, 1, 3, 2, 4]), "column 2 of the answer is the bundle's class 3 (2 of 5 are elsewhere)"),
        (softmax, "the server gives softmax probabilities, not logits"),
        (lambda x: np.log(softmax(x)), "the server gives log-probabilities, not logits"),
        (lambda x: -linear()(x), "the server gives the negated logits"),
        (lambda x: np.zeros((len(x), 5), np.float32), "the server answers with zeros"),
        (lambda x: np.ones((len(x), 5), np.float32), "the server gives the same answer whatever it is sent"),
        (with_nan, "the model overflows there"),
    ],
)
def test_what_makes_the_numbers_wrong(bundle: Bundle, function: Callable[[Array], Array], cause: str) -> None:
    with V2Server({"linear": served(function)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1, 3]))
    assert not report.passed
    assert len(report.causes) == 1
    assert cause in report.causes[0]
    with pytest.raises(ParityError, match="likely cause"):
        report.check()


def test_images_mixed_up_within_a_batch(bundle: Bundle) -> None:
    with V2Server({"linear": served(mixed_up)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1, 3]))
    assert not report.passed
    assert all("batch 3" in failure for failure in report.failures)


def test_images_mixed_up_between_calls(bundle: Bundle) -> None:
    before = [np.zeros((1, 3, 8, 8), np.float32)]

    def late(inputs: Array) -> Array:
        if len(inputs) == 1:
            before.append(inputs)
            return linear()(before[-2])
        return linear()(inputs)

    with V2Server({"linear": served(late)}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5, batches=[1]))
    assert "each belongs to another one" in report.causes[0]


def test_other_weights(bundle: Bundle) -> None:
    other = np.random.default_rng(7).normal(size=WEIGHT.shape)
    with V2Server({"linear": served(linear(other))}) as server:
        report = verify_live(bundle, LiveRequest(server.url, calls=5))
    assert not report.passed
    assert report.causes == ()
    assert any("other weights, perhaps" in note for note in report.notes)


def test_a_bundle_without_golden_data(tmp_path: Path) -> None:
    empty = write_bundle(tmp_path / "linear.bundle", golden={})
    with V2Server({"linear": served()}) as server, pytest.raises(ParityError, match="no golden data"):
        verify_live(empty, LiveRequest(server.url))


@pytest.mark.slow
def test_an_absolute_bound_holds_here_too(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "linear.bundle")
    with V2Server({"linear": served(lambda x: linear()(x) + np.float32(1e-4))}) as server:
        assert verify_live(made, LiveRequest(server.url, calls=5)).passed
    from vitdeploy.backends.base import Options, get_backend
    from vitdeploy.verification.parity import check_session

    with get_backend("onnxruntime").load(made, made.manifest.artifacts[0], Options()) as session:
        bounded = check_session(session, golden_arrays(), max_abs=5e-5)
    bound = made.add(parity=bounded)
    with V2Server({"linear": served(lambda x: linear()(x) + np.float32(1e-4))}) as server:
        report = verify_live(bound, LiveRequest(server.url, calls=5))
    assert "max abs error" in report.failures[0]


def test_a_model_with_the_features_for_output(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "linear.bundle", output="features", labels=None)
    with V2Server({"linear": served(output=("features", "FP32", [-1, 5]))}) as server:
        report = verify_live(made, LiveRequest(server.url, calls=5))
    assert report.passed, report.failures
    assert report.labels == 0
    assert any("the model gives features" in note for note in report.notes)
