"""Models of one channel and of four, from a folder to answers, against transformers' processor and model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import vitdeploy
from tests.helpers.channel_models import (
    MEAN,
    SIZE,
    STD,
    Array,
    expected_logits,
    expected_pixels,
    exported,
    normalised,
    save_model,
)
from tests.helpers.commands import Run
from tests.helpers.exports import Exports
from tests.helpers.live_server import Live, serving
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.scores import softmax
from vitdeploy.verification.live.diagnosis import explain_images
from vitdeploy.verification.live.image_endpoints import Scored
from vitdeploy.verification.live.images import expect, image_files

pytestmark = pytest.mark.slow

PHOTOGRAPH = Image.fromarray(load_sample_images().images[1])


@pytest.fixture(scope="module")
def grey(exports: Exports) -> Path:
    return exported(exports, 1, "--fp32", "--fp16").folder


@pytest.fixture(scope="module")
def four(exports: Exports) -> Path:
    return exported(exports, 4, "--fp32").folder


@pytest.fixture(scope="module")
def four_uint8(exports: Exports) -> Path:
    return exported(exports, 4, "--fp32", "--input", "uint8").folder


@pytest.fixture(scope="module")
def live(grey: Path, four: Path, four_uint8: Path) -> Iterator[Live]:
    with serving(f"grey={grey}", f"four={four}", f"bytes={four_uint8}") as server:
        yield server


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


FILES = {
    "JPEG": encoded(PHOTOGRAPH, "JPEG"),
    "PNG": encoded(PHOTOGRAPH, "PNG"),
    "grey JPEG": encoded(PHOTOGRAPH.convert("L"), "JPEG"),
    "grey PNG": encoded(PHOTOGRAPH.convert("L"), "PNG"),
    "transparent": encoded(PHOTOGRAPH.convert("RGBA"), "PNG"),
    "palette": encoded(PHOTOGRAPH.convert("P"), "PNG"),
}


def opened(data: bytes) -> Image.Image:
    """As somebody opens an image for a grey model."""
    return Image.open(io.BytesIO(data)).convert("L")


def close(ours: Array, theirs: Array) -> bool:
    return bool(np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max())


def tensors(channels: int, count: int = 3) -> Array:
    """Images (N, H, W, C) uint8."""
    return np.random.default_rng(5).integers(0, 256, (count, *SIZE, channels), dtype=np.uint8)


def test_images_become_grey_and_get_the_logits_of_transformers(grey: Path) -> None:
    pixels = expected_pixels(grey, *(opened(data) for data in FILES.values()))
    assert pixels.shape[1] == 1
    with vitdeploy.load(grey, artifact="onnx-fp32") as predictor:
        ours = np.stack([predictor.preprocess(data) for data in FILES.values()])
        assert np.array_equal(ours, pixels.astype(np.float32))
        assert close(predictor.logits(FILES.values()), expected_logits(grey, pixels))
        levels = np.asarray(opened(FILES["grey PNG"]))
        for array in (levels, levels[..., None]):
            assert np.array_equal(predictor.preprocess(array), ours[list(FILES).index("grey PNG")])


def test_the_server_takes_images_for_one_channel(grey: Path, live: Live) -> None:
    kinds = ("JPEG", "grey PNG")
    scores = softmax(expected_logits(grey, expected_pixels(grey, *(opened(FILES[kind]) for kind in kinds))))
    instances = [{"b64": base64.b64encode(FILES[kind]).decode()} for kind in kinds]
    body = json.dumps({"instances": instances}).encode()
    path = "/v1/models/grey:predict?top_k=6"
    several = live.ask("POST", path, body, Content_Type="application/json")
    one = live.ask("POST", path, FILES["JPEG"], Content_Type="image/jpeg")
    assert (several.status, one.status) == (200, 200), several.body
    assert several.document["predictions"][0] == one.document["predictions"][0]
    for found, row in zip(several.document["predictions"], scores, strict=True):
        assert [p["index"] for p in found] == np.argsort(-row).tolist()
        assert [p["score"] for p in found] == pytest.approx(sorted(row, reverse=True), abs=1e-5)


def infer(live: Live, name: str, array: Array) -> Array:
    datatype = {"float32": "FP32", "uint8": "UINT8"}[str(array.dtype)]
    tensor = {
        "name": "pixel_values",
        "shape": array.shape,
        "datatype": datatype,
        "data": array.ravel().tolist(),
    }
    reply = live.ask("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode())
    assert reply.status == 200, reply.body
    (output,) = reply.document["outputs"]
    return np.array(output["data"]).reshape(output["shape"])


def test_tensors_of_one_and_four_channels(grey: Path, four: Path, four_uint8: Path, live: Live) -> None:
    for name, bundle, channels in (("grey", grey, 1), ("four", four, 4), ("bytes", four_uint8, 4)):
        images = tensors(channels)
        pixels = normalised(images)
        given = images if name == "bytes" else pixels.astype(np.float32)
        expected = expected_logits(bundle, pixels)
        with vitdeploy.load(bundle, artifact="onnx-fp32") as predictor:
            assert close(predictor.run(given), expected)
        assert close(infer(live, name, given), expected)
        shape = live.ask("GET", f"/v2/models/{name}").document["inputs"][0]["shape"]
        assert shape == [-1, *given.shape[1:]]


def test_bundles_and_servers_verify(run: Run, grey: Path, four: Path, four_uint8: Path, live: Live) -> None:
    for name, bundle in (("grey", grey), ("four", four), ("bytes", four_uint8)):
        here = run("verify", bundle, "--backend", "onnxruntime,torch", "--json")
        assert here.code == 0, here.out
        assert here.document["preprocess"]["images"] == (2 if name == "grey" else 0)
        there = run("verify", bundle, "--url", live.url, "--model", name, "--batch", 1, "--json")
        assert there.code == 0, there.out + there.err
        assert len(there.document["images"]) == (4 if name == "grey" else 0)
    assert "preprocessing equal" in run("verify", grey).out
    said = run("verify", four).out
    assert "the bundle reads tensors of 4 channels, not images: no pixels were compared" in said
    assert "preprocessing equal" not in said


GREYS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "grey that is the mean of red, green and blue": ("half", lambda rgb: np.rint(rgb.mean(axis=-1))),
    "BGR pixels: red and blue are swapped": (
        "half",
        lambda rgb: np.asarray(Image.fromarray(np.ascontiguousarray(rgb[..., ::-1])).convert("L")),
    ),
    "pixels normalised with ImageNet's mean and std": (
        "imagenet",
        lambda rgb: np.asarray(Image.fromarray(rgb).convert("L")),
    ),
}


@pytest.mark.parametrize("cause", GREYS)
def test_what_a_server_does_wrong_with_grey_is_named(grey: Path, cause: str) -> None:
    """A server's own Pillow and numpy, or PyTorch's processor, instead of the bundle's preprocessing."""
    bundle = Bundle.open(grey)
    statistics, convert = GREYS[cause]
    with vitdeploy.load(bundle, artifact="onnx-fp32") as local:
        asked = expect(local, image_files(bundle))
        wrong = []
        for item in asked:
            rgb = np.asarray(Image.open(io.BytesIO(item.file.data)))
            pixels = expected_pixels(grey, Image.fromarray(convert(rgb).astype(np.uint8)))
            if statistics == "imagenet":
                levels = pixels * STD[0] + MEAN[0]
                pixels = (levels - np.mean([0.485, 0.456, 0.406])) / np.mean([0.229, 0.224, 0.225])
            scores = softmax(expected_logits(grey, pixels)[0])
            best = np.argsort(-scores)
            wrong.append((item, [Scored(f"LABEL_{i}", int(i), float(scores[i])) for i in best]))
        found = explain_images(bundle, local, wrong, bound=1e-4)
    assert found is not None
    assert cause in found


