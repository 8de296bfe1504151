"""``vitdeploy predict`` on bundles of embeddings and features: files that appear whole, JSON, a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.bundles import LABELS, answer_images, random_image, write_bundle
from tests.helpers.commands import Run
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.cli import vectors
from vitdeploy.data import digits_images
from vitdeploy.errors import BundleError
from vitdeploy.predictor import Predictor

KINDS = ("npy", "parquet", "jsonl")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """``photos/3.png`` to ``0.png``, in no order that anything would sort them in."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{seed}.png" for seed in (3, 1, 0, 2)]
    for path in paths:
        random_image(int(path.stem)).save(path)
    return paths


@pytest.fixture(params=["features", "embedding"])
def vectors_bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "v.bundle", output=request.param, labels=None)


def expected(paths: list[Path]) -> np.ndarray[Any, Any]:
    return answer_images([random_image(int(path.stem)) for path in paths])


def read(path: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Names and (images, columns) float32 of a file, by the library that its readers would take."""
    if path.suffix == ".npy":
        return path.with_name(f"{path.stem}.names.txt").read_text().splitlines(), np.load(path)
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        assert table.schema.names == ["path", "embedding"]
        kind = table.schema.field("embedding").type
        assert pa.types.is_fixed_size_list(kind)
        assert kind.value_type == pa.float32()
        return table["path"].to_pylist(), np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(line) == ["path", "embedding"] for line in lines)
    return [line["path"] for line in lines], np.array([line["embedding"] for line in lines], np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_files(run: Run, vectors_bundle: Bundle, images: list[Path], kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"vectors.{kind}"
    result = run("predict", vectors_bundle.root, *images, "-o", out)
    assert (result.code, result.err) == (0, ""), result.err
    output = vectors_bundle.manifest.output
    assert result.out.startswith(f"{output} of 4 images, 5 columns: {out}")
    assert ("names in" in result.out) == (kind == "npy")
    names, found = read(out)
    assert names == [str(path) for path in images]
    assert (found.shape, found.dtype) == ((4, len(LABELS)), np.float32)
    np.testing.assert_allclose(found, expected(images), rtol=1e-4, atol=1e-4)
    document = run("predict", vectors_bundle.root, *images, "--json").document
    assert document["vectors"] == output
    assert [image["path"] for image in document["images"]] == names
    shown = [image["embedding"] for image in document["images"]]
    assert shown == found.astype(np.float64).tolist()  # to the last bit


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_that_cannot_be_read(run: Run, images: list[Path], kind: str, tmp_path: Path) -> None:
    made, out = write_bundle(tmp_path / "v", output="features", labels=None), tmp_path / f"v.{kind}"
    images[1].write_bytes(images[1].read_bytes()[:60])
    result = run("predict", made.root, *images, tmp_path / "none.png", "-o", out, "--json")
    assert result.code == 2
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 2
    good = [images[0], *images[2:]]
    assert result.document == {
        "ok": False,
        "output": str(out),
        "names": str(tmp_path / "v.names.txt") if kind == "npy" else None,
        "vectors": "features",
        "columns": 5,
        "images": 3,
        "failed": 1,
        "missing": 1,
    }
    names, found = read(out)
    assert names == [str(path) for path in good]
    np.testing.assert_allclose(found, expected(good), rtol=1e-4, atol=1e-4)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("v.*")}
    result = run("predict", made.root, images[1], "-o", out)
    assert result.code == 2
    assert f"no image could be read, so {out} is not written" in result.err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("v.*")} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_on_the_way_leaves_the_file_as_it_was(
    run: Run, images: list[Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = write_bundle(tmp_path / "v", output="features", labels=None), tmp_path / f"v.{kind}"
    out.write_text("earlier")

    def fails(self: Predictor, rows: np.ndarray[Any, Any], output: str) -> None:
        raise BundleError("the session died")

    monkeypatch.setattr(Predictor, "_require_finite", fails)
    result = run("predict", made.root, *images, "-o", out)
    assert (result.code, "the session died" in result.err) == (2, True)
    assert out.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("photos", "v", out.name))


def test_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a row group, and more digits of rows than the file began with."""
    rows = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    names = [f"{number}.png" for number in range(len(rows))]
    for kind in KINDS:
        with vectors.vector_file(tmp_path / f"v.{kind}", names, 3) as write:
            for name, row in zip(names, rows, strict=True):
                write(name, row)
        found = read(tmp_path / f"v.{kind}")
        assert found[0] == names
        assert np.array_equal(found[1], rows)


def test_the_table(run: Run, images: list[Path], tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "v", output="features", labels=None)
    result = run("predict", made.root, images[0].parent)
    lines = result.out.splitlines()
    assert lines[0].split() == ["image", "columns", "norm", "first"]
    ordered = sorted(images)
    for line, path, vector in zip(lines[2:], ordered, expected(ordered), strict=True):
        name, columns, norm, *first = line.split()
        assert (name, columns) == (str(path), "5")
        assert float(norm) == pytest.approx(np.linalg.norm(vector), abs=1e-3)
        assert [float(number) for number in first] == pytest.approx(vector[:5], abs=1e-3)
    assert result.err.startswith("4 images embedded, 0 failed, ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-o", "v.csv"], "-o v.csv: vectors are written as .npy, .parquet, .jsonl"),
        (["-o", "vectors"], "vectors are written as"),
        (["-o", "no/such/folder/v.npy"], "no/such/folder/v.npy: cannot be written: No such file"),
        (["--csv"], "--csv is for classes, and the bundle gives features"),
        (["--top-k", "5"], "--top-k is for classes, and the bundle gives features"),
        (["--dimensions", "3"], "--dimensions 3: the bundle does not say that its vectors can be shortened"),
        (["--workers", "2"], "--workers 2: only --engine ray"),
    ],
)
def test_flags(run: Run, images: list[Path], tmp_path: Path, flags: list[str], message: str) -> None:
    made = write_bundle(tmp_path / "v", output="features", labels=None)
    result = run("predict", made.root, images[0], *flags)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two\nlines.png", "bad\udcff.png"])
