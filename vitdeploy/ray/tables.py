"""What goes into a job and what comes out: image files and Parquet files, work and results as tables.

The only file that imports pyarrow.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vitdeploy.backends.base import Array
from vitdeploy.errors import ImageError, MissingDependency, UsageError, did_you_mean
from vitdeploy.images.decode import find_images
from vitdeploy.images.kinds import unread_line
from vitdeploy.machine.atomic import atomic_write
from vitdeploy.ray.work import Item, Result, Stamp

Table = Any
"""A ``pyarrow.Table``."""

_FAILURE = "failure"
"""A column on the way from an actor only: why the whole job cannot go on, as JSON."""


def _arrow(extra: str = "ray") -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("pyarrow", extra=extra, purpose="reading and writing Parquet") from error
    return pyarrow


@contextlib.contextmanager
def vectors_parquet(file: BinaryIO, columns: int) -> Iterator[Callable[[Sequence[str], Array], None]]:
    """Context manager: writes names and (n, columns) float32 rows as Parquet, ``path`` and ``embedding``.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    pa = _arrow("parquet")
    schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), columns))])
    with pa.parquet.ParquetWriter(file, schema) as writer:

        def write(names: Sequence[str], rows: Array) -> None:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), columns)
            writer.write_table(pa.Table.from_arrays([pa.array(names, pa.string()), vectors], schema=schema))

        yield write


def results(rows: Sequence[Result], vector: int | None = None, *, sized: bool = False) -> Table:
    """Rows of results as a table, and a column for failures.

    Args:
        vector: columns of the vectors that were computed; None is classes.
        sized: whether there are several image sizes, so that a column says which one was taken.
    """
    answers = _classes(rows) if vector is None else {"embedding": [row.embedding for row in rows]}
    columns: dict[str, list[Any]] = {
        "path": [row.path for row in rows],
        **answers,
        **({"image_size": [row.image_size for row in rows]} if sized else {}),
        "error": [row.error for row in rows],
        "source": [row.source for row in rows],
        "row": [None if row.row < 0 else row.row for row in rows],
        "size": [row.stamp.size for row in rows],
        "modified": [row.stamp.modified for row in rows],
        _FAILURE: [None] * len(rows),
    }
    return _arrow().Table.from_pydict(columns, schema=_schema(vector, sized))


def _classes(rows: Sequence[Result]) -> dict[str, list[Any]]:
    best = [row.predictions[0] if row.predictions else None for row in rows]
    return {
        "label": [p and p.label for p in best],
        "index": [p and p.index for p in best],
        "score": [p and p.score for p in best],
        "labels": [[p.label for p in row.predictions] for row in rows],
        "indices": [[p.index for p in row.predictions] for row in rows],
        "scores": [[p.score for p in row.predictions] for row in rows],
    }


def failure(reason: str, vector: int | None = None, *, sized: bool = False) -> Table:
    """A row that is no result, but says why there are no more."""
    schema = _schema(vector, sized)
    columns = {name: [reason if name == _FAILURE else None] for name in schema.names}
    return _arrow().Table.from_pydict(columns, schema=schema)


def split(table: Table) -> tuple[Table, str | None]:
    """What an actor gave: its results, and its failure."""
    reasons = table.column(_FAILURE)
    failed = next((reason for reason in reasons.to_pylist() if reason is not None), None)
    return table.filter(reasons.is_null()).drop_columns([_FAILURE]), failed


def _schema(vector: int | None, sized: bool) -> Any:
    """The columns of results, in their order; docs/ray.md says what they are."""
    pa = _arrow()
    text, whole, real = pa.string(), pa.int32(), pa.float64()
    classes = {
        "label": text,
        "index": whole,
        "score": real,
        "labels": pa.list_(text),
        "indices": pa.list_(whole),
        "scores": pa.list_(real),
    }
    types = {
        "path": text,
        **(classes if vector is None else {"embedding": pa.list_(pa.float32(), vector)}),
        **({"image_size": text} if sized else {}),
        "error": text,
        "source": text,
        "row": pa.int64(),
        "size": pa.int64(),
        "modified": pa.int64(),
        _FAILURE: text,
    }
    return pa.schema(list(types.items()))


def errors_of(table: Table) -> list[str]:
    """The errors among results."""
    return [error for error in table.column("error").to_pylist() if error is not None]


