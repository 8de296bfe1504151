"""Commands on a bundle of several image sizes: `predict` says in every form which one was taken."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.commands import Run
from tests.helpers.several_sizes import LABELS, SIZES, answer_image, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.cli import parse
from vitdeploy.errors import UsageError

SMALL, LARGE, WIDE = SIZES
PICTURES = {"small.png": (9, 9), "wide.png": (40, 20), "large.png": (50, 50)}
"""Width and height."""
TAKEN = {"small.png": SMALL, "wide.png": WIDE, "large.png": LARGE}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    random, paths = np.random.default_rng(0), []
    for name, (width, height) in PICTURES.items():
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(tmp_path / name)
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return several_sizes(tmp_path_factory.mktemp("sizes") / "b.bundle", precisions=("fp32", "fp16"))


def label(path: Path, size: tuple[int, int]) -> str:
    return LABELS[int(answer_image(Image.open(path), size).argmax())]


def test_json(run: Run, sized: Bundle, images: list[Path]) -> None:
    result = run("predict", sized.root, *images, "--json", "--top-k", 1)
    assert (result.code, result.err) == (0, "")
    for path, image in zip(images, result.document["images"], strict=True):
        assert image["image_size"] == list(TAKEN[path.name])
        assert image["predictions"][0]["label"] == label(path, TAKEN[path.name])


def test_text_and_csv(run: Run, sized: Bundle, images: list[Path]) -> None:
    lines = run("predict", sized.root, *images, "--top-k", 1).out.splitlines()
    assert lines[::2] == [f"{images[0]}  (8x8)", f"{images[1]}  (8x16)", f"{images[2]}  (16x16)"]
    rows = list(csv.DictReader(io.StringIO(run("predict", sized.root, *images, "--csv").out)))
    assert {(row["path"], row["image_size"]) for row in rows} == {
        (str(path), f"{TAKEN[path.name][0]}x{TAKEN[path.name][1]}") for path in images
    }


@pytest.mark.parametrize(
    "rule, taken", [("area", [SMALL, LARGE, LARGE]), ("8x16", [WIDE] * 3), ("16", [LARGE] * 3)]
)
def test_fit(run: Run, sized: Bundle, images: list[Path], rule: str, taken: list[tuple[int, int]]) -> None:
    document = run("predict", sized.root, *images, "--json", "--top-k", 1, "--fit", rule).document
    assert [tuple(image["image_size"]) for image in document["images"]] == taken
    for path, size, image in zip(images, taken, document["images"], strict=True):
        assert image["predictions"][0]["label"] == label(path, size)


def test_an_unknown_size_or_rule_is_one_line(run: Run, sized: Bundle, images: list[Path]) -> None:
    result = run("predict", sized.root, images[0], "--fit", "448")
    assert result.code == 2
    assert "no image size 448x448" in result.err
    assert "8x8, 16x16, 8x16" in result.err
    assert len(result.err.splitlines()) == 2
    result = run("predict", sized.root, images[0], "--fit", "aspekt")
    assert result.code == 2
    assert "aspect, area, or a size" in result.err


def test_a_bundle_of_one_size_says_nothing_of_it(run: Run, tmp_path: Path, images: list[Path]) -> None:
    one = several_sizes(tmp_path / "one.bundle", [SMALL])
    document = run("predict", one.root, images[0], "--json", "--fit", "8x8").document
    assert document["images"][0].keys() == {"path", "predictions"}


@pytest.mark.slow
def test_vectors(run: Run, tmp_path: Path, images: list[Path]) -> None:
    bundle = several_sizes(tmp_path / "v.bundle", output="features", labels=None)
    document = run("predict", bundle.root, *images, "--json").document
    assert [tuple(image["image_size"]) for image in document["images"]] == [SMALL, WIDE, LARGE]
    for path, image in zip(images, document["images"], strict=True):
        expected = answer_image(Image.open(path), TAKEN[path.name])
        np.testing.assert_allclose(image["embedding"], expected, rtol=0, atol=1e-5)
    assert "image size" in run("predict", bundle.root, *images).out.splitlines()[0]
    said = run("predict", bundle.root, *images, images[0].parent, "-o", tmp_path / "v.npy").out
    assert "3 images (1 at 8x8, 1 at 8x16, 1 at 16x16)" in said
    counted = json.loads(run("predict", bundle.root, *images, "--json", "-o", tmp_path / "w.npy").out)
    assert counted["image_sizes"] == {"8x8": 1, "8x16": 1, "16x16": 1}


@pytest.mark.slow
def test_the_commands_show_every_size(run: Run, tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "b")
    said = run("verify", bundle.root, "--backend", "onnxruntime").out
    assert "onnx-fp32-16x16" in said
    assert "verified: 7 files intact" in said
    shown = run("inspect", bundle.root).out
    assert "model.onnx.data, 60 B, is shared by 3 of them and counted in each" in shown
    assert "8x8 (64 FLOPs), 16x16 (256 FLOPs), 8x16 (128 FLOPs)" in shown
    document = run("inspect", bundle.root, "--json").document
    assert [record["image_size"] for record in document["manifest"]["sizes"]] == [[16, 16], [8, 16]]


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 99_999), st.integers(1, 99_999)), min_size=1, max_size=5))
def test_image_sizes_are_read_as_they_are_written(sizes: list[tuple[int, int]]) -> None:
    words = [str(h) if h == w else f"{h}x{w}" for h, w in sizes]
    assert parse.image_sizes(",".join(words)) == tuple(sizes)
    assert parse.image_sizes(" , ".join(word.replace("x", "X") for word in words)) == tuple(sizes)


@pytest.mark.slow
@given(st.text("0123456789xX,. -", max_size=12))
def test_any_text_is_image_sizes_or_one_line(text: str) -> None:
    message = ""
    try:
        sizes = parse.image_sizes(text)
    except UsageError as error:
        sizes, message = (), error.message
    assert bool(sizes) != message.startswith("--image-size ")
    assert len(message.splitlines()) <= 1
    assert all(min(size) > 0 for size in sizes)
