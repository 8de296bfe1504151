"""A bundle with several outputs: REST and gRPC list them, and give all or those that are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.helpers.bundles import FEATURES, LABELS, WEIGHT, answer, random_image, write_bundle
from tests.helpers.live_server import Live, json_request, serving
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ParityError
from vitdeploy.server.loading import ModelSettings, load_bundle
from vitdeploy.verification.live.round import LiveRequest, verify_live

HTTP, GRPC = tritonclient.http, tritonclient.grpc
PIXELS = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
RIGHT = {"logits": answer(PIXELS), "features": answer(PIXELS, weight=FEATURES)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("two") / "two.bundle", features=FEATURES)


@pytest.fixture(scope="module")
def live(two: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """``two``; and ``other``, whose features are three times as large, as its own reference says they are."""
    golden = {**two.golden()}
    golden["reference.features"] = 3 * golden["reference.features"]
    place = tmp_path_factory.mktemp("other") / "other.bundle"
    other = write_bundle(place, features=3 * FEATURES, golden=golden)
    with serving(f"two={two.root}", f"other={other.root}") as server:
        yield server


def require_right(found: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(found, RIGHT[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_are_listed(live: Live) -> None:
    said = live.ask("GET", "/v2/models/two").document
    assert said["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
        {"name": "features", "datatype": "FP32", "shape": [-1, 7]},
    ]
    configured = live.ask("GET", "/v2/models/two/config").document["output"]
    assert [(one["name"], one["dims"]) for one in configured] == [("logits", [5]), ("features", [7])]
    with GRPC.InferenceServerClient(live.grpc) as client:
        metadata = client.get_model_metadata("two")
    assert [(one.name, list(one.shape)) for one in metadata.outputs] == [
        ("logits", [-1, 5]),
        ("features", [-1, 7]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("named", [(), ("features",), ("features", "logits")])
def test_all_are_given_or_those_that_are_named(live: Live, named: tuple[str, ...]) -> None:
    for library, address in ((HTTP, live.address), (GRPC, live.grpc)):
        tensor = library.InferInput("pixel_values", list(PIXELS.shape), "FP32").set_data_from_numpy(PIXELS)
        wanted: Any = [library.InferRequestedOutput(name) for name in named] or None
        with library.InferenceServerClient(address) as client:
            result = client.infer("two", [tensor], outputs=wanted)
        for name in named or RIGHT:
            require_right(result.as_numpy(name), name)
        if named == ("features",):
            assert result.as_numpy("logits") is None
    request = json_request(PIXELS, **({"outputs": [{"name": name} for name in named]} if named else {}))
    given = live.ask("POST", "/v2/models/two/infer", request.body).document["outputs"]
    assert [one["name"] for one in given] == list(named or RIGHT)
    for one in given:
        require_right(np.array(one["data"]).reshape(one["shape"]), one["name"])


@pytest.mark.slow
def test_classes_are_of_the_logits(live: Live, tmp_path: Path) -> None:
    random_image(1).save(tmp_path / "image.png")
    reply = live.ask("POST", "/v1/models/two:predict", (tmp_path / "image.png").read_bytes())
    assert {one["label"] for one in reply.document["predictions"][0]} == set(LABELS)
    tensor = HTTP.InferInput("pixel_values", list(PIXELS.shape), "FP32").set_data_from_numpy(PIXELS)
    with HTTP.InferenceServerClient(live.address) as client:
        wanted = [HTTP.InferRequestedOutput("logits", class_count=1), HTTP.InferRequestedOutput("features")]
        result = client.infer("two", [tensor], outputs=wanted)
        best = [int(text.decode().split(":")[1]) for (text,) in result.as_numpy("logits")]
        assert best == RIGHT["logits"].argmax(axis=1).tolist()
        require_right(result.as_numpy("features"), "features")
        refused = [HTTP.InferRequestedOutput("features", class_count=1)]
        with pytest.raises(InferenceServerException, match="'features' of model 'two' are no classes"):
            client.infer("two", [tensor], outputs=refused)


@pytest.mark.slow
def test_a_live_server_is_held_to_every_output(live: Live, two: Bundle) -> None:
    for url in (live.url, f"grpc://{live.grpc}"):
        report = verify_live(two, LiveRequest(url, model="two", batches=[1, 3]))
        assert report.passed, report.failures
        assert {record.output for record in report.parity} == {"logits", "features"}
        assert report.images or "grpc" in url
        wrong = verify_live(two, LiveRequest(url, model="other", batches=[3]))
        assert {record.output for record in wrong.parity if not record.passed} == {"features"}
        assert any("batch 3, features: relative error" in failure for failure in wrong.failures)
        assert wrong.labels == len(LABELS)


@pytest.mark.slow
def test_what_is_wrong_in_one_output_is_not_served(tmp_path: Path) -> None:
    wrong = write_bundle(tmp_path / "b", features=FEATURES * 1.001, weight=WEIGHT)
    with pytest.raises(ParityError, match="its outputs are wrong at batch 1, features: relative error"):
        load_bundle(wrong.root, ModelSettings())
