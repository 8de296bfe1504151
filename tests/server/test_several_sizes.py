"""One model of several image sizes: every answer is that of the bundle which has this size alone."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.helpers.asgi import application
from tests.helpers.commands import in_this_process
from tests.helpers.live_server import Live, Reply, json_request, serving
from tests.helpers.several_sizes import LABELS, SIZES, answer, answer_image, several_sizes
from tests.server.test_embeddings import body
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.config import Size, size_name
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.images.fitting import Rule
from vitdeploy.scores import softmax
from vitdeploy.server.loading import ModelSettings, load_bundle
from vitdeploy.server.messages import InferRequest, RequestError

HTTP, GRPC = tritonclient.http, tritonclient.grpc
Array = np.ndarray[Any, Any]
PHOTOS: dict[Size, Size] = {(9, 9): (8, 8), (40, 40): (16, 16), (30, 60): (8, 16), (50, 20): (16, 16)}
"""Heights and widths of image files, and the size that is nearest in shape, then in area."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return several_sizes(tmp_path_factory.mktemp("sizes") / "many.bundle")


@pytest.fixture(scope="module")
def live(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """``many``; and each of its sizes as a bundle and model of its own, ``at8x8`` and so on."""
    folder = tmp_path_factory.mktemp("alone")
    alone = [f"at{size_name(size)}={several_sizes(folder / size_name(size), [size]).root}" for size in SIZES]
    with serving(bundle.root, *alone) as server:
        yield server


def pixels(size: Size, rows: int = 3) -> Array:
    return np.random.default_rng(size).normal(size=(rows, 3, *size)).astype(np.float32)


def jpeg(size: Size, seed: int = 0) -> bytes:
    """An image file of coarse noise, which survives the compression."""
    coarse = np.random.default_rng((seed, *size)).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def expected(data: bytes, size: Size) -> Array:
    """The probabilities of an image at a size, (5,) float64."""
    return softmax(answer_image(Image.open(io.BytesIO(data)), size))


# --- tensors -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=size_name)
def test_tensors_go_to_their_size(live: Live, size: Size) -> None:
    given = pixels(size)
    with HTTP.InferenceServerClient(live.address) as http, GRPC.InferenceServerClient(live.grpc) as grpc:
        for library, client, how in (
            (HTTP, http, {"binary_data": True}),
            (HTTP, http, {"binary_data": False}),
            (GRPC, grpc, {}),
        ):
            tensor = library.InferInput("pixel_values", list(given.shape), "FP32")
            tensor.set_data_from_numpy(given, **how)
            many, alone = (client.infer(name, [tensor]) for name in ("many", f"at{size_name(size)}"))
            assert np.array_equal(many.as_numpy("logits"), alone.as_numpy("logits"))
            np.testing.assert_allclose(many.as_numpy("logits"), answer(given), rtol=1e-4, atol=1e-5)
            said, silent = many.get_response(), alone.get_response()
            if library is HTTP:
                assert said["parameters"] == {"image_size": size_name(size)}
                assert "parameters" not in silent
            else:
                assert said.parameters["image_size"].string_param == size_name(size)
                assert not silent.parameters


def test_a_size_that_is_not_there(live: Live) -> None:
    shape = "pixel_values of the shape (N, 3, 16, 8)"
    wanted = f"no image size of model 'many' takes {shape}: it has 8x8, 16x16, 8x16"
    reply = live.ask("POST", "/v2/models/many/infer", json_request(np.zeros((1, 3, 16, 8))).body)
    assert (reply.status, reply.error) == (400, wanted)
    tensor = GRPC.InferInput("pixel_values", [1, 3, 16, 8], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3, 16, 8), np.float32))
    with (
        GRPC.InferenceServerClient(live.grpc) as client,
        pytest.raises(InferenceServerException, match=re.escape(wanted)) as refused,
    ):
        client.infer("many", [tensor])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 16, 16), "takes pixel_values of the shape (N, 4, 16, 16): it has 8x8, 16x16, 8x16"),
        ((3, 16, 16), "onnx-fp32: pixel_values must have the shape (N, 3, 8, 8), not (3, 16, 16)"),
        ((9, 3, 8, 16), "a batch of 9, but at most 8 are served"),
    ],
)
def test_a_tensor_that_is_wrong_otherwise(live: Live, shape: tuple[int, ...], message: str) -> None:
    reply = live.ask("POST", "/v2/models/many/infer", json_request(np.zeros(shape)).body)
    assert reply.status == 400
    assert reply.error.endswith(message)


