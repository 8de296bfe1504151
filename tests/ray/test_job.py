"""Jobs on a real Ray over real JPEG files: the answers, resuming after a kill, Parquet, bad files."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.bundles import LABELS, answer_images, write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.exports import Exported
from tests.helpers.processes import MARK, marked, wait_for
from tests.helpers.several_sizes import answer_image, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.cli import main
from vitdeploy.config import size_name
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.predictor import Predictor
from vitdeploy.ray import data
from vitdeploy.ray.job import JobRequest, Summary, run_job
from vitdeploy.scores import softmax

pytestmark = pytest.mark.slow

PHOTOS = 24


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """A Ray for all tests here, so that not each one has to start its own."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "linear", precisions=("fp32", "fp16"))


def jpegs(folder: Path, count: int, size: tuple[int, int] = (320, 240)) -> list[Path]:
    """Different cuts out of two real photographs, saved as JPEG."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = 7 * number % (photo.width - size[0] + 1), 5 * number % (photo.height - size[1] + 1)
        paths.append(folder / f"{number:03d}.jpg")
        photo.crop((left, top, left + size[0], top + size[1])).save(paths[-1], quality=90)
    return paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return jpegs(tmp_path_factory.mktemp("photos") / "a", PHOTOS)


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by path; no path is there twice."""
    rows = [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def check(rows: dict[str, dict[str, Any]], paths: list[Path], top_k: int = 5) -> None:
    """Hold results against the matrix product in float64."""
    assert set(rows) == {str(path) for path in paths}
    logits = answer_images([Image.open(path).convert("RGB") for path in paths])
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    for path, expected in zip(paths, scores, strict=True):
        row = rows[str(path)]
        order = np.argsort(-expected)[:top_k]
        assert row["indices"] == order.tolist()
        assert row["labels"] == [LABELS[index] for index in order]
        np.testing.assert_allclose(row["scores"], expected[order], rtol=1e-4, atol=1e-9)
        assert (row["index"], row["label"], row["score"]) == (
            row["indices"][0],
            row["labels"][0],
            row["scores"][0],
        )
        assert row["error"] is None


def classify(bundle: Bundle, output: Path, *inputs: object, **fields: Any) -> Summary:
    return run_job(JobRequest(bundle=bundle.root, inputs=tuple(map(str, inputs)), output=output, **fields))


@pytest.mark.usefixtures("_ray")
def test_a_folder_of_photographs(bundle: Bundle, photos: list[Path], tmp_path: Path) -> None:
    summary = classify(bundle, tmp_path / "out", photos[0].parent, workers=2, top_k=3)
    assert (summary.images, summary.failed, summary.earlier) == (PHOTOS, 0, 0)
    assert (summary.workers, summary.threads) == (2, 1)
    assert summary.images_per_s > 0
    rows = table(tmp_path / "out")
    check(rows, photos, top_k=3)
    with Predictor.open(bundle.root) as predictor:
        for path, predictions in zip(photos, predictor.predict(photos, top_k=3), strict=True):
            assert rows[str(path)]["indices"] == [p.index for p in predictions]
            here = [p.score for p in predictions]
            np.testing.assert_allclose(rows[str(path)]["scores"], here, rtol=1e-5)
            assert (rows[str(path)]["size"], rows[str(path)]["modified"]) == (
                path.stat().st_size,
                path.stat().st_mtime_ns,
            )


@pytest.mark.usefixtures("_ray")
def test_photographs_of_several_shapes(tmp_path: Path) -> None:
    """Each goes to the image size that fits, and the results say which; those by another rule stay apart."""
    many = several_sizes(tmp_path / "many")
    wide, square = jpegs(tmp_path / "wide", 3, (320, 150)), jpegs(tmp_path / "square", 3, (200, 200))
    summary = classify(many, tmp_path / "out", tmp_path / "wide", tmp_path / "square", workers=2)
    assert (summary.images, summary.failed) == (6, 0)
    rows = table(tmp_path / "out")
    for paths, size in ((wide, (8, 16)), (square, (16, 16))):
        for path in paths:
            right = softmax(answer_image(Image.open(path), size))
            assert rows[str(path)]["image_size"] == size_name(size)
            np.testing.assert_allclose(rows[str(path)]["scores"], np.sort(right)[::-1], rtol=1e-4)
    with pytest.raises(UsageError, match="another job: fit 'aspect', not '8x8'"):
        classify(many, tmp_path / "out", tmp_path / "wide", fit=(8, 8))


@pytest.mark.usefixtures("_ray")
def test_vectors_of_photographs(
    photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_bundle(tmp_path / "vectors", output="features", labels=None)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(photos[0].read_bytes()[:900])
    flags = ("--engine", "ray", "-o", str(tmp_path / "out"), "--threads", "1")
    images = [*map(str, photos), str(bad)]
    assert main(["predict", str(made.root), *images, *flags]) == 2
    assert f"{PHOTOS} images embedded" in capsys.readouterr().out
    found = table(tmp_path / "out")
    assert found[str(bad)]["embedding"] is None
    assert "damaged or cut short" in found[str(bad)]["error"]
    vectors = np.array([found[str(path)]["embedding"] for path in photos])
    expected = answer_images([Image.open(path).convert("RGB") for path in photos])
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)
    assert main(["predict", str(made.root), *images, *flags]) == 2  # the bad one is tried again, no other
    assert re.match(
        rf"0 images embedded \(.*\), 1 failed, {PHOTOS} images done earlier", capsys.readouterr().out
    )


@pytest.mark.usefixtures("_ray")
def test_bad_files_among_good_ones(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = jpegs(tmp_path / "in", 4)
    cut, text, gone = (tmp_path / "in" / name for name in ("cut.jpg", "text.png", "gone.jpg"))
    cut.write_bytes(good[0].read_bytes()[:900])
    text.write_text("no image")
    gone.symlink_to(tmp_path / "nowhere")
    out = tmp_path / "out"
    command = ["predict", bundle.root, tmp_path / "in", "--engine", "ray", "-o", out, "--workers", 1]
    assert main([str(part) for part in command]) == 2
    said = capsys.readouterr()
    assert "4 images classified" in said.out
    assert "3 failed" in said.out
    assert all(name in said.err for name in ("cut.jpg", "text.png", "gone.jpg"))
    rows = table(out)
    errors = {Path(path).name: row["error"] for path, row in rows.items() if row["error"]}
    assert errors.keys() == {"cut.jpg", "text.png", "gone.jpg"}
    assert "damaged or cut short" in errors["cut.jpg"]
    assert all(rows[str(path)]["labels"] == [] for path in (cut, text, gone))
    # Mended, and one more: only these are computed, and the others are still there once.
    cut.write_bytes(good[1].read_bytes())
    text.unlink()
    gone.unlink()
    summary = classify(bundle, out, tmp_path / "in")
    assert (summary.images, summary.earlier, summary.failed) == (1, 4, 0)
    rows = table(out)
    check({path: row for path, row in rows.items() if not row["error"]}, [*good, cut])


@pytest.mark.usefixtures("_ray")
def test_a_second_start_does_only_what_changed(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = jpegs(tmp_path / "in", 6), tmp_path / "out"
    assert classify(bundle, out, tmp_path / "in", threads=1).images == 6
    again = classify(bundle, out, tmp_path / "in", threads=1)
    assert (again.images, again.earlier, again.parts, again.seconds) == (0, 6, 0, 0.0)
    Image.open(paths[5]).rotate(90, expand=True).save(paths[2])
    more = jpegs(tmp_path / "more", 3)
    once_more = classify(bundle, out, tmp_path / "in", tmp_path / "more", threads=1)
    assert (once_more.images, once_more.earlier) == (4, 5)
    check(table(out), [*paths, *more])
    # Another question does not mix its answers with these.
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match="top k 5, not 1"):
        classify(bundle, out, tmp_path / "in", top_k=1)
    with pytest.raises(UsageError, match="artifact 'onnx-fp32', not 'onnx-fp16'"):
        classify(bundle, out, tmp_path / "in", artifact="fp16")
    other = write_bundle(tmp_path / "other", weight=np.ones((192, 5), np.float32))
    command = ["predict", other.root, tmp_path / "in", "--engine", "ray", "-o", out, "--json"]
    assert main([str(part) for part in command]) == 2
    assert "bundle digest" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.usefixtures("_ray")
def test_parquet(bundle: Bundle, photos: list[Path], tmp_path: Path) -> None:
    data = [path.read_bytes() for path in photos[:7]]
    file, out = tmp_path / "in.parquet", tmp_path / "out"
    cells = [{"bytes": image, "path": f"{number}.jpg"} for number, image in enumerate(data)]
    cells[3]["bytes"] = b"no image"
    pq.write_table(pa.table({"id": range(7), "image": cells}), file, row_group_size=3)
    summary = classify(bundle, out, file, threads=1)
    assert (summary.images, summary.failed) == (6, 1)
    rows = table(out)
    assert {(row["path"], row["row"]) for row in rows.values()} == {(f"{n}.jpg", n) for n in range(7)}
    assert {row["source"] for row in rows.values()} == {str(file)}
    assert "not an image" in rows["3.jpg"].pop("error")
    by_name = {str(photos[n]): rows[f"{n}.jpg"] for n in range(7) if n != 3}
    check(by_name, [path for n, path in enumerate(photos[:7]) if n != 3])
    # Only the row that failed is tried again.
    again = classify(bundle, out, file, threads=1)
    assert (again.images, again.failed, again.earlier) == (0, 1, 6)
    assert len(table(out)) == 7


@pytest.mark.usefixtures("_ray")
def test_parquet_with_paths(bundle: Bundle, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    relative = os.path.relpath(photos[0], folder)
    names = [relative, *map(str, photos[1:4]), "nowhere.jpg", None]
    pq.write_table(pa.table({"where": names}), folder / "list.parquet")
    summary = classify(bundle, tmp_path / "out", folder, column="where", threads=1)
    assert (summary.images, summary.failed) == (4, 2)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    found = {Path(row["path"]).resolve(): row for row in rows if not row["error"]}
    check({str(path): row for path, row in found.items()}, [path.resolve() for path in photos[:4]])
    assert [row["row"] for row in rows] == list(range(6))


@pytest.mark.usefixtures("_ray")
def test_what_ends_the_whole_job(photos: list[Path], tmp_path: Path) -> None:
    damaged = write_bundle(tmp_path / "damaged")
    model = damaged.root / "model.onnx"
    content = bytearray(model.read_bytes())
    content[200] ^= 1
    model.write_bytes(content)
    with pytest.raises(BundleError, match="sha256") as caught:
        classify(damaged, tmp_path / "out", photos[0], threads=1)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    wrong = write_bundle(tmp_path / "nan", weight=np.full((192, 5), np.nan, np.float32))
    with pytest.raises(BundleError, match="NaN"):
        classify(wrong, tmp_path / "out", photos[0], threads=1)
    with pytest.raises(UsageError, match="do not fit"):
        classify(write_bundle(tmp_path / "good"), tmp_path / "out", photos[0], threads=3)
    assert not (tmp_path / "out").exists()


IMAGES = 250
JOB = """
import sys
from pathlib import Path
from vitdeploy.ray import data
from vitdeploy.ray.job import run_job
from vitdeploy.ray.job import JobRequest

bundle, folder, out = sys.argv[1:]
inputs, output = (folder,), Path(out)
request = JobRequest(Path(bundle), inputs, output, workers=1, batch=4, part_seconds=0)
run_job(request)
"""


def test_killed_in_the_middle(bundle: Bundle, tmp_path: Path) -> None:
    paths, out, mark = jpegs(tmp_path / "in", IMAGES), tmp_path / "out", uuid.uuid4().hex
    arguments = [sys.executable, "-c", JOB, str(bundle.root), str(tmp_path / "in"), str(out)]
    environment = {**os.environ, MARK: mark, "RAY_ADDRESS": "local"}
    job = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
    try:
        assert wait_for(
            lambda: len(list(out.glob("part-*.parquet"))) >= 2 or job.poll() is not None, 500, 0.002
        )
        assert job.poll() is None
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    done = len(table(out))
    assert 0 < done < len(paths)
    (out / ".part-000099.parquet.tmp").write_bytes(b"PAR1 and then nothing")
    # The job's Ray ends with it, but for its agents, which try for a minute to tell a server that is gone.
    assert wait_for(lambda: all("Agent" in name for name in marked(mark).values()), 120), marked(mark)
    assert wait_for(lambda: not marked(mark), 180), marked(mark)
    result = in_a_process(
        *("predict", bundle.root, tmp_path / "in", "--engine", "ray", "-o", out, "--json", "--workers", 1),
        **{MARK: mark, "RAY_ADDRESS": "local"},
    )
    assert result.code == 0, result.err
    assert (
        result.document.items() >= {"ok": True, "images": IMAGES - done, "earlier": done, "failed": 0}.items()
    )
    assert result.document["seconds"] > 0
    check(table(out), paths)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert wait_for(lambda: not marked(mark), 120), marked(mark)


@pytest.mark.usefixtures("_ray")
def test_a_model_that_kills_its_process(
    bundle: Bundle, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies:
        def __init__(self, plan: object) -> None:
            pass

        def __call__(self, pieces: object) -> object:
            os._exit(1)

    monkeypatch.setattr(data, "Classifier", Dies)
    with pytest.raises(BundleError, match="the job on Ray failed"):
        classify(bundle, tmp_path / "out", photos[0], threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_ray")
def test_the_digits_model_reads_jpegs(digits: Exported, tmp_path: Path) -> None:
    from vitdeploy.data import digits_images

    folder = tmp_path / "in"
    folder.mkdir()
    for path in digits_images():
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").save(buffer, "JPEG", quality=95)
        (folder / f"{path.stem}.jpg").write_bytes(buffer.getvalue())
    summary = classify(Bundle.open(digits.folder), tmp_path / "out", folder)
    rows = table(tmp_path / "out")
    assert summary.images == len(rows) >= 10
    assert np.mean([row["label"] == Path(path).name[0] for path, row in rows.items()]) >= 0.9
