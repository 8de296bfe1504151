"""One model of several image sizes on the real `vitdeploy serve`: right, and choosing the wrong size."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.helpers.live_server import Live, serving
from tests.helpers.several_sizes import LABELS, SIZES, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import size_name
from vitdeploy.verification.live.round import LiveRequest, verify_live

pytestmark = pytest.mark.slow

NAMES = [size_name(size) for size in SIZES]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return several_sizes(tmp_path_factory.mktemp("many") / "linear.bundle", precisions=("fp32", "fp16"))


@pytest.fixture(scope="module")
def live(many: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """``linear`` of all sizes, and ``small`` of the first alone."""
    small = several_sizes(tmp_path_factory.mktemp("small") / "small.bundle", SIZES[:1])
    with serving(many.root, small.root) as server:
        yield server


def wrong(fault: str) -> tuple[str, ...]:
    """A command that starts the server with ``fault`` done to it."""
    lines = (
        "import sys",
        "from vitdeploy.cli import main",
        "from vitdeploy.server import served_model",
        "fit, classified = served_model.fit, served_model.Classified",
        fault,
        "sys.exit(main())",
    )
    return (sys.executable, "-c", "\n".join(lines), "serve")


def test_a_right_server(live: Live, many: Bundle) -> None:
    over_http = verify_live(many, LiveRequest(live.url))
    over_grpc = verify_live(many, LiveRequest(f"grpc://{live.grpc}"))
    for report in (over_http, over_grpc):
        assert report.passed, (report.failures, report.causes)
        assert (report.precision, report.fits, report.labels) == ("fp32", "fp32", len(LABELS))
        assert {record.artifact for record in report.parity} == {f"linear at {name}" for name in NAMES}
        assert report.latency is not None
    assert len(over_http.parity) == 3 * len(over_grpc.parity) * 2 // 3
    assert {image.size for image in over_http.images} == set(NAMES)
    assert all(image.error is not None for image in over_http.images)


@pytest.mark.parametrize("rule", ["area", "16x16"])
def test_the_rule_is_the_server_s(many: Bundle, rule: str) -> None:
    with serving(many.root, "--fit", rule, "--artifact", "fp16") as server:
        report = verify_live(many, LiveRequest(server.url, batches=[1]))
    assert report.passed, (report.failures, report.causes)
    assert report.precision == "fp16"
    assert {image.size for image in report.images} >= ({"16x16"} if rule == "16x16" else set(NAMES))


TRANSPOSED = "served_model.fit = lambda image, sizes, rule: fit(image[::-1], sizes, rule)"
"""Width is taken for height."""
FIRST = "served_model.fit = lambda image, sizes, rule: sizes[0]"
"""The choice is forgotten."""
SILENT = "served_model.Classified = lambda predictions, size: classified(predictions, None)"
"""Nobody says which size was taken."""


@pytest.mark.parametrize(
    "fault, said", [(TRANSPOSED, True), (FIRST, True), (f"{TRANSPOSED}\n{SILENT}", False)]
)
def test_the_wrong_size_is_caught(many: Bundle, fault: str, said: bool) -> None:
    with serving(many.root, "--port", 0, "--grpc-port", 0, command=wrong(fault)) as server:
        report = verify_live(many, LiveRequest(server.url, batches=[1]))
    assert not report.passed
    assert all(record.passed for record in report.parity)
    assert any("was taken, not 8x16" in failure for failure in report.failures) is said
    assert any("scores: relative error" in failure for failure in report.failures)
    assert "what the model gives for another image size: image." in report.causes[0]


def test_a_server_that_has_the_first_size_only(live: Live, many: Bundle) -> None:
    for url in (live.url, f"grpc://{live.grpc}"):
        report = verify_live(many, LiveRequest(url, model="small", batches=[1]))
        assert not report.passed
        assert (
            report.failures[0]
            == "small at 16x16: small takes other images, and the server has no small_16x16"
        )
