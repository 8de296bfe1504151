"""Against the real `vitdeploy serve`, in a process of its own."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bundles import LABELS, SIZE, WEIGHT, golden_arrays, write_bundle
from tests.helpers.commands import COMMAND
from tests.helpers.exports import Exported
from tests.helpers.quantised_bundles import write_quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange, Preprocess
from vitdeploy.verification.live.round import LiveRequest, verify_live


@dataclass(frozen=True)
class Serving:
    """A running server."""

    http: str
    grpc: str


@contextlib.contextmanager
def serving(*bundles: object, flags: tuple[str, ...] = ()) -> Iterator[Serving]:
    ports = ("--port", "0", "--grpc-port", "0")
    command = [*COMMAND, "serve", *map(str, bundles), *ports, "--plan-seconds", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving (http://\S+), gRPC (?:grpc://)?(\S+)", line):
                yield Serving(found[1], f"grpc://{found[2]}")
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)


def consistent(folder: Path, weight: np.ndarray, **facts: object) -> Bundle:
    """A bundle of other weights that is right in itself, as one that is served has to be."""
    golden = golden_arrays()
    inputs = golden["pixel_values"].astype(np.float64)
    golden["reference"] = inputs.reshape(len(inputs), -1) @ weight.astype(np.float64)
    return write_bundle(folder, weight=weight, golden=golden, **facts)


WRONG = {
    "wrong-mean": (
        {"preprocess": Preprocess(size=(SIZE, SIZE), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))},
        "normalised with ImageNet's mean and std",
    ),
    "wrong-filter": (
        {"preprocess": Preprocess(size=(SIZE, SIZE), resample="nearest")},
        "the nearest filter, not bilinear",
    ),
    "wrong-crop": (
        {"preprocess": Preprocess(size=(SIZE, SIZE), resize="shortest_edge", resize_edge=SIZE)},
        "cropped from a shorter edge of 8",
    ),
    "wrong-labels": ({"labels": tuple(sorted(LABELS))}, "labels are sorted by name"),
}


@dataclass(frozen=True)
class Everything:
    """One server of all bundles below, by the names of its models."""

    server: Serving
    right: Bundle
    """Served as ``linear``, and as version 1 of ``versions``."""
    fixed: Bundle
    uint8: Bundle
    quantised: Bundle


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    folder = tmp_path_factory.mktemp("served")
    right = write_bundle(folder / "linear.bundle", precisions=("fp32", "fp16"))
    fixed = write_bundle(folder / "fixed.bundle", batch=BatchRange(4, 4, 4))
    uint8 = write_bundle(folder / "uint8.bundle", kind="uint8")
    quantised = write_quantised(folder / "quantised.bundle", precisions=(), kinds=("int8",), name="quantised")
    other = np.random.default_rng(3).normal(size=WEIGHT.shape).astype(np.float32)
    new = consistent(folder / "new.bundle", other)
    wrong = [f"{name}={write_bundle(folder / name, **facts).root}" for name, (facts, _) in WRONG.items()]
    models = [f"linear={right.root}", f"fixed={fixed.root}", f"uint8={uint8.root}", *wrong]
    models.append(f"quantised={quantised.root}")
    with serving(*models, f"versions@1={right.root}", f"versions@2={new.root}") as server:
        yield Everything(server, right, fixed, uint8, quantised)


def test_a_right_server(everything: Everything) -> None:
    over_http = verify_live(everything.right, LiveRequest(everything.server.http))
    over_grpc = verify_live(everything.right, LiveRequest(everything.server.grpc))
    for report in (over_http, over_grpc):
        assert report.passed, (report.failures, report.causes)
        assert (report.model, report.version, report.fits) == ("linear", "1", "fp32")
        assert report.labels == len(LABELS)
    assert [record.provider for record in over_http.parity] == ["binary"] * 3 + ["json"] * 3
    assert over_http.precision == "fp32"
    assert len(over_http.images) == 4
    assert not any("does not say which artifact" in note for note in over_http.notes)


def test_a_quantised_bundle(everything: Everything) -> None:
    """Of which there is no other artifact: labels and scores travel as any others do."""
    for url in (everything.server.http, everything.server.grpc):
        report = verify_live(everything.quantised, LiveRequest(url, calls=5))
        assert report.passed, (report.failures, report.causes)
        assert (report.model, report.precision, report.labels) == ("quantised", "int8", len(LABELS))
        assert {record.metrics.rows for record in report.parity if record.batch == 1} == {6}
    images = verify_live(everything.quantised, LiveRequest(everything.server.http, calls=5)).images
    assert [image.passed for image in images] == [True] * 4


@pytest.mark.slow
def test_what_export_quantises(digits_int8: Bundle) -> None:
    with serving(digits_int8.root, flags=("--artifact", "int8")) as server:
        report = verify_live(digits_int8, LiveRequest(server.http, calls=5))
        assert report.passed, (report.failures, report.causes)
        assert (report.precision, report.labels, len(report.images)) == ("int8", 10, 4)
        strict = verify_live(digits_int8, LiveRequest(server.grpc, artifact="fp32", calls=5))
    assert not strict.passed
    assert strict.causes[0] == "the numbers are as exact as int8, not as fp32"


@pytest.mark.slow
def test_versions_and_other_weights(everything: Everything) -> None:
    right, server = everything.right, everything.server
    assert verify_live(right, LiveRequest(server.http, model="versions", version="1")).passed
    for url in (server.http, server.grpc):
        report = verify_live(right, LiveRequest(url, model="versions"))
        assert not report.passed
        assert report.version == "2"
        assert any("version 1 on the server gives the right answers" in cause for cause in report.causes)
        assert any("the server serves another bundle" in cause for cause in report.causes)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_bundle_with_one_thing_wrong_is_served(everything: Everything, name: str) -> None:
    report = verify_live(everything.right, LiveRequest(everything.server.http, model=name, batches=[1]))
    assert not report.passed
    assert WRONG[name][1] in report.causes[0]
    assert all(record.passed for record in report.parity)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed", "uint8"])
def test_a_fixed_batch_size_and_images_as_uint8(everything: Everything, name: str) -> None:
    for url in (everything.server.http, everything.server.grpc):
        report = verify_live(getattr(everything, name), LiveRequest(url, model=name))
        assert report.passed, report.failures


@pytest.mark.slow
def test_a_server_for_small_batches(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "linear.bundle")
    with serving(made.root, flags=("--max-batch", "2")) as server:
        for url in (server.http, server.grpc):
            report = verify_live(made, LiveRequest(url))
            assert report.passed, report.failures
            assert {record.batch for record in report.parity} == {1, 2}


@pytest.mark.slow
def test_the_digits(digits: Exported) -> None:
    folder = digits.folder
    with serving(folder, f"half={folder}") as server:
        for url in (server.http, server.grpc):
            report = verify_live(folder, LiveRequest(url, model="digits"))
            assert report.passed, report.failures
            assert report.labels == 10