def test_golden_channels_tell_apart(four: Path) -> None:
    """A mistake that swaps two channels shows in the golden outputs."""
    golden = Bundle.open(four).golden()
    assert golden["pixel_values"].shape[1:] == (4, *SIZE)
    assert not [name for name in golden if name.startswith("image.")]
    for first in range(4):
        for second in range(first):
            swapped = golden["pixel_values"].copy()
            swapped[:, [first, second]] = swapped[:, [second, first]]
            assert not close(expected_logits(four, swapped), golden["reference"])


def test_what_the_server_says_it_takes(live: Live) -> None:
    said = live.said()
    assert f"grey version 1: curl --data-binary @IMAGE {live.url}/v1/models/grey:predict" in said
    assert f"four version 1: tensors at {live.url}/v2/models/four/infer" in said


def test_images_for_four_channels_are_refused(run: Run, tmp_path: Path, four: Path, live: Live) -> None:
    photograph = tmp_path / "a.jpg"
    photograph.write_bytes(FILES["JPEG"])
    refused = run("predict", four, photograph)
    assert refused.code == 2
    assert "reads tensors of 4 channels, not images, so it cannot take images" in refused.err
    assert "hint: in Python, vitdeploy.load(BUNDLE).run(x) takes x: float32 (N, 4, 32, 48)" in refused.err
    accuracy = run("verify", four, "--data", tmp_path)
    assert accuracy.code == 2
    assert "accuracy needs images, but this bundle reads tensors of 4 channels" in accuracy.err
    answer = live.ask("POST", "/v1/models/four:predict", FILES["JPEG"])
    assert answer.status == 400
    assert answer.error == (
        "model 'four' takes no images: its bundle reads tensors of 4 channels, not images; "
        "tensors go to /v2/models/four/infer"
    )


