"""Packages of a bundle with several image sizes; NVIDIA's real server loads them, and chooses rightly."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.helpers.several_sizes import LABELS, SIZES, WEIGHT, answer, answer_image, several_sizes
from tests.helpers.triton_server import Triton, running_triton
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange, Size, size_name
from vitdeploy.errors import UsageError
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.triton_config import parse_config
from vitdeploy.packaging.write import Package, write_package
from vitdeploy.scores import softmax
from vitdeploy.verification.live.round import LiveRequest, verify_live

Make = Callable[..., Package]
MODELS = dict(zip(("linear", "linear_16x16", "linear_8x16"), SIZES, strict=True))
PHOTOS: dict[Size, Size] = {(9, 9): (8, 8), (40, 40): (16, 16), (30, 60): (8, 16), (50, 20): (16, 16)}
"""Heights and widths of image files, and the size that is nearest in shape, then in area."""
CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


@pytest.fixture
def many(tmp_path: Path) -> Bundle:
    return several_sizes(tmp_path / "many.bundle", precisions=("fp32", "fp16"))


def config(package: Package, name: str) -> Any:
    return parse_config((package.folder / "models" / name / "config.pbtxt").read_text(encoding="utf-8"))


def test_a_model_for_each_size(package: Make, many: Bundle) -> None:
    made = package(many, artifact="fp16", threads=1)
    assert {path.name for path in (made.folder / "models").iterdir()} == {*MODELS, "linear_image"}
    for name, size in MODELS.items():
        found = config(made, name)
        assert list(found.input[0].dims) == [3, *size]
        parameters = {key: value.string_value for key, value in found.parameters.items()}
        assert parameters["vitdeploy_artifact"].startswith("onnx-fp16")
        assert parameters["vitdeploy_image_sizes"] == "8x8,16x16,8x16"
        assert parameters["vitdeploy_fit"] == "aspect"
        folder = made.folder / "models" / name / "1"
        assert sorted(path.name for path in folder.iterdir()) == ["model.fp16.onnx.data", "model.onnx"]
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        pixels = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
        np.testing.assert_allclose(session.run(None, {"pixel_values": pixels})[0], answer(pixels), atol=1e-2)


def test_the_weights_are_there_once(package: Make, many: Bundle) -> None:
    made = package(many)
    data = [made.folder / "models" / name / "1/model.onnx.data" for name in MODELS]
    assert len({path.stat().st_ino for path in data}) == 1
    assert data[0].read_bytes() == WEIGHT.tobytes()
    assert any("the 3 sizes share" in note for note in made.notes)
    text = (made.folder / "README.md").read_text()
    assert "| `linear_8x16` | FP32 [N, 3, 8, 16] |" in text
    assert "an image gets the one of the nearest aspect ratio" in text
    service = package(many, "kserve", "service", storage_uri="s3://b/m", image="server:1")
    assert "| `linear_16x16` |" in (service.folder / "README.md").read_text()
    assert (service.folder / "models/linear_image/1/model.py").exists()


def test_tensors_only(package: Make, many: Bundle) -> None:
    made = package(many, tensors_only=True)
    assert {path.name for path in (made.folder / "models").iterdir()} == {*MODELS}
    assert "linear_image" not in (made.folder / "README.md").read_text()


def test_our_own_server(package: Make, many: Bundle) -> None:
    made = package(many, "docker", fit=(8, 16), artifact="fp16")
    (line,) = [
        line for line in (made.folder / "Dockerfile").read_text().splitlines() if line.startswith("CMD")
    ]
    command = json.loads(line.removeprefix("CMD "))
    assert command[command.index("--fit") + 1] == "8x16"
    assert command[command.index("--artifact") + 1] == "onnx-fp16"
    assert "An image gets 8x16, whatever its shape" in (made.folder / "README.md").read_text()
    ray = package(many, "ray", "ray", fit="area")
    assert 'fit: "area"' in (ray.folder / "serve_config.yaml").read_text()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"artifact": "onnx-fp32-16x16"}, "is of one image size only"),
        ({"fit": (9, 9)}, "no image size 9x9"),
    ],
)
def test_what_is_refused(package: Make, many: Bundle, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        package(many, **given)


# --- in the real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """The classifier as ``linear``, and one of three images at a time as ``fixed``, packaged for KServe."""
    folder = tmp_path_factory.mktemp("packaged")
    bundle = several_sizes(folder / "linear.bundle")
    fixed = several_sizes(folder / "fixed.bundle", kind="uint8", batch=BatchRange(3, 3, 3))
    models = write_package(bundle, "triton-server", folder / "linear").folder / "models"
    given = PackageSettings(storage_uri="s3://models/fixed", image="server-with-pillow:1")
    other = write_package(fixed, "kserve", folder / "fixed", name="fixed", settings=given)
    for model in (other.folder / "models").iterdir():
        model.rename(models / model.name)
    return bundle, models


@pytest.fixture(scope="module")
def triton(packaged: tuple[Bundle, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with running_triton(packaged[1], tmp_path_factory.mktemp("triton") / "scratch") as running:
        yield running


def infer(triton: Triton, protocol: str, model: str, name: str, array: np.ndarray[Any, Any]) -> Any:
    library = CLIENTS[protocol]
    tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    with library.InferenceServerClient(getattr(triton, protocol)) as client:
        return client.infer(model, [tensor])


def jpeg(size: Size) -> bytes:
    coarse = np.random.default_rng(size).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def require_right(found: Any, photos: list[Size], kind: str = "float") -> None:
    """Labels, scores and sizes of these photographs, from float64."""
    sizes, labels, scores = (found.as_numpy(name) for name in ("image_size", "labels", "scores"))
    assert [size.decode() for size in sizes.reshape(-1)] == [size_name(PHOTOS[shape]) for shape in photos]
    for row, shape in enumerate(photos):
        image = Image.open(io.BytesIO(jpeg(shape)))
        right = dict(zip(LABELS, softmax(answer_image(image, PHOTOS[shape], kind)), strict=True))
        assert [label.decode() for label in labels[row]] == sorted(right, key=right.__getitem__, reverse=True)
        np.testing.assert_allclose(scores[row], sorted(right.values(), reverse=True), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", CLIENTS)
def test_every_size_answers(triton: Triton, protocol: str) -> None:
    for name, size in MODELS.items():
        pixels = np.random.default_rng(size).normal(size=(4, 3, *size)).astype(np.float32)
        found = infer(triton, protocol, name, "pixel_values", pixels).as_numpy("logits")
        np.testing.assert_allclose(found, answer(pixels), rtol=1e-4, atol=1e-5)
    photos = list(PHOTOS)
    for some in (photos[:1], photos[2:3], photos, 2 * photos):
        files = np.array([[jpeg(shape)] for shape in some], dtype=np.object_)
        require_right(infer(triton, protocol, "linear_image", "image", files), some)


@pytest.mark.slow
def test_a_fixed_batch_of_images_of_several_sizes(triton: Triton) -> None:
    photos = list(PHOTOS)[:3]
    files = np.array([jpeg(shape) for shape in photos], dtype=np.object_)
    require_right(infer(triton, "http", "fixed_image", "image", files), photos, "uint8")


@pytest.mark.slow
def test_a_bad_image_is_an_error_of_its_own(triton: Triton) -> None:
    good = jpeg((40, 40))
    with pytest.raises(InferenceServerException, match=r"image 2 of 2: .*is not an image"):
        infer(triton, "grpc", "linear_image", "image", np.array([[good], [b"no image"]], dtype=np.object_))
    require_right(infer(triton, "grpc", "linear_image", "image", np.array([[good]], np.object_)), [(40, 40)])


@pytest.mark.slow
def test_verification(packaged: tuple[Bundle, Path], triton: Triton) -> None:
    for protocol in CLIENTS:
        url = f"{protocol}://{getattr(triton, protocol)}"
        report = verify_live(packaged[0], LiveRequest(url, model="linear"))
        assert report.passed, (report.failures, report.causes)
        names = {f"{model} at {size_name(size)}" for model, size in MODELS.items()}
        assert {record.artifact for record in report.parity} == names
        assert {image.size for image in report.images} == {size_name(size) for size in SIZES}
    report = verify_live(packaged[0], LiveRequest(triton.url, model="linear_image"))
    assert report.passed, (report.failures, report.causes)
    assert len(report.images) == 6


@pytest.mark.slow
def test_verification_finds_the_wrong_size(packaged: tuple[Bundle, Path], tmp_path: Path) -> None:
    made = write_package(packaged[0], "triton-server", tmp_path / "package")
    path = made.folder / "models/linear_image/1/images.json"
    settings = json.loads(path.read_text())
    settings["fit"] = "8x8"
    path.write_text(json.dumps(settings))
    with running_triton(made.folder / "models", tmp_path / "scratch") as running:
        report = verify_live(packaged[0], LiveRequest(running.url, batches=[1]))
    assert not report.passed
    assert all(record.passed for record in report.parity)
    assert any("the size 8x8 was taken, not 16x16" in failure for failure in report.failures)
    assert "what the model gives for another image size" in report.causes[0]