def test_the_size_that_a_request_names(live: Live) -> None:
    """It has to be that of the tensors; where these may be of several sizes, it decides."""

    def ask(size: Size, **parameters: object) -> Reply:
        request = json_request(pixels(size), parameters=parameters)
        return live.ask("POST", "/v2/models/many/infer", request.body)

    assert ask((8, 16), image_size="8x16").document["parameters"] == {"image_size": "8x16"}
    assert "of the shape (N, 3, 8, 16) at 8x8: it has" in ask((8, 16), image_size="8x8").error
    assert "image_size 8 is not a text" in ask((8, 16), image_size=8).error


def test_inputs_of_one_shape_and_several_sizes(bundle: Bundle) -> None:
    """As patches are, of which 16 may be 4 x 4 or 2 x 8."""

    async def main() -> None:
        async with application(bundle.root) as served:
            model = served.service.repository.get("many")
            for lane in model._lanes.values():
                spec = lane.facts.inputs[0].model_copy(update={"shape": ("N", 3, 8, 8)})
                lane.facts = dataclasses.replace(lane.facts, inputs=(spec,))
            given = {"pixel_values": pixels((8, 8))}
            found = model._lane_for(InferRequest(given, image_size="8x16"))
            assert found.size == (8, 16)
            with pytest.raises(RequestError, match="may be of 8x8 or 16x16 or 8x16: name one"):
                model._lane_for(InferRequest(given))

    asyncio.run(main())


