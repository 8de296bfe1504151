"""``vitdeploy predict``: the documented JSON, CSV, text; broken images among good ones."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import LABELS, answer_images, random_image, write_bundle
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from vitdeploy.bundle.folder import Bundle
from vitdeploy.images.remote import RemoteImage


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """``photos/0.png`` to ``3.png``; image k is ``random_image(k)``."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        random_image(seed).save(path)
    return paths


def best(seed: int) -> int:
    return int(answer_images([random_image(seed)])[0].argmax())


def test_json(run: Run, bundle: Bundle, images: list[Path]) -> None:
    result = run("predict", bundle.root, *images, "--json", "--top-k", 2)
    assert (result.code, result.err) == (0, "")
    assert result.document.keys() == {"images"}
    assert [image["path"] for image in result.document["images"]] == [str(path) for path in images]
    for seed, image in enumerate(result.document["images"]):
        assert image.keys() == {"path", "predictions"}
        assert len(image["predictions"]) == 2
        first = image["predictions"][0]
        assert first.keys() == {"label", "index", "score"}
        assert (first["index"], first["label"]) == (best(seed), LABELS[best(seed)])
        assert 0 <= first["score"] <= 1


@pytest.mark.slow
def test_text(run: Run, bundle: Bundle, images: list[Path]) -> None:
    lines = run("predict", bundle.root, images[0], "--top-k", 3).out.splitlines()
    assert lines[0] == str(images[0])
    assert len(lines) == 4
    assert lines[1].split()[1:] == [str(best(0)), LABELS[best(0)]]


def test_csv(run: Run, bundle: Bundle, images: list[Path]) -> None:
    result = run("predict", bundle.root, images[0].parent, "--csv", "--top-k", 1)
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert [row["path"] for row in rows] == [str(path) for path in images]
    assert [int(row["index"]) for row in rows] == [best(seed) for seed in range(4)]
    assert {row["rank"] for row in rows} == {"1"}


def test_a_broken_image_among_many(run: Run, bundle: Bundle, images: list[Path]) -> None:
    images[1].write_bytes(images[1].read_bytes()[:60])
    images[2].write_text("no image")
    result = run("predict", bundle.root, images[0].parent, images[0].parent / "none.png", "--json")
    assert result.code == 2
    assert [image["path"] for image in result.document["images"]] == [str(images[0]), str(images[3])]
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert all(any(name in line for line in errors) for name in ("1.png", "2.png", "none.png"))


def test_an_image_named_twice_is_predicted_once(run: Run, bundle: Bundle, images: list[Path]) -> None:
    result = run("predict", bundle.root, images[0], images[0].parent, "--json")
    assert len(result.document["images"]) == 4


def test_artifact_and_threads(run: Run, bundle: Bundle, images: list[Path]) -> None:
    exact = run("predict", bundle.root, images[0], "--json", "--threads", 1).document
    half = run("predict", bundle.root, images[0], "--json", "--artifact", "fp16").document
    scores = [
        np.array([row["score"] for row in document["images"][0]["predictions"]]) for document in (exact, half)
    ]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 1e-2


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--backend", "onnxrutnime"], 2, "did you mean 'onnxruntime'"),
        (["--artifact", "int4"], 2, "has no artifact 'int4'"),
        (["--top-k", "0"], 2, "--top-k"),
        (["--threads", "0"], 2, "threads"),
        (["--provider", "cuda"], 3, "no cuda provider"),
        (["--provider", "tensort"], 2, "did you mean 'tensorrt'"),
    ],
)
def test_errors(
    run: Run, bundle: Bundle, images: list[Path], flags: list[str], code: int, message: str
) -> None:
    result = run("predict", bundle.root, images[0], *flags)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_a_folder_ends_with_a_summary(run: Run, bundle: Bundle, images: list[Path]) -> None:
    folder = images[0].parent
    images[1].write_text("no image")
    (folder / "x.jp2").touch()
    (folder / "notes.txt").touch()
    result = run("predict", bundle.root, folder)
    lines = result.err.splitlines()
    assert result.code == 2
    assert lines[0] == "not read: 1 .jp2, 1 other file"
    assert re.fullmatch(r"3 images classified, 1 failed, [0-9.]+ images/s", lines[-1])


def test_standard_input(
    run: Run, bundle: Bundle, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with images[2].open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        document = run("predict", bundle.root, "-", images[0], "-", "--json").document
    assert [image["path"] for image in document["images"]] == ["-", str(images[0])]
    assert document["images"][0]["predictions"][0]["index"] == best(2)


@pytest.mark.parametrize("stdin", [None, SimpleNamespace(buffer=io.BytesIO())])
def test_standard_input_without_an_image(
    run: Run, bundle: Bundle, stdin: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    result = run("predict", bundle.root, "-")
    assert (result.code, result.out) == (2, "")
    assert "closed" in result.err or "is empty" in result.err


@pytest.mark.slow
def test_addresses(run: Run, bundle: Bundle, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(self: RemoteImage) -> bytes:
        return images[int(self.name[-5])].read_bytes()

    monkeypatch.setattr(RemoteImage, "read", fetched)
    urls = ["https://example.org/a//1.png", "http://example.org/3.png"]
    document = run("predict", bundle.root, *urls, "--json").document
    assert [image["path"] for image in document["images"]] == urls
    assert [image["predictions"][0]["index"] for image in document["images"]] == [best(1), best(3)]
    result = run("predict", bundle.root, "s3://bucket//x.png")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: s3://bucket//x.png: images are fetched over http and https only")


@pytest.mark.slow
def test_sixteen_bit_grey_is_said_once(run: Run, bundle: Bundle, images: list[Path]) -> None:
    folder = images[0].parent
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(folder / name)
    result = run("predict", bundle.root, folder)
    assert result.code == 0
    assert result.err.count("16-bit grey") == 1
    assert "16-bit" not in run("predict", bundle.root, images[0]).err


@pytest.mark.parametrize("source", ["-", "https://example.org/x.png"])
def test_ray_reads_files(run: Run, bundle: Bundle, source: str, tmp_path: Path) -> None:
    result = run("predict", bundle.root, source, "--engine", "ray", "-o", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {source}: --engine ray reads files and folders")


def test_tokens_are_neither_classes_nor_a_vector(run: Run, tmp_path: Path, images: list[Path]) -> None:
    made = write_bundle(tmp_path / "t.bundle", output="tokens", labels=None)
    result = run("predict", made.root, images[0])
    assert (result.code, result.out) == (2, "")
    assert "gives tokens, no vector of each image" in result.err


def test_labels_cannot_drive_the_terminal(run: Run, tmp_path: Path, images: list[Path]) -> None:
    labels = ("\x1b[31mred", "a\nb", "[bold]", "d", "e")
    made = write_bundle(tmp_path / "l.bundle", labels=labels)
    out = run("predict", made.root, images[0]).out
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out
    assert "[bold]" in out


def test_the_digits_model_reads_its_digits(digits: Exported, run: Run) -> None:
    from vitdeploy.data import digits_images

    result = run("predict", digits.folder, *digits_images(), "--json", "--top-k", 1)
    assert result.code == 0, result.err
    right = [
        image["predictions"][0]["label"] == Path(image["path"]).name[0] for image in result.document["images"]
    ]
    assert len(right) >= 10
    assert np.mean(right) >= 0.9


def test_sizes_do_not_matter(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tall.jpg"
    Image.new("L", (3, 700), 77).save(path)
    assert run("predict", bundle.root, path).code == 0
