"""tritonclient asks what there is, gets errors it understands, and loads, unloads and counts."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.helpers.bundles import LABELS, answer
from tests.helpers.live_server import Live, serving
from vitdeploy import __version__

HTTP, GRPC = tritonclient.http, tritonclient.grpc
INPUT = {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
OUTPUT = {"name": "logits", "datatype": "FP32", "shape": [-1, len(LABELS)]}
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
STATUS = {
    "invalid": ("400", "StatusCode.INVALID_ARGUMENT"),
    "not found": ("404", "StatusCode.NOT_FOUND"),
    "unavailable": ("503", "StatusCode.UNAVAILABLE"),
}


@pytest.fixture
def http(live: Live) -> Iterator[Any]:
    with HTTP.InferenceServerClient(live.address) as client:
        yield client


@pytest.fixture
def grpc(live: Live) -> Iterator[Any]:
    with GRPC.InferenceServerClient(live.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def changing_bundle(linear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(linear, tmp_path_factory.mktemp("changing") / "linear.bundle"))


@pytest.fixture(scope="module")
def shared_changing(changing_bundle: Path, linear: Path, twice: Path) -> Iterator[Live]:
    with serving(changing_bundle, f"both={linear}", f"both={twice}", "--reload-seconds", 0) as server:
        yield server


@pytest.fixture
def changing(shared_changing: Live) -> Iterator[Live]:
    """A server whose models a test may change: ``linear``, and ``both`` in versions 1 and 2.

    Both are loaded anew for each test, and so have served nobody.
    """
    with shared_changing.watched() as server:
        for name in ("linear", "both"):
            assert server.ask("POST", f"/v2/repository/models/{name}/load", b"{}").status == 200
        yield server


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, changing: Live) -> Iterator[Any]:
    """Of the server that may be changed, over each transport."""
    library, address = (HTTP, changing.address) if request.param == "http" else (GRPC, changing.grpc)
    with library.InferenceServerClient(address) as made:
        made.library = library
        yield made


def tensor(library: Any, array: np.ndarray[Any, Any] = PIXELS, name: str = "pixel_values") -> Any:
    kind = {"float32": "FP32", "float64": "FP64", "uint8": "UINT8"}[array.dtype.name]
    return library.InferInput(name, list(array.shape), kind).set_data_from_numpy(array)


def test_the_server_describes_itself(http: Any, grpc: Any) -> None:
    assert http.is_server_live()
    assert http.is_server_ready()
    assert grpc.is_server_live()
    assert grpc.is_server_ready()
    found = http.get_server_metadata()
    assert (found["name"], found["version"]) == ("vitdeploy", __version__)
    assert {"binary_tensor_data", "classification", "model_repository", "statistics"} <= set(
        found["extensions"]
    )
    assert grpc.get_server_metadata(as_json=True) == found


def test_models_describe_themselves(http: Any, grpc: Any) -> None:
    for name, versions in (("linear", ["1"]), ("both", ["2", "7"])):
        found = http.get_model_metadata(name)
        assert (found["name"], found["versions"]) == (name, versions)
        assert (found["inputs"], found["outputs"]) == ([INPUT], [OUTPUT])
        told = grpc.get_model_metadata(name)
        assert (told.name, list(told.versions), told.platform) == (name, versions, found["platform"])
        assert (list(told.inputs[0].shape), told.inputs[0].datatype) == ([-1, 3, 8, 8], "FP32")
    assert http.get_model_metadata("both", "2")["versions"] == ["2", "7"]


def test_configurations(http: Any, grpc: Any) -> None:
    found = http.get_model_config("linear")
    assert (found["name"], found["max_batch_size"]) == ("linear", 8)
    assert found["input"] == [{"name": "pixel_values", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}]
    assert found["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [5]}]
    told = grpc.get_model_config("linear").config
    assert (told.name, told.max_batch_size, list(told.input[0].dims)) == ("linear", 8, [3, 8, 8])
    assert told.input[0].data_type == tritonclient.grpc.model_config_pb2.TYPE_FP32
    assert told.dynamic_batching.default_queue_policy.max_queue_size == 256


def test_readiness(http: Any, grpc: Any) -> None:
    for client in (http, grpc):
        assert client.is_model_ready("linear")
        assert client.is_model_ready("both", "2")
    assert not http.is_model_ready("nope")
    assert not http.is_model_ready("both", "3")
    with pytest.raises(InferenceServerException, match="unknown model"):
        grpc.is_model_ready("nope")


WRONG: list[tuple[str, Callable[[Any, Any], Any], str, str]] = [
    (
        "unknown model",
        lambda c, lib: c.infer("nope", [tensor(lib)]),
        "not found",
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "unknown version",
        lambda c, lib: c.infer("both", [tensor(lib)], model_version="3"),
        "not found",
        "Request for unknown model: 'both' version 3 is not found",
    ),
    (
        "unknown input",
        lambda c, lib: c.infer("linear", [tensor(lib, name="pixels")]),
        "invalid",
        "has no input 'pixels'; did you mean 'pixel_values'?",
    ),
    (
        "unknown output",
        lambda c, lib: c.infer("linear", [tensor(lib)], outputs=[lib.InferRequestedOutput("probs")]),
        "invalid",
        "unexpected inference output 'probs' for model 'linear'",
    ),
    (
        "an output twice",
        lambda c, lib: c.infer("linear", [tensor(lib)], outputs=[lib.InferRequestedOutput("logits")] * 2),
        "invalid",
        "an output is asked for twice",
    ),
    (
        "an input twice",
        lambda c, lib: c.infer("linear", [tensor(lib), tensor(lib)]),
        "invalid",
        "input 'pixel_values' is given twice",
    ),
    (
        "another dtype",
        lambda c, lib: c.infer("linear", [tensor(lib, PIXELS.astype(np.float64))]),
        "invalid",
        "must be float32, not float64",
    ),
    (
        "another shape",
        lambda c, lib: c.infer("linear", [tensor(lib, PIXELS[:, :, :7])]),
        "invalid",
        "must have the shape (N, 3, 8, 8), not (2, 3, 7, 8)",
    ),
    (
        "no batch dimension",
        lambda c, lib: c.infer("linear", [tensor(lib, PIXELS[0])]),
        "invalid",
        "must have the shape (N, 3, 8, 8), not (3, 8, 8)",
    ),
    ("no rows", lambda c, lib: c.infer("linear", [tensor(lib, PIXELS[:0])]), "invalid", "has no rows"),
    (
        "too many rows",
        lambda c, lib: c.infer("linear", [tensor(lib, np.repeat(PIXELS, 5, 0))]),
        "invalid",
        "a batch of 10, but at most 8 are served",
    ),
    ("no inputs", lambda c, lib: c.infer("linear", []), "invalid", "inputs"),
    ("unknown metadata", lambda c, lib: c.get_model_metadata("nope"), "not found", "unknown model"),
    ("unknown configuration", lambda c, lib: c.get_model_config("nope"), "not found", "unknown model"),
    ("unknown to load", lambda c, lib: c.load_model("nope"), "not found", "unknown model"),
    ("unknown to unload", lambda c, lib: c.unload_model("nope"), "not found", "unknown model"),
    (
        "statistics of the unknown",
        lambda c, lib: c.get_inference_statistics("nope"),
        "not found",
        "unknown model",
    ),
    (
        "a model of the client's own",
        lambda c, lib: c.load_model("linear", config="{}"),
        "invalid",
        "load takes no parameters",
    ),
]


@pytest.mark.parametrize("call, kind, words", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_errors(http: Any, grpc: Any, call: Callable[[Any, Any], Any], kind: str, words: str) -> None:
    for position, (library, client) in enumerate(((HTTP, http), (GRPC, grpc))):
        with pytest.raises(InferenceServerException) as caught:
            call(client, library)
        assert caught.value.status() == STATUS[kind][position]
        assert words in caught.value.message()


def test_errors_reach_asyncio_clients(live: Live) -> None:
    async def main() -> None:
        for library, address in ((HTTP, live.address), (GRPC, live.grpc)):
            async with library.aio.InferenceServerClient(address) as client:
                with pytest.raises(InferenceServerException, match="unknown model: 'nope'"):
                    await client.infer("nope", [tensor(library)])
                assert (await client.infer("linear", [tensor(library)])).as_numpy("logits").shape == (2, 5)

    asyncio.run(main())


def states(client: Any) -> dict[tuple[str, str], str]:
    index = client.get_model_repository_index()
    if client.library is HTTP:
        return {(entry["name"], entry["version"]): entry["state"] for entry in index}
    return {(entry.name, entry.version): entry.state for entry in index.models}


def test_unloading_and_loading(client: Any) -> None:
    everything = {("linear", "1"): "READY", ("both", "1"): "READY", ("both", "2"): "READY"}
    assert states(client) == everything
    client.unload_model("both")
    assert states(client) == {
        ("linear", "1"): "READY",
        ("both", "1"): "UNAVAILABLE",
        ("both", "2"): "UNAVAILABLE",
    }
    assert not client.is_model_ready("both")
    assert not client.is_server_ready()
    assert client.is_model_ready("linear")
    with pytest.raises(InferenceServerException, match="Request for unavailable model: 'both'") as caught:
        client.infer("both", [tensor(client.library)])
    assert caught.value.status() in STATUS["unavailable"]
    client.unload_model("both")  # again: it is what was asked for
    client.load_model("both")
    assert states(client) == everything
    found = client.infer("both", [tensor(client.library)], model_version="2").as_numpy("logits")
    assert np.allclose(found, 2 * answer(PIXELS), rtol=1e-4, atol=1e-4)
    client.load_model("linear")  # again: loaded anew, and in service
    found = client.infer("linear", [tensor(client.library)]).as_numpy("logits")
    assert np.allclose(found, answer(PIXELS), rtol=1e-4, atol=1e-4)


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_one_in_service(
    client: Any, changing_bundle: Path
) -> None:
    model = (changing_bundle / "model.onnx").rename(changing_bundle.with_name("model.onnx"))
    try:
        with pytest.raises(InferenceServerException, match=r"failed to load 'linear': .*onnx is missing"):
            client.load_model("linear")
    finally:
        model.rename(changing_bundle / "model.onnx")
    found = client.infer("linear", [tensor(client.library)]).as_numpy("logits")
    assert np.allclose(found, answer(PIXELS), rtol=1e-4, atol=1e-4)


def test_a_server_whose_models_are_fixed(strict: Live) -> None:
    for library, address in ((HTTP, strict.address), (GRPC, strict.grpc)):
        with library.InferenceServerClient(address) as client:
            for change in (client.load_model, client.unload_model):
                with pytest.raises(InferenceServerException, match="not for its clients"):
                    change("linear")
            assert client.is_model_ready("linear")


def plain(client: Any, name: str = "", version: str = "") -> list[dict[str, Any]]:
    """The statistics as the HTTP interface has them; gRPC's JSON has numbers as text and leaves out zeros."""
    found = client.get_inference_statistics(name, version)
    if client.library is HTTP:
        return list(found["model_stats"])
    from google.protobuf import json_format

    document = json_format.MessageToDict(
        found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return list(document["model_stats"])


def test_statistics_add_up(client: Any) -> None:
    assert int(plain(client, "linear")[0]["inference_count"]) == 0
    sizes = (1, 2, 2, 8, 3, 1)
    for rows in sizes:
        client.infer("linear", [tensor(client.library, np.repeat(PIXELS[:1], rows, 0))])
    for _ in range(4):
        with pytest.raises(InferenceServerException):
            client.infer("linear", [tensor(client.library, PIXELS[:, :, :7])])
    (found,) = plain(client, "linear")
    assert (found["name"], found["version"]) == ("linear", "1")
    assert int(found["inference_count"]) == sum(sizes)
    assert int(found["execution_count"]) == len(sizes)
    assert int(found["last_inference"]) > 1_700_000_000_000
    durations = {name: (int(d["count"]), int(d["ns"])) for name, d in found["inference_stats"].items()}
    assert durations["success"][0] == durations["queue"][0] == durations["compute_infer"][0] == len(sizes)
    assert durations["fail"][0] == 4
    assert durations["success"][1] >= durations["queue"][1] + durations["compute_infer"][1] > 0
    by_size = {
        int(entry["batch_size"]): int(entry["compute_infer"]["count"]) for entry in found["batch_stats"]
    }
    assert by_size == {size: sizes.count(size) for size in set(sizes)}
    assert len(plain(client)) == 3
    assert [entry["version"] for entry in plain(client, "both", "1")] == ["1"]


def metrics(live: Live) -> dict[str, float]:
    lines = live.ask("GET", "/metrics").body.decode().splitlines()
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_prometheus_agrees_with_the_statistics(changing: Live) -> None:
    before = metrics(changing)
    with HTTP.InferenceServerClient(changing.address) as client:
        for _ in range(3):
            client.infer("linear", [tensor(HTTP)])
        with pytest.raises(InferenceServerException):
            client.infer("linear", [tensor(HTTP, PIXELS[:, :, :7])])
    values = {key: value - before.get(key, 0.0) for key, value in metrics(changing).items()}
    label = 'model="linear",version="1"'
    sized = f'image_size="8x8",{label}'
    assert values['vitdeploy_requests_total{model="linear",outcome="ok",version="1"}'] == 3
    assert values['vitdeploy_requests_total{model="linear",outcome="invalid",version="1"}'] == 1
    assert values[f"vitdeploy_images_total{{{sized}}}"] == 6
    assert values[f"vitdeploy_request_seconds_count{{{label}}}"] == 3
    assert values[f"vitdeploy_batch_size_sum{{{sized}}}"] == 6
    assert metrics(changing)[f"vitdeploy_queue_images{{{sized}}}"] == 0
