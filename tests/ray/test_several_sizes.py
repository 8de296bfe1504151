"""Jobs and replicas over images of several shapes, of a bundle with several image sizes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.ray_replicas import MAX_BATCH, MAX_DELAY_MS, gathering, post
from tests.helpers.several_sizes import LABELS, SIZES, answer_image, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Size, size_name
from vitdeploy.errors import UsageError
from vitdeploy.ray import tables
from vitdeploy.ray.job import JobRequest, make_plan
from vitdeploy.ray.serving import Replica
from vitdeploy.ray.work import Item, Stamp
from vitdeploy.ray.worker import Classifier
from vitdeploy.scores import softmax

PHOTOS: dict[str, tuple[Size, Size]] = {
    "tiny.jpg": ((9, 9), (8, 8)),
    "square.jpg": ((200, 200), (16, 16)),
    "wide.jpg": ((150, 300), (8, 16)),
    "tall.jpg": ((300, 120), (16, 16)),
    "wider.jpg": ((100, 400), (8, 16)),
}
"""Height and width of cuts of a photograph, and the size that is nearest in shape, then in area."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return several_sizes(tmp_path_factory.mktemp("bundles") / "many", precisions=("fp32", "fp16"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    photo = Image.fromarray(load_sample_images().images[0])
    for name, ((height, width), _) in PHOTOS.items():
        photo.crop((100, 50, 100 + width, 50 + height)).save(folder / name, quality=90)
    return [folder / name for name in PHOTOS]


def expected(path: Path, size: Size) -> np.ndarray[Any, Any]:
    """The probabilities of an image at a size, (5,) float64."""
    return softmax(answer_image(Image.open(path), size))


def work(bundle: Bundle, photos: Sequence[Path], **given: Any) -> list[dict[str, Any]]:
    """What an actor makes of the files, without Ray."""
    plan, _ = make_plan(JobRequest(bundle.root, tuple(map(str, photos)), Path("out"), **given))
    stamps = [Stamp(path.stat().st_size, path.stat().st_mtime_ns) for path in photos]
    items = [Item(str(path), stamp) for path, stamp in zip(photos, stamps, strict=True)]
    table, failure = tables.split(pa.concat_tables(Classifier(plan)(tables.pieces(items))))
    assert failure is None
    return list(table.to_pylist())


@pytest.mark.parametrize("given", [{}, {"artifact": "fp16"}, {"batch": 3}])
def test_a_job_says_which_size_it_took(bundle: Bundle, photos: list[Path], given: dict[str, Any]) -> None:
    rows = work(bundle, photos, **given)
    assert [row["image_size"] for row in rows] == [size_name(size) for _, size in PHOTOS.values()]
    for row, path, (_, size) in zip(rows, photos, PHOTOS.values(), strict=True):
        right = expected(path, size)
        assert row["label"] == LABELS[int(right.argmax())]
        np.testing.assert_allclose(row["scores"], np.sort(right)[::-1], rtol=1e-4 if not given else 1e-2)


def test_other_rules(bundle: Bundle, photos: list[Path]) -> None:
    assert {row["image_size"] for row in work(bundle, photos, fit=(8, 16))} == {"8x16"}
    sizes = [row["image_size"] for row in work(bundle, photos, fit="area")]
    assert sizes == ["8x8", "16x16", "16x16", "16x16", "16x16"]
    with pytest.raises(UsageError, match="no image size 9x9"):
        work(bundle, photos, fit=(9, 9))


@pytest.mark.slow
def test_vectors(tmp_path: Path, photos: list[Path]) -> None:
    bundle = several_sizes(tmp_path / "vectors", output="features", labels=None)
    rows = work(bundle, photos)
    for row, path, (_, size) in zip(rows, photos, PHOTOS.values(), strict=True):
        assert row["image_size"] == size_name(size)
        right = answer_image(Image.open(path), size)
        np.testing.assert_allclose(row["embedding"], right, rtol=1e-4, atol=1e-5)


def test_an_image_that_is_none_has_no_size(bundle: Bundle, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    rows = work(bundle, [photos[2], tmp_path / "bad.jpg", photos[0]])
    assert [row["image_size"] for row in rows] == ["8x16", None, "8x8"]
    assert "bad.jpg" in rows[1]["error"]


def test_one_size_has_no_column_for_it(tmp_path: Path, photos: list[Path]) -> None:
    (row, *_) = work(several_sizes(tmp_path / "one", SIZES[:1]), photos)
    assert "image_size" not in row


@pytest.mark.slow
def test_a_replica_chooses_for_each_image(
    bundle: Bundle, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    monkeypatch.setattr(serve, "batch", gathering)

    async def main() -> list[Any]:
        replica = Replica(
            str(bundle.root), {"name": "m", "max_batch": MAX_BATCH, "max_delay_ms": MAX_DELAY_MS}
        )
        asked = [replica(post(path.read_bytes())) for path in 3 * photos]
        return [json.loads(bytes(answer.body)) for answer in await asyncio.gather(*asked)]

    answers = asyncio.run(main())
    for answer, path, (_, size) in zip(answers, 3 * photos, 3 * list(PHOTOS.values()), strict=True):
        assert answer["image_sizes"] == [size_name(size)]
        found = {one["label"]: one["score"] for one in answer["predictions"][0]}
        right = dict(zip(LABELS, expected(path, size), strict=True))
        assert found == pytest.approx(right, rel=1e-4)