def test_names_that_no_line_holds(run: Run, tmp_path: Path, name: str) -> None:
    made = write_bundle(tmp_path / "v", output="features", labels=None)
    random_image(0).save(tmp_path / name, "PNG")
    result = run("predict", made.root, tmp_path / name, "-o", tmp_path / "v.npy")
    assert (result.code, "is not one line of UTF-8" in result.err) == (2, True)
    assert run("predict", made.root, tmp_path / name).code == 0


def test_parquet_names_its_extra(
    run: Run, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_bundle(tmp_path / "v", output="features", labels=None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run("predict", made.root, images[0], "-o", tmp_path / "v.parquet")
    assert result.code == 3
    assert 'pip install "vitdeploy[parquet]"' in result.err
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.slow
def test_embeddings_of_a_real_model(run: Run, digits_embedding: Path, tmp_path: Path) -> None:
    """The pooled vector of the reference in float64, divided by its length."""
    import torch
    from safetensors.torch import load_file

    from vitdeploy.model.reference import forward_float64
    from vitdeploy.model.registry import build_reference

    paths, out = digits_images(), tmp_path / "v.npy"
    result = run("predict", digits_embedding, *paths, "-o", out)
    assert result.code == 0, result.err
    names, found = read(out)
    assert names == [str(path) for path in paths]
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=1e-6)
    bundle = Bundle.open(digits_embedding)
    with Predictor.open(bundle) as predictor:
        pixels = np.stack([predictor.preprocess(path) for path in paths])
    assert bundle.manifest.model is not None
    reference = build_reference(bundle.manifest.model, load_file(digits_embedding / WEIGHTS))
    pooled = forward_float64(reference, torch.from_numpy(pixels), "features").numpy()
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(found, pooled / lengths, atol=1e-5)