def test_what_varies_is_minus_one(live: Live) -> None:
    said = live.ask("GET", "/v2/models/many").document
    assert said["inputs"] == [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
    assert said["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]
    assert said["parameters"]["image_sizes"] == "8x8,16x16,8x16"
    assert said["parameters"]["fit"] == "aspect"
    with GRPC.InferenceServerClient(live.grpc) as client:
        (given,) = client.get_model_metadata("many").inputs
        assert list(given.shape) == [-1, 3, -1, -1]
        config = client.get_model_config("many").config
        assert list(config.input[0].dims) == [3, -1, -1]
        assert config.max_batch_size == 8
        assert config.parameters["vitdeploy_fit"].string_value == "aspect"


# --- images ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_get_the_size_that_fits(live: Live) -> None:
    for shape, size in PHOTOS.items():
        data = jpeg(shape)
        many, alone = (
            live.ask("POST", f"/v1/models/{name}:predict", data).document
            for name in ("many", f"at{size_name(size)}")
        )
        assert many.pop("image_sizes") == [size_name(size)]
        assert "image_sizes" not in alone
        assert many["predictions"] == alone["predictions"]
        right = dict(zip(LABELS, expected(data, size), strict=True))
        for found in many["predictions"][0]:
            assert found["score"] == pytest.approx(right[found["label"]], rel=1e-4)


def test_one_request_with_images_of_all_shapes(live: Live) -> None:
    boundary = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    form = b"".join(boundary + jpeg(shape) + b"\r\n" for shape in PHOTOS) + b"--x--\r\n"
    reply = live.ask("POST", "/v1/models/many:predict", form, Content_Type="multipart/form-data; boundary=x")
    assert reply.document["image_sizes"] == [size_name(size) for size in PHOTOS.values()]
    for rows, (shape, size) in zip(reply.document["predictions"], PHOTOS.items(), strict=True):
        assert rows[0]["index"] == int(expected(jpeg(shape), size).argmax())


@pytest.mark.parametrize(
    "rule, sizes",
    [
        ("area", {(9, 9): (8, 8), (30, 60): (16, 16), (4, 40): (8, 16)}),
        ((8, 16), dict.fromkeys(PHOTOS, (8, 16))),
    ],
)
def test_other_rules(bundle: Bundle, rule: Rule, sizes: dict[Size, Size]) -> None:
    async def main() -> None:
        async with application(bundle.root, fit=rule) as served:
            for shape, size in sizes.items():
                reply = await served.ask("POST", "/v1/models/many:predict", jpeg(shape))
                assert reply.document["image_sizes"] == [size_name(size)]
                best = reply.document["predictions"][0][0]
                assert best["score"] == pytest.approx(expected(jpeg(shape), size).max(), rel=1e-4)

    asyncio.run(main())


@pytest.mark.slow
def test_an_image_that_lies_on_its_side(tmp_path: Path) -> None:
    """The size is that of the upright image, where the checkpoint's preprocessing turns it."""
    bundle = several_sizes(tmp_path / "many.bundle")
    manifest = bundle.manifest
    turned = manifest.preprocess.__class__(size=(8, 8), exif=True)  # type: ignore[union-attr]
    sizes = tuple(
        record.model_copy(update={"preprocess": turned.__class__(size=record.image_size, exif=True)})
        for record in manifest.sizes
    )
    with bundle.edit() as writer:
        writer.seal(manifest.model_copy(update={"preprocess": turned, "sizes": sizes}))
        writer.commit()
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (30, 60)).save(stream, "JPEG", exif=exif)

    async def main() -> None:
        async with application(bundle.root) as served:
            reply = await served.ask("POST", "/v1/models/many:predict", stream.getvalue())
            assert reply.document["image_sizes"] == ["8x16"]

    asyncio.run(main())


def features(bundle: Bundle) -> Bundle:
    """The same with its logits called features, which are vectors."""

    def renamed(artifact: Artifact) -> Artifact:
        outputs = tuple(spec.model_copy(update={"name": "features"}) for spec in artifact.outputs)
        return artifact.model_copy(update={"outputs": outputs})

    manifest = bundle.manifest
    with bundle.edit() as writer:
        for artifact in manifest.artifacts:
            model = onnx.load(bundle.path(artifact.path), load_external_data=False)
            model.graph.output[0].name = model.graph.node[-1].output[0] = "features"
            writer.file(artifact.path).write_bytes(model.SerializeToString())
        update = {
            "output": "features",
            "outputs": ("features",),
            "labels": None,
            "artifacts": tuple(map(renamed, manifest.artifacts)),
        }
        writer.seal(manifest.model_copy(update=update))
        return writer.commit()


@pytest.mark.slow
def test_embeddings(tmp_path: Path) -> None:
    bundle = features(several_sizes(tmp_path / "many.bundle"))

    async def main() -> None:
        async with application(bundle.root) as served:
            asked = body(*map(jpeg, PHOTOS))
            reply = await served.ask("POST", "/v1/embeddings", asked, {"Content-Type": "application/json"})
            assert reply.status == 200, reply
            for entry, (shape, size) in zip(reply.document["data"], PHOTOS.items(), strict=True):
                assert entry["image_size"] == size_name(size)
                right = answer_image(Image.open(io.BytesIO(jpeg(shape))), size)
                np.testing.assert_allclose(entry["embedding"], right, rtol=1e-4, atol=1e-5)

    asyncio.run(main())


# --- batches, statistics -----------------------------------------------------------------------------


def metric(live: Live, name: str, size: Size) -> float:
    text = live.ask("GET", "/metrics").body.decode()
    labels = f'{{image_size="{size_name(size)}",model="many",version="1"}}'
    found = re.search(rf"^{name}{re.escape(labels)} (.*)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def ask_all(live: Live, sizes: Sequence[Size]) -> None:
    """Requests of these sizes at once; each has to get its own answer."""
    wrong = list[object]()

    def ask(number: int) -> None:
        given = np.random.default_rng(number).normal(size=(2, 3, *sizes[number]))
        reply = live.ask("POST", "/v2/models/many/infer", json_request(given).body)
        output = reply.document["outputs"][0]
        found = np.array(output["data"]).reshape(output["shape"])
        if not np.allclose(found, answer(given.astype(np.float32)), rtol=1e-4, atol=1e-4):
            wrong.append((number, reply))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_each_size_is_batched_and_counted_by_itself(live: Live) -> None:
    asked = {size: 4 * (place + 1) for place, size in enumerate(SIZES)}
    path = "/v2/models/many/stats"
    (stats,) = live.ask("GET", path).document["model_stats"]
    before = {one["image_size"]: one for one in stats["image_sizes"]}
    images = {size: metric(live, "vitdeploy_images_total", size) for size in SIZES}
    ask_all(live, [size for size, count in asked.items() for _ in range(count)])
    (stats,) = live.ask("GET", path).document["model_stats"]
    for one in stats["image_sizes"]:
        size = next(size for size in SIZES if size_name(size) == one["image_size"])
        new = one["inference_count"] - before[one["image_size"]]["inference_count"]
        assert new == 2 * asked[size]
        assert metric(live, "vitdeploy_images_total", size) - images[size] == new
        assert sum(row["compute_infer"]["count"] for row in one["batch_stats"]) == one["execution_count"]
        assert metric(live, "vitdeploy_batch_size_count", size) == one["execution_count"]
        assert metric(live, "vitdeploy_queue_images", size) == 0
    for key in ("inference_count", "execution_count"):
        assert stats[key] == sum(one[key] for one in stats["image_sizes"])
    with GRPC.InferenceServerClient(live.grpc) as client:
        (whole,) = client.get_inference_statistics("many").model_stats
        assert whole.inference_count == stats["inference_count"]


# --- loading -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bundle_that_gets_another_size_is_loaded_anew(tmp_path: Path) -> None:
    folder = several_sizes(tmp_path / "many.bundle", SIZES[:2]).root
    with serving(folder, "--reload-seconds", 0) as server:
        wide = json_request(pixels((8, 16)))
        assert server.ask("POST", "/v2/models/many/infer", wide.body).status == 400
        several_sizes(folder)
        assert server.ask("POST", "/v2/repository/models/many/load").status == 200
        reply = server.ask("POST", "/v2/models/many/infer", wide.body)
        assert reply.document["parameters"] == {"image_size": "8x16"}
        assert "at 8x8, 16x16, 8x16, parity passed" in server.said()


@pytest.mark.slow
def test_a_size_that_answers_wrongly_is_not_served(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many.bundle", table_of={(16, 16): (8, 8)})
    with pytest.raises(ParityError, match=r"onnx-fp32-16x16 on onnxruntime is not served"):
        load_bundle(bundle.root, ModelSettings())


def test_a_rule_that_names_no_size_of_the_bundle(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no image size 9x9"):
        load_bundle(bundle.root, ModelSettings(fit=(9, 9)))


def test_an_unknown_rule(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    result = in_this_process(capsys, "serve", bundle.root, "--fit", "nearest")
    assert result.code == 2
    assert "aspect, area, or a size" in result.err


@pytest.mark.slow
def test_artifacts_of_every_size(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "many.bundle", precisions=("fp32", "fp16"))
    for wanted in ("fp16", "onnx-fp16"):
        loaded = load_bundle(bundle.root, ModelSettings(artifact=wanted))
        names = [size.predictors[0].session.facts.artifact for size in loaded.sizes]
        loaded.close()
        assert names == ["onnx-fp16", "onnx-fp16-16x16", "onnx-fp16-8x16"]