def test_packages_of_four_channels_take_tensors(run: Run, tmp_path: Path, four: Path) -> None:
    folder = tmp_path / "triton"
    made = run("package", four, "--target", "triton-server", "--name", "four", "-o", folder)
    assert made.code == 0, made.err
    assert "tensors in, tensors out only: the bundle reads tensors of 4 channels, not images" in made.out
    assert [path.name for path in (folder / "models").iterdir()] == ["four"]
    assert "dims: 4\n  dims: 32\n  dims: 48" in (folder / "models/four/config.pbtxt").read_text()
    folder = tmp_path / "docker"
    assert run("package", four, "--target", "docker", "--name", "four", "-o", folder).code == 0
    readme = (folder / "README.md").read_text()
    assert "image.jpg" not in readme
    assert "/v2/models/four/infer: pixel_values, float32 (N, 4, 32, 48)" in readme
    refused = run("package", four, "--target", "ray", "-o", tmp_path / "ray")
    assert refused.code == 2
    assert "reads tensors of 4 channels, not images" in refused.err
    assert "hint: --target triton-server, kserve or docker serves tensors" in refused.err


def test_a_job_on_ray_needs_images(four: Path) -> None:
    from vitdeploy.ray.job import JobRequest, make_plan
    from vitdeploy.ray.serving import _batch as most_together

    with pytest.raises(UsageError, match="reads tensors of 4 channels, not images"):
        make_plan(JobRequest(four, ("photos",), Path("out")))
    with (
        vitdeploy.load(four) as predictor,
        pytest.raises(UsageError, match="reads tensors of 4 channels, not images"),
    ):
        most_together(predictor, 8)


def test_what_the_user_is_told(run: Run, tmp_path: Path, grey: Path) -> None:
    grey_model = str(grey.parent / "model")
    planned = run("export", "-m", grey_model, "--dry-run", "--json").document
    assert planned["input"] == "pixel_values float32 (N, 1, 32, 48)"
    assert (
        "one channel: images become grey (Pillow's L, ITU-R BT.601) before they are resized"
        in planned["notes"]
    )
    assert planned["notes"][:1] == list(Bundle.open(grey).manifest.provenance.notes)
    assert "colour       grey" in run("inspect", grey).out
    save_model(tmp_path, 4)
    planned = run("export", "-m", tmp_path, "--dry-run", "--input", "uint8", "--json").document
    assert planned["input"] == "pixel_values uint8 (N, 32, 48, 4)"
    assert "4 channels: tensors go in, not images" in planned["notes"]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_processor_for_rgb_is_refused(run: Run, tmp_path: Path, channels: int) -> None:
    """transformers' own processor refuses such a pair, too: three means do not go with one channel."""
    save_model(tmp_path, channels)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.4, 0.3]}))
    refused = run("export", "-m", tmp_path, "-o", tmp_path / "out.bundle")
    wanted = (
        "one number, as the model has one channel"
        if channels == 1
        else "4 numbers, as the model has 4 channels"
    )
    assert refused.code == 2
    assert f"image_mean = [0.5, 0.4, 0.3] is not {wanted}" in refused.err
    assert not (tmp_path / "out.bundle").exists()
