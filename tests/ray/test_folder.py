"""The folder of results and what goes in: Parquet files, earlier parts, other jobs, leftovers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.paths import ROOT
from vitdeploy.errors import ImageError, UsageError
from vitdeploy.predictor import Prediction
from vitdeploy.ray import tables
from vitdeploy.ray.folder import JOB, JobFolder
from vitdeploy.ray.tables import find_inputs
from vitdeploy.ray.work import Item, Result, Stamp

DOCUMENTATION = ROOT / "docs" / "ray.md"
IDENTITY = {"bundle_digest": "d" * 64, "artifact": "onnx-fp32", "top_k": 2}
STAMP = Stamp(10, 20)


def good(source: str, stamp: Stamp = STAMP, row: int = -1) -> Result:
    return Result(source, stamp, row, source, [Prediction("cat", 3, 0.75), Prediction("dog", 1, 0.25)])


def answers(*rows: Result) -> Any:
    """As they arrive from an actor."""
    return tables.split(tables.results(rows))[0]


COLUMNS = (
    *("path", "label", "index", "score", "labels", "indices", "scores", "error"),
    *("source", "row", "size", "modified"),
)


def bad(source: str, stamp: Stamp = STAMP) -> Result:
    return Result(source, stamp, -1, source, error="no image")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def test_vectors_are_what_the_documentation_says(target: Path) -> None:
    vector = np.arange(3, dtype=np.float32) / 7
    given = [Result("/a.jpg", STAMP, -1, "/a.jpg", embedding=vector), bad("/b.jpg")]
    only_bad, failed = (tables.results([bad("/c.jpg")], 3), tables.failure("why", 3))
    table, failure = tables.split(pa.concat_tables([tables.results(given, 3), only_bad, failed]))
    assert failure == "why"
    with JobFolder(target, IDENTITY) as folder:
        folder.write([table])
    (part,) = target.glob("*.parquet")
    schema = pq.read_schema(part)
    assert tuple(schema.names) == ("path", "embedding", *COLUMNS[COLUMNS.index("error") :])
    assert schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), 3)
    assert all(f"`{name}`" in DOCUMENTATION.read_text() for name in schema.names)
    first, second, third = rows(target)
    assert np.array(first["embedding"], np.float32).tolist() == vector.tolist()
    assert (first["error"], second["embedding"], second["error"]) == (None, None, "no image")
    assert (third["path"], third["embedding"]) == ("/c.jpg", None)


def test_results_are_what_the_documentation_says(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a.jpg"), bad("/b.jpg")), answers(good("/c", row=7))])
    (part,) = target.glob("*.parquet")
    assert tuple(pq.read_schema(part).names) == COLUMNS
    assert all(f"`{name}`" in DOCUMENTATION.read_text() for name in COLUMNS)
    first, second, third = rows(target)
    assert first == {
        "path": "/a.jpg",
        "label": "cat",
        "index": 3,
        "score": 0.75,
        "labels": ["cat", "dog"],
        "indices": [3, 1],
        "scores": [0.75, 0.25],
        "error": None,
        "source": "/a.jpg",
        "row": None,
        "size": 10,
        "modified": 20,
    }
    assert (second["label"], second["labels"], second["error"]) == (None, [], "no image")
    assert third["row"] == 7


def test_what_is_done_is_found_again(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"), good("/b"), good("/elsewhere"))])
        folder.write([answers(good("/p", row=0), good("/p", row=5), bad("/c"))])
    names = sorted(path.name for path in target.iterdir())
    assert names == [JOB, "part-000000.parquet", "part-000001.parquet"]
    changed = Stamp(10, 21)
    with JobFolder(target, IDENTITY) as folder:
        done = folder.settle({"/a": STAMP, "/b": changed, "/c": STAMP, "/p": STAMP})
        assert done == {"/a": {-1}, "/p": {0, 5}}
        # What is to be done again is gone, so that no image is there twice.
        assert [row["source"] for row in rows(target)] == ["/a", "/elsewhere", "/p", "/p"]
        folder.write([answers(good("/b", changed))])
    assert (target / "part-000002.parquet").is_file()


def test_a_part_with_nothing_left_goes(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(bad("/a"), bad("/b"))])
        folder.write([answers(good("/c"))])
        assert folder.settle({"/a": STAMP, "/b": STAMP}) == {}
        assert [part.name for part in folder.parts()] == ["part-000001.parquet"]


def test_what_a_killed_job_leaves_is_swept(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])
    half = target / ".part-000001.parquet.tmp"
    half.write_bytes((target / "part-000000.parquet").read_bytes()[:100])
    with JobFolder(target, IDENTITY) as folder:
        assert not half.exists()
        assert folder.settle({"/a": STAMP}) == {"/a": {-1}}


def test_a_folder_that_got_nothing_does_not_remain(target: Path) -> None:
    with pytest.raises(RuntimeError), JobFolder(target, IDENTITY):
        raise RuntimeError
    assert not target.exists()


@pytest.mark.parametrize(
    "other, message",
    [
        ({"bundle_digest": "e" * 64}, "bundle digest"),
        ({"artifact": "onnx-fp16"}, "artifact 'onnx-fp32', not 'onnx-fp16'"),
        ({"top_k": 5}, "top k 2, not 5"),
    ],
)
def test_another_job_is_refused(target: Path, other: dict[str, object], message: str) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])
    before = sorted(target.iterdir())
    with pytest.raises(UsageError, match=message), JobFolder(target, {**IDENTITY, **other}):
        pass
    assert sorted(target.iterdir()) == before


def test_other_people_s_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"), JobFolder(tmp_path, IDENTITY):
        pass
    with pytest.raises(UsageError, match="cannot be written"), JobFolder(tmp_path / "thesis.txt", IDENTITY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_jobs_at_once(target: Path) -> None:
    with (
        JobFolder(target, IDENTITY) as folder,
        pytest.raises(UsageError, match="another job writes"),
        JobFolder(target, IDENTITY),
    ):
        pass
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])


@pytest.mark.parametrize("content", [b"", b"PAR1 no PAR1", b"x" * 100])
def test_a_damaged_part_is_named(target: Path, content: bytes) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])
    (target / "part-000000.parquet").write_bytes(content)
    with (
        JobFolder(target, IDENTITY) as folder,
        pytest.raises(UsageError, match=r"part-000000\.parquet: is not a file of results"),
    ):
        folder.settle({"/a": STAMP})


def test_somebody_else_s_parquet_is_named(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])
        pq.write_table(pa.table({"x": [1]}), target / "part-000001.parquet")
        with pytest.raises(UsageError, match=r"part-000001\.parquet: is not a file of results"):
            folder.settle({"/a": STAMP})


def test_a_damaged_job_file(target: Path) -> None:
    with JobFolder(target, IDENTITY) as folder:
        folder.write([answers(good("/a"))])
    (target / JOB).write_text("{")
    with pytest.raises(UsageError, match="is damaged"), JobFolder(target, IDENTITY):
        pass
    (target / JOB).write_text(json.dumps(["list"]))
    with pytest.raises(UsageError, match="is damaged"), JobFolder(target, IDENTITY):
        pass


def test_work_survives_its_journey() -> None:
    items = [Item("/a", STAMP), Item("/b.parquet", Stamp(2**40, 2**62), 3, 300, 100, (300, 301))]
    assert list(tables.items_of(tables.pieces(items))) == items
    first, second = (tables.results([good(name)]) for name in ("/a", "/b"))
    given, failure = tables.split(pa.concat_tables([first, tables.failure("why"), second]))
    assert (given.column("source").to_pylist(), failure) == (["/a", "/b"], "why")
    assert tables.split(tables.results([good("/a")]))[1] is None


PICTURES = [b"one", b"two", None, b"four"]


def parquet(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file


@pytest.mark.parametrize(
    "columns, wanted, found",
    [
        ({"id": [1] * 4, "image": PICTURES}, None, "image"),
        ({"image": [{"bytes": b"x", "path": "x.jpg"}] * 4, "label": [1] * 4}, None, "image"),
        ({"path": ["a"] * 4, "text": ["b"] * 4}, None, "path"),
        ({"path": ["a"] * 4, "text": ["b"] * 4}, "text", "text"),
        ({"a": PICTURES, "b": PICTURES}, "b", "b"),
    ],
)
def test_the_column_of_images(
    tmp_path: Path, columns: dict[str, Any], wanted: str | None, found: str
) -> None:
    inputs = find_inputs([str(parquet(tmp_path / "x.parquet", **columns))], wanted)
    assert inputs.column == found
    assert [(item.group, item.first, item.rows) for item in inputs.items] == [(0, 0, 2), (1, 2, 2)]


@pytest.mark.parametrize(
    "columns, wanted, message",
    [
        ({"a": PICTURES, "b": PICTURES}, None, "columns a, b may all be images"),
        ({"id": [1] * 4}, None, "no column of images"),
        ({"image": PICTURES}, "imgae", "did you mean 'image'"),
        ({"id": [1] * 4}, "id", "neither images nor paths, but int64"),
    ],
)
def test_no_such_column(tmp_path: Path, columns: dict[str, Any], wanted: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_inputs([str(parquet(tmp_path / "x.parquet", **columns))], wanted)


def test_rows_of_a_group(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", image=PICTURES)
    group = find_inputs([str(file)], None).items[1]
    assert list(tables.read_images(group, "image", 8)) == [[(2, None, b""), (3, None, b"four")]]
    rest = Item(group.source, group.stamp, group.group, group.first, group.rows, done=(2,))
    assert list(tables.read_images(rest, "image", 1)) == [[], [(3, None, b"four")]]
    paths = parquet(tmp_path / "p.parquet", path=["a.jpg", "/b.jpg"])
    found = list(tables.read_images(find_inputs([str(paths)], None).items[0], "path", 8))
    first = str(tmp_path / "a.jpg")
    assert found == [[(0, first, first), (1, "/b.jpg", "/b.jpg")]]
    file.unlink()
    with pytest.raises(ImageError, match="cannot be read as Parquet"):
        list(tables.read_images(group, "image", 8))


def test_what_is_no_input(tmp_path: Path) -> None:
    image, table = tmp_path / "a.png", tmp_path / "b.parquet"
    image.write_bytes(b"")
    table.write_bytes(b"no parquet at all")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        find_inputs([str(table)], None)
    with pytest.raises(UsageError, match="is a Parquet file, the others are images"):
        find_inputs([str(table), str(image)], None)
    inputs = find_inputs([str(tmp_path / "none"), str(image)], None)
    assert [item.source for item in inputs.items] == [str(image)]
    assert [problem.message for problem in inputs.problems] == [f"{tmp_path / 'none'} does not exist"]
    image.unlink()
    (problem,) = find_inputs([str(tmp_path)], None).problems
    assert problem.hint == "--parquet-column NAME reads the Parquet files in it"
    (problem,) = find_inputs([str(tmp_path / "none")], "image").problems
    assert "does not exist" in problem.message


def test_names_that_parquet_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    inputs = find_inputs([str(tmp_path)], None)
    assert [Path(item.source).name for item in inputs.items] == ["a.png"]
    assert ["is not UTF-8" in problem.message for problem in inputs.problems] == [True]