def pieces(items: Sequence[Item]) -> Table:
    """Work as a table, one row for each item."""
    columns = {
        "source": [item.source for item in items],
        "size": [item.stamp.size for item in items],
        "modified": [item.stamp.modified for item in items],
        "group": [item.group for item in items],
        "first": [item.first for item in items],
        "rows": [item.rows for item in items],
        "done": [list(item.done) for item in items],
    }
    pa = _arrow()
    types = {name: pa.int64() for name in columns} | {"source": pa.string(), "done": pa.list_(pa.int64())}
    return pa.Table.from_pydict(columns, schema=pa.schema(list(types.items())))


def items_of(table: Table) -> Iterator[Item]:
    """What ``pieces`` put in."""
    for row in table.to_pylist():
        stamp = Stamp(row["size"], row["modified"])
        yield Item(row["source"], stamp, row["group"], row["first"], row["rows"], tuple(row["done"]))


def write_parquet(path: Path, tables: Iterable[Table]) -> None:
    """Write a Parquet file that appears complete or not at all.

    Raises:
        OSError: the disk refuses.
    """
    pa = _arrow()
    with atomic_write(path) as file:
        pa.parquet.write_table(pa.concat_tables(tables), file)


Judge = Callable[[str, int, Stamp, bool], bool]
"""Whether an earlier row stays: of its source, row (-1 without), stamp, and whether it has an error."""


def sift(path: Path, stays: Judge) -> int:
    """Drop the rows of an earlier file that ``stays`` does not want; the rows that remain.

    Raises:
        UsageError: it cannot be read, or is no file of results.
        OSError: the disk refuses.
    """
    pa = _arrow()
    try:
        keys = pa.parquet.read_table(path, columns=["source", "row", "size", "modified", "error"])
        rows = keys.to_pylist()
        kept = [
            stays(row["source"], _number(row["row"]), Stamp(row["size"], row["modified"]), bool(row["error"]))
            for row in rows
        ]
        if all(kept):
            return len(rows)
        whole = pa.parquet.read_table(path)
    except (pa.ArrowException, KeyError) as error:
        hint = "remove it, and its images are computed again"
        raise UsageError(f"{path}: is not a file of results: {_one_line(error)}", hint=hint) from error
    if any(kept):
        write_parquet(path, [whole.filter(pa.array(kept))])
    else:
        path.unlink()
    return sum(kept)


def _number(row: int | None) -> int:
    return -1 if row is None else row


def row_groups(path: Path) -> list[int]:
    """How many rows each row group of a Parquet file has.

    Raises:
        UsageError: it is no Parquet file.
    """
    metadata = _opened(path).metadata
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def image_column(path: Path, name: str | None) -> str:
    """The column of a Parquet file that has the images.

    Args:
        name: the column's. Without one it is the only column of bytes, or of structs with ``bytes`` in them,
            as Hugging Face's datasets have; else the one called ``path``.

    Raises:
        UsageError: there is no such column, or it can hold no images.
    """
    schema = _opened(path).schema_arrow
    if name is not None:
        if name not in schema.names:
            hint = f"it has {', '.join(schema.names)}"
            raise UsageError(f"{path}: has no column {name!r}{did_you_mean(name, schema.names)}", hint=hint)
        if not _holds_images(schema.field(name).type):
            kind = schema.field(name).type
            raise UsageError(
                f"{path}: column {name!r} has neither images nor paths, but {kind}",
                hint="images are bytes, paths are strings",
            )
        return name
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if not candidates and "path" in schema.names and _holds_images(schema.field("path").type):
        candidates = ["path"]
    if len(candidates) != 1:
        many = f"columns {', '.join(candidates)} may all be images" if candidates else "no column of images"
        raise UsageError(f"{path}: {many}", hint=f"--parquet-column NAME, one of {', '.join(schema.names)}")
    return str(candidates[0])


def _holds_images(kind: Any) -> bool:
    types = _arrow().types
    return _holds_bytes(kind) or types.is_string(kind) or types.is_large_string(kind)


