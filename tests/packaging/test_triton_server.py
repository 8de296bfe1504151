"""NVIDIA's real Triton Inference Server loads what we package, and answers as the bundle says."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.helpers.bundles import FEATURES, LABELS, SPEC, answer, random_image, write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.quantised_bundles import write_quantised
from tests.helpers.triton_server import NotReady, Triton, running_triton
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.data import digits_images
from vitdeploy.errors import ImageError
from vitdeploy.images.preprocess import apply
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import write_package
from vitdeploy.predictor import Predictor
from vitdeploy.verification.live.round import LiveRequest, verify_live
from vitdeploy.verification.parity import TOLERANCES

pytestmark = pytest.mark.slow

CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
each = pytest.mark.parametrize("protocol", CLIENTS)


@pytest.fixture(scope="module")
def triton(digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """One server with the digits model, and the linear classifier in other shapes."""
    folder = tmp_path_factory.mktemp("triton")
    models = folder / "models"
    models.mkdir()
    uint8 = write_bundle(folder / "uint8.bundle", kind="uint8", name="uint8")
    fixed = write_bundle(folder / "fixed.bundle", batch=BatchRange(3, 3, 3), name="fixed")
    features = write_bundle(folder / "features.bundle", output="features", labels=None, name="features")
    two = write_bundle(folder / "two.bundle", features=FEATURES, name="two")
    quantised = write_quantised(folder / "quantised.bundle", name="quantised")
    for bundle, name, version in (
        (digits, "digits", 1),
        (uint8, "uint8", 3),
        (fixed, "fixed", 1),
        (features, "fea.tures-1", 1),
        (two, "two", 1),
    ):
        given = PackageSettings(threads=1, top_k=3) if name == "digits" else PackageSettings()
        made = write_package(
            bundle, "triton-server", folder / name, name=name, version=version, settings=given
        )
        for model in (made.folder / "models").iterdir():
            model.rename(models / model.name)
    for kind in ("int8", "fp8"):
        made = write_package(quantised, "triton-server", folder / kind, name=kind, artifact=kind)
        for model in (made.folder / "models").iterdir():
            model.rename(models / model.name)
    with running_triton(models, folder / "scratch") as server:
        yield server


def client_of(triton: Triton, protocol: str) -> Any:
    return CLIENTS[protocol].InferenceServerClient(getattr(triton, protocol))


def infer(
    triton: Triton, protocol: str, model: str, name: str, array: np.ndarray[Any, Any], **more: Any
) -> Any:
    from tritonclient.utils import np_to_triton_dtype

    library: ModuleType = CLIENTS[protocol]
    tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    client = client_of(triton, protocol)
    try:
        return client.infer(model, [tensor], **more)
    finally:
        client.close()


def classify(triton: Triton, protocol: str, files: list[bytes], model: str = "digits_image") -> Any:
    data = np.array(files, dtype=np.object_).reshape(len(files), 1)
    return infer(triton, protocol, model, "image", data)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@each
def test_every_model_is_ready(triton: Triton, protocol: str) -> None:
    client = client_of(triton, protocol)
    assert client.is_server_ready()
    for name in ("digits", "digits_preprocess", "digits_labels", "digits_image", "fixed_image"):
        assert client.is_model_ready(name)
        assert client.is_model_ready(name, "1")
    assert client.is_model_ready("uint8_image", "3")
    assert not client.is_model_ready("uint8_image", "1")
    client.close()


def test_metadata_and_configuration(triton: Triton, digits: Bundle) -> None:
    client = client_of(triton, "http")
    said = client.get_model_metadata("digits")
    assert said["platform"] == "onnxruntime_onnx"
    assert said["inputs"] == [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert said["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    config = client.get_model_config("digits")
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 2000
    assert config["parameters"]["vitdeploy_bundle"]["string_value"] == digits.manifest.digest
    image = client.get_model_metadata("digits_image")
    assert image["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    client.close()


@each
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_golden_tensors(triton: Triton, digits: Bundle, protocol: str, batch: int) -> None:
    golden = digits.golden()
    pixels, reference = golden["pixel_values"], golden["reference"]
    order = np.arange(batch) % len(pixels)
    found = infer(triton, protocol, "digits", "pixel_values", pixels[order]).as_numpy("logits")
    expected = reference[order]
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() <= TOLERANCES["fp32"].relative


@each
def test_several_outputs(triton: Triton, protocol: str) -> None:
    """All of them for tensors; for image files labels in place of the logits, and the others."""
    pictures = [random_image(seed) for seed in range(2)]
    pixels = np.stack([apply(picture, SPEC) for picture in pictures])
    right = {"logits": answer(pixels), "features": answer(pixels, weight=FEATURES)}
    found = infer(triton, protocol, "two", "pixel_values", pixels)
    for name, expected in right.items():
        np.testing.assert_allclose(found.as_numpy(name), expected, atol=1e-4)
    found = classify(triton, protocol, [png(picture) for picture in pictures], "two_image")
    np.testing.assert_allclose(found.as_numpy("features"), right["features"], atol=1e-4)
    assert found.as_numpy("indices")[:, 0].tolist() == right["logits"].argmax(axis=1).tolist()
    assert found.as_numpy("logits") is None


@each
def test_image_files_to_labels(triton: Triton, digits: Bundle, protocol: str) -> None:
    files = [path.read_bytes() for path in digits_images()]
    assert {data[:3] for data in files} == {b"\x89PN", b"\xff\xd8\xff"}  # PNG and JPEG
    found = classify(triton, protocol, files)
    labels, indices, scores = (found.as_numpy(name) for name in ("labels", "indices", "scores"))
    assert labels.shape == indices.shape == scores.shape == (len(files), 3)
    with Predictor.open(digits) as predictor:
        expected = predictor.predict(files, top_k=3)
    for row, predictions in enumerate(expected):
        assert [label.decode() for label in labels[row]] == [p.label for p in predictions]
        assert list(indices[row]) == [p.index for p in predictions]
        np.testing.assert_allclose(scores[row], [p.score for p in predictions], rtol=1e-3, atol=1e-5)


@each
def test_a_bad_image_is_an_error_and_no_crash(triton: Triton, protocol: str) -> None:
    good = digits_images()[0].read_bytes()
    for bad in (b"", b"no image", good[: len(good) // 2]):
        with pytest.raises(InferenceServerException, match=r"image of \d+ bytes"):
            classify(triton, protocol, [bad])
    with pytest.raises(InferenceServerException, match="image 2 of 3"):
        classify(triton, protocol, [good, b"no image", good])
    assert classify(triton, protocol, [good]).as_numpy("labels").shape == (1, 3)


def test_mutated_images_get_what_vitdeploy_gives_them(triton: Triton, digits: Bundle) -> None:
    """Files with bytes changed, cut out and added: the same labels, or an error in both."""
    originals = [path.read_bytes() for path in digits_images()]
    rng = np.random.default_rng(0)
    outcomes = set()
    with Predictor.open(digits) as predictor, closing(client_of(triton, "http")) as client:
        for number in range(1000):
            data = mutated(originals[number % len(originals)], rng)
            found = indices_or_error(client, data)
            try:
                expected = [one.index for one in predictor.predict([data], top_k=3)[0]]
            except ImageError as error:
                said = error.message
                assert isinstance(found, str)
                assert said in found
                outcomes.add("refused")
            else:
                assert found == expected
                outcomes.add("answered")
    assert outcomes == {"refused", "answered"}


def indices_or_error(client: Any, data: bytes) -> list[int] | str:
    image = tritonclient.http.InferInput("image", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[data]], dtype=np.object_))
    try:
        return [int(index) for index in client.infer("digits_image", [image]).as_numpy("indices")[0]]
    except InferenceServerException as refused:
        return str(refused)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(changed)))
        kind = rng.integers(4)
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[place : place + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(0, 9)))
        elif kind == 2:
            changed[place] = int(rng.integers(256))
        elif rng.integers(4) == 0:
            del changed[max(place, 1) :]
    return bytes(changed)


def test_a_bad_image_leaves_its_neighbours_alone(triton: Triton) -> None:
    """Requests of 16 clients at once, every fourth of them no image."""
    files = [path.read_bytes() for path in digits_images()]
    alone = [classify(triton, "http", [data]).as_numpy("labels")[0, 0] for data in files]

    def ask(number: int) -> bytes | None:
        data = b"no image" if number % 4 == 3 else files[number % len(files)]
        try:
            found: bytes = classify(triton, ("http", "grpc")[number % 2], [data]).as_numpy("labels")[0, 0]
            return found
        except InferenceServerException:
            return None

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(200)))
    assert answers == [None if n % 4 == 3 else alone[n % len(files)] for n in range(200)]


@each
def test_requests_that_do_not_fit(triton: Triton, protocol: str) -> None:
    for array in (
        np.zeros((33, 3, 32, 32), np.float32),
        np.zeros((1, 3, 32, 31), np.float32),
        np.zeros((1, 3, 32, 32), np.float64),
    ):
        with pytest.raises(InferenceServerException):
            infer(triton, protocol, "digits", "pixel_values", array)


def test_the_classification_extension(triton: Triton, digits: Bundle) -> None:
    golden = digits.golden()
    wanted = [tritonclient.http.InferRequestedOutput("logits", class_count=2)]
    found = infer(triton, "http", "digits", "pixel_values", golden["pixel_values"][:1], outputs=wanted)
    score, index, label = found.as_numpy("logits").reshape(-1)[0].decode().split(":")
    best = int(golden["reference"][0].argmax())
    assert (int(index), label) == (best, (digits.manifest.labels or ())[best])
    assert abs(float(score) - golden["reference"][0][best]) < 1e-3


@each
def test_uint8(triton: Triton, protocol: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    found = infer(triton, protocol, "uint8", "pixel_values", pixels).as_numpy("logits")
    np.testing.assert_allclose(found, answer(pixels, "uint8"), atol=1e-4)
    images = [png(Image.fromarray(one)) for one in pixels]
    labels = classify(triton, protocol, images, "uint8_image").as_numpy("labels")
    expected = answer(pixels, "uint8").argmax(axis=1)
    assert [label.decode() for label in labels[:, 0]] == [LABELS[index] for index in expected]


@each
def test_a_fixed_batch(triton: Triton, protocol: str) -> None:
    pixels = np.random.default_rng(2).normal(size=(3, 3, 8, 8)).astype(np.float32)
    found = infer(triton, protocol, "fixed", "pixel_values", pixels).as_numpy("logits")
    np.testing.assert_allclose(found, answer(pixels), atol=1e-4)
    raw = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    files = np.array([png(Image.fromarray(one)) for one in raw], dtype=np.object_)
    labels = infer(triton, protocol, "fixed_image", "image", files).as_numpy("labels")
    expected = answer(raw, "uint8").argmax(axis=1)  # the same normalisation
    assert [label.decode() for label in labels[:, 0]] == [LABELS[index] for index in expected]


@each
def test_an_ensemble_without_labels(triton: Triton, protocol: str) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    files = [png(Image.fromarray(one)) for one in raw]
    found = classify(triton, protocol, files, "fea.tures-1_image").as_numpy("features")
    np.testing.assert_allclose(found, answer(raw, "uint8"), atol=1e-4)


# --- what the README says ----------------------------------------------------------------------------


def test_the_readme_s_shell(triton: Triton, tmp_path: Path) -> None:
    readme = triton.log.parent.parent / "digits/README.md"
    path = digits_images()[0]
    (tmp_path / "image.jpg").write_bytes(path.read_bytes())
    (block,) = readme.read_text().split("```bash\n")[1:]
    code = block.partition("```")[0].replace("localhost:8000", triton.http)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = {one["name"]: one["data"] for one in json.loads(done.stdout)["outputs"]}
    labels = classify(triton, "http", [path.read_bytes()]).as_numpy("labels")[0]
    assert outputs["labels"] == [label.decode() for label in labels]


@pytest.mark.parametrize("name", ["digits", "fixed"])
def test_the_readme_s_python(triton: Triton, tmp_path: Path, name: str) -> None:
    readme = triton.log.parent.parent / name / "README.md"
    (tmp_path / "image.jpg").write_bytes(png(Image.open(digits_images()[0])))
    blocks = readme.read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        code = block.partition("```")[0].replace("localhost:8000", triton.http)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@each
def test_vitdeploy_verify_passes(triton: Triton, digits: Bundle, protocol: str) -> None:
    url = f"{protocol}://{getattr(triton, protocol)}"
    result = in_a_process("verify", digits.root, "--url", url, "--json")
    assert result.code == 0, result.err
    assert result.document["ok"] is True


# --- engines, and packages that do not load ----------------------------------------------------------


def test_a_tensorrt_plan_s_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server objects to the missing GPU only. On the CPU, with a double for TensorRT, the rest loads."""
    from tests.fakes.machines import L4, go_to
    from tests.helpers.engine_bundles import engines

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    go_to(monkeypatch, "10.16.1.11", L4)
    bundle = engines(tmp_path / "e.bundle", "10.16.1.11")
    monkeypatch.undo()
    engine = next(artifact for artifact in bundle.manifest.artifacts if artifact.format == "tensorrt")
    made = write_package(bundle, "triton-server", tmp_path / "out", artifact=engine.name)
    lack = "instance group linear_0 of model linear has kind KIND_GPU but no GPUs are available"
    with pytest.raises(NotReady, match=lack), running_triton(made.folder / "models", tmp_path / "a"):
        pass
    path = made.folder / "models/linear/config.pbtxt"
    path.write_text(path.read_text().replace("KIND_GPU", "KIND_CPU"))
    with running_triton(made.folder / "models", tmp_path / "b") as server:
        said = client_of(server, "http").get_model_metadata("linear")
        assert said["platform"] == "tensorrt_plan"
        pixels = np.zeros((2, 3, 8, 8), np.float32)
        found = infer(server, "grpc", "linear", "pixel_values", pixels).as_numpy("logits")
        assert found.shape == (2, 5)
        image = png(Image.new("RGB", (8, 8)))
        assert classify(server, "http", [image], "linear_image").as_numpy("labels").shape == (1, 5)


