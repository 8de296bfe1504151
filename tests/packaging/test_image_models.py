"""The packaged Python models, in a process without vitdeploy, against vitdeploy's answers, bit for bit."""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import LABELS, SPEC, write_bundle
from tests.helpers.paths import TESTS
from vitdeploy.config import Preprocess, Scores
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import apply, apply_uint8
from vitdeploy.packaging.write import Package, write_package
from vitdeploy.scores import scores_of

STAND_IN = TESTS / "triton_stand_in"
Task = tuple[str, list[dict[str, Any]]]
Make = Callable[..., Package]

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
SPECS = {
    **{f"exact {name}": Preprocess(size=(24, 20), resample=name) for name in FILTERS},  # type: ignore[arg-type]
    "edge": Preprocess(size=(24, 24), resize="shortest_edge", resize_edge=29, resample="bicubic"),
    "edge rounded": Preprocess(
        size=(23, 17), resize="shortest_edge", resize_edge=30, crop_rounding="round", exif=True
    ),
    "crop": Preprocess(size=(24, 24), resize_to=(31, 28), resample="lanczos"),
    "cover": Preprocess(size=(20, 28), resize="cover", resize_to=(24, 32), exif=True),
    "contain": Preprocess(size=(33, 33), resize="contain", resize_to=(33, 33), pad=(7, 100, 255)),
    "beyond": Preprocess(size=(40, 37), resize="none", pad=(124, 116, 104), crop_rounding="round"),
    "imagenet": Preprocess(size=(24, 24), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "grey": Preprocess(
        size=(23, 17),
        resize="contain",
        resize_to=(23, 17),
        pad=(7, 100, 255),
        mean=(0.4,),
        std=(0.3,),
        exif=True,
    ),
    "raw": Preprocess(size=(24, 24), rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep_png(width: int, height: int) -> bytes:
    """A PNG of 16-bit grey, written by hand."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    levels = np.linspace(0, 65535, width * height).astype(">u2").reshape(height, width)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def files() -> dict[str, bytes]:
    """Image files of every kind that people have."""
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((61, 47))
    made = {kind: encoded(smooth, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")}
    for mode in ("L", "LA", "RGBA", "P", "1"):
        made[f"PNG {mode}"] = encoded(smooth.convert(mode), "PNG")
    made |= {
        "palette with transparency": encoded(smooth.convert("P"), "PNG", transparency=3),
        "CMYK": encoded(smooth.convert("CMYK"), "JPEG"),
        "CMYK TIFF": encoded(smooth.convert("CMYK"), "TIFF"),
        "grey JPEG": encoded(smooth.convert("L"), "JPEG"),
        "progressive": encoded(smooth, "JPEG", progressive=True, quality=37),
        "no chroma lost": encoded(smooth, "JPEG", subsampling=0),
        "lossless WEBP": encoded(smooth, "WEBP", lossless=True),
        "16 bit": deep_png(37, 23),
        "animation": encoded(
            smooth, "GIF", save_all=True, append_images=[Image.new("RGB", smooth.size, "red")]
        ),
        "one pixel": encoded(Image.new("RGB", (1, 1), (9, 200, 31)), "PNG"),
        "a line": encoded(smooth.resize((300, 2)), "PNG"),
        "tall": encoded(smooth.resize((5, 211)), "JPEG"),
        "already right": encoded(smooth.resize((20, 24)), "PNG"),
    }
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        made[f"turned {turn}"] = encoded(smooth, "JPEG", exif=exif)
    return made


def no_images() -> dict[str, bytes]:
    good = encoded(Image.new("RGB", (40, 30), "blue"), "JPEG")
    deep = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    return {
        "empty": b"",
        "text": b"no image at all",
        "cut short": good[: len(good) // 2],
        "a head only": good[:20],
        "floats": encoded(deep, "TIFF"),
        "nonsense PNG": b"\x89PNG\r\n\x1a\n" + bytes(60),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "a bomb": bomb(),
    }


def bomb() -> bytes:
    """A small PNG that says it is 60000x60000."""
    image = bytearray(deep_png(2, 2))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    image[16:29] = header
    image[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return bytes(image)


def batch(*images: bytes) -> dict[str, Any]:
    """A request as the server hands it over: (n, 1) objects."""
    return {"image": np.array(images, dtype=np.object_).reshape(len(images), 1)}


@pytest.fixture
def run_models(tmp_path: Path) -> Callable[[list[Task]], list[list[Any]]]:
    """Packaged models' answers, computed in a process without vitdeploy."""

    def run(tasks: list[Task]) -> list[list[Any]]:
        asked, answered = tmp_path / "asked.pickle", tmp_path / "answered.pickle"
        asked.write_bytes(pickle.dumps(tasks))
        done = subprocess.run(
            [sys.executable, str(STAND_IN / "run_models.py"), str(asked), str(answered)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        found: list[list[Any]] = pickle.loads(answered.read_bytes())
        return found

    return run


def version_folder(package: Package, model: str) -> str:
    return str(package.folder / "models" / model / "1")


def packaged(folder: Path, **fields: Any) -> Package:
    bundle = write_bundle(folder / "b.bundle", **fields)
    return write_package(bundle, "triton-server", folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_pixels_are_vitdeploy_s_own(
    tmp_path: Path, run_models: Callable[[list[Task]], list[list[Any]]], kind: str
) -> None:
    images = files()
    tasks = []
    for number, spec in enumerate(SPECS.values()):
        made = packaged(tmp_path / str(number), kind=kind, preprocess=spec)
        tasks.append((version_folder(made, "linear_preprocess"), [batch(data) for data in images.values()]))
    convert = apply if kind == "float" else apply_uint8
    for (name, spec), answers in zip(SPECS.items(), run_models(tasks), strict=True):
        for (label, data), answered in zip(images.items(), answers, strict=True):
            expected = convert(load_image(data), spec)[None]
            found = answered["pixel_values"]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (name, label)
            assert found.tobytes() == expected.tobytes(), (name, label)


@pytest.mark.slow
def test_a_batch_is_its_images(tmp_path: Path, run_models: Callable[[list[Task]], list[list[Any]]]) -> None:
    made = packaged(tmp_path / "p")
    images = list(files().values())
    ((together,),) = run_models([(version_folder(made, "linear_preprocess"), [batch(*images)])])
    expected = np.stack([apply(load_image(data), SPEC) for data in images])
    assert together["pixel_values"].tobytes() == expected.tobytes()


@pytest.mark.slow
def test_what_is_no_image_gets_an_error_of_its_own(
    tmp_path: Path, run_models: Callable[[list[Task]], list[list[Any]]]
) -> None:
    made = packaged(tmp_path / "p")
    good, bad = files()["PNG"], no_images()
    requests = [batch(good)]
    for data in bad.values():
        requests += [batch(data), batch(good)]
    requests.append(batch(good, bad["text"]))
    (answers,) = run_models([(version_folder(made, "linear_preprocess"), requests)])
    right = apply(load_image(good), SPEC)[None]
    for number, label in enumerate(bad):
        refused, answered = answers[1 + 2 * number : 3 + 2 * number]
        assert isinstance(refused, str), label
        assert "\n" not in refused
        assert "Traceback" not in refused
        assert np.array_equal(answered["pixel_values"], right), label
    assert answers[-1].startswith("image 2 of 2: ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "none"])
def test_labels_and_scores_are_vitdeploy_s_own(
    tmp_path: Path, run_models: Callable[[list[Task]], list[list[Any]]], kind: Scores
) -> None:
    made = packaged(tmp_path / "p", labels=("ca,t", "d\nog", "é", "", "fox"), scores=kind)
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(n, 5), scale=s).astype(np.float32) for n, s in ((1, 1), (8, 30), (3, 1e30))]
    logits += [np.zeros((2, 5), np.float32), np.array([[1, 3, 3, 1, 3]], np.float32)]  # ties: the first first
    bad = np.array([[1, np.nan, 0, 0, 0]], np.float32)
    requests = [{"logits": array} for array in [*logits, bad, np.full((1, 5), -np.inf, np.float32)]]
    (answers,) = run_models([(version_folder(made, "linear_labels"), requests)])
    for array, found in zip(logits, answers, strict=False):
        scores = scores_of(array, kind)
        order = np.argsort(-scores, axis=-1, kind="stable")
        assert found["indices"].dtype == np.int32
        assert np.array_equal(found["indices"], order)
        names = [[made_label.decode() for made_label in row] for row in found["labels"]]
        assert names == [[("ca,t", "d\nog", "é", "", "fox")[i] for i in row] for row in order]
        np.testing.assert_allclose(found["scores"], np.take_along_axis(scores, order, -1), rtol=1e-6)
    assert all("NaN or infinite" in refused for refused in answers[len(logits) :])


@pytest.mark.slow
@pytest.mark.parametrize("labels", [LABELS, None])
def test_names_of_classes(
    tmp_path: Path, run_models: Callable[[list[Task]], list[list[Any]]], labels: tuple[str, ...] | None
) -> None:
    made = packaged(tmp_path / "p", labels=labels)
    request = {"logits": np.array([[0, 5, 1, 3, 2]], np.float32)}
    ((found,),) = run_models([(version_folder(made, "linear_labels"), [request])])
    expected = [(labels or "01234")[index] for index in (1, 3, 4, 2, 0)]
    assert [one.decode() for one in found["labels"][0]] == expected


def test_the_settings_are_the_bundle_s(tmp_path: Path) -> None:
    import json

    made = packaged(tmp_path / "p", preprocess=SPECS["contain"])
    text = Path(version_folder(made, "linear_preprocess"), "preprocess.json").read_text()
    settings = json.loads(text)
    assert settings["preprocess"] == json.loads(json.dumps(dataclasses.asdict(SPECS["contain"])))