def _holds_bytes(kind: Any) -> bool:
    types = _arrow().types
    if types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return "bytes" in names and _holds_bytes(kind.field(names.index("bytes")).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def read_images(item: Item, column: str, batch: int) -> Iterator[list[tuple[int, str | None, bytes | str]]]:
    """The images of a row group that are left to do, some at a time: row number, name, and bytes or path.

    A path is taken relative to the Parquet file's folder; a null is no bytes at all.

    Raises:
        ImageError: the file is damaged, or gone.
    """
    pa = _arrow()
    done, number = frozenset(item.done), item.first
    folder = Path(item.source).parent
    try:
        for part in _opened(Path(item.source)).iter_batches(
            batch_size=batch, row_groups=[item.group], columns=[column]
        ):
            cells = enumerate(part.column(0), number)
            number += part.num_rows
            yield [(row, *_image(cell.as_py(), folder)) for row, cell in cells if row not in done]
    except UsageError as error:
        raise ImageError(error.message) from error
    except (pa.ArrowException, OSError) as error:
        raise ImageError(f"{item.source} is damaged: {_one_line(error)}") from error


def _image(cell: Any, folder: Path) -> tuple[str | None, bytes | str]:
    """The name of an image, and where it is."""
    if isinstance(cell, dict):
        name, data = cell.get("path"), cell["bytes"]
        return name, str(folder / name) if data is None and name else data or b""
    if isinstance(cell, str):
        path = str(folder / cell)
        return path, path
    return None, cell or b""


def _opened(path: Path) -> Any:
    pa = _arrow()
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Inputs:
    """The work there is, before anything is known of what was done earlier."""

    items: tuple[Item, ...]
    column: str | None = None
    """Where the Parquet files have their images; None for image files."""
    problems: tuple[ImageError, ...] = field(default=())
    """Of paths that name nothing."""
    unread: str = ""
    """What of folders is no image that is read, in one line."""

    @property
    def stamps(self) -> dict[str, Stamp]:
        return {item.source: item.stamp for item in self.items}


def find_inputs(paths: Sequence[str], column: str | None) -> Inputs:
    """Look for image files, or for Parquet files where a column or nothing but Parquet files are named.

    Raises:
        UsageError: images and Parquet files together, a file that is no Parquet, a column that is not there.
    """
    parquet = [path for path in paths if path.endswith(PARQUET)]
    if column is not None or len(parquet) == len(paths):
        return _parquet(paths, column)
    if parquet:
        raise UsageError(
            f"{parquet[0]} is a Parquet file, the others are images", hint="classify them in two jobs"
        )
    return _images(paths)


def _images(paths: Iterable[str]) -> Inputs:
    items: dict[str, Item] = {}
    problems: list[ImageError] = []
    unread = Counter[str]()
    for path in paths:
        try:
            images = find_images([path], unread)
        except ImageError as error:
            problems.append(_with_parquet_in_mind(error, path))
            continue
        for image in images:
            try:
                source = _text(image)
            except ImageError as error:
                problems.append(error)
            else:
                items[source] = Item(source, _stamp(source))
    return Inputs(tuple(items.values()), None, tuple(problems), unread_line(unread))


def _parquet(paths: Iterable[str], named: str | None) -> Inputs:
    items: dict[str, Sequence[Item]] = {}
    problems: list[ImageError] = []
    column: str | None = None
    for path in paths:
        try:
            for file in _find_parquet(Path(path)):
                column = image_column(file, named or column)
                items[_text(file)] = _row_groups(file)
        except ImageError as error:
            problems.append(error)
    return Inputs(tuple(item for groups in items.values() for item in groups), column, tuple(problems))


def _row_groups(path: Path) -> list[Item]:
    source, items, first = _text(path), [], 0
    stamp = _stamp(source)
    for number, rows in enumerate(row_groups(path)):
        if rows:
            items.append(Item(source, stamp, number, first, rows))
        first += rows
    return items


def _find_parquet(path: Path) -> list[Path]:
    if not path.exists():
        raise ImageError(f"{path} does not exist", hint="check the path")
    if not path.is_dir():
        return [path]
    files: list[Path] = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if name.endswith(PARQUET) and not name.startswith(".")]
    if not files:
        raise ImageError(f"no Parquet file in directory {path}", hint=f"they end in {' or '.join(PARQUET)}")
    return sorted(files)


def _text(path: Path) -> str:
    """An absolute path as text that Parquet can hold.

    Raises:
        ImageError: it is no UTF-8.
    """
    text = str(path.absolute())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"{text!r} is not UTF-8, so Parquet cannot hold it", hint="rename it") from error
    return text


def _stamp(source: str) -> Stamp:
    """Of a file that can be seen; one that cannot will have its error when it is read."""
    try:
        info = Path(source).stat()
    except OSError:
        return Stamp(-1, -1)
    return Stamp(info.st_size, info.st_mtime_ns)


def _with_parquet_in_mind(error: ImageError, path: str) -> ImageError:
    folder = Path(path)
    if folder.is_dir() and any(name.suffix in PARQUET for name in folder.iterdir()):
        return ImageError(error.message, hint="--parquet-column NAME reads the Parquet files in it")
    return error