@pytest.mark.parametrize("change", ["dims", "labels"])
def test_the_server_does_refuse_what_is_wrong(tmp_path: Path, change: str) -> None:
    """So that a repository which loads says something."""
    bundle = write_bundle(tmp_path / "b.bundle")
    made = write_package(bundle, "triton-server", tmp_path / "out")
    folder = made.folder / "models"
    if change == "dims":
        path = folder / "linear/config.pbtxt"
        path.write_text(path.read_text().replace("dims: 3\n", "dims: 4\n", 1))
    else:
        (folder / "linear/labels.txt").unlink()
    with pytest.raises(NotReady), running_triton(folder, tmp_path / "scratch"):
        pass


@pytest.mark.parametrize(
    "file, change, word",
    [
        ("digits_labels/1/labels.json", {"labels": [str(9 - digit) for digit in range(10)]}, "label"),
        ("digits_preprocess/1/preprocess.json", {"mean": [0, 0, 0], "std": [1, 1, 1]}, "not normalised"),
    ],
)
def test_verify_finds_a_package_that_was_changed(
    digits: Bundle, tmp_path: Path, file: str, change: dict[str, Any], word: str
) -> None:
    made = write_package(digits, "triton-server", tmp_path / "out")
    path = made.folder / "models" / file
    settings = json.loads(path.read_text())
    (settings.get("preprocess") or settings).update(change)
    path.write_text(json.dumps(settings))
    with running_triton(made.folder / "models", tmp_path / "scratch") as server:
        result = in_a_process("verify", digits.root, "--url", server.url)
    assert result.code == 5, result.out
    assert word in (result.out + result.err).lower()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_network(triton: Triton, tmp_path: Path, kind: str) -> None:
    """Held against images of the user's own, at the tolerance of its artifact; labels and scores, too."""
    made = write_quantised(tmp_path / "quantised.bundle", name="quantised")
    report = verify_live(made, LiveRequest(triton.url, model=kind, calls=5))
    assert report.passed, (report.failures, report.causes)
    assert (report.precision, report.labels) == (kind, len(LABELS))
    assert {record.metrics.rows for record in report.parity if record.batch == 1} == {6}
    assert len(report.images) == 4
