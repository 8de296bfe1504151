"""What ``vitdeploy predict`` makes of vectors: a file that appears whole, a table, or a JSON document."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitdeploy.backends.base import Array
from vitdeploy.cli import output
from vitdeploy.config import Size, size_name
from vitdeploy.errors import ImageError, UsageError
from vitdeploy.machine.atomic import atomic_write

Write = Callable[[str, Array], None]
"""Takes the name of an image and its vector, (columns,) float32."""

_ROWS_AT_A_TIME = 1024
"""Of a Parquet file: what a row group holds."""
_SHOWN = 5
"""Numbers of a vector that are shown."""


@contextlib.contextmanager
def vector_file(path: Path, names: Sequence[str], columns: int) -> Iterator[Write]:
    """Context manager: writes the vectors of images, in order, into a file of the kind that its name says.

    The file appears whole at the end, or not at all.

    Args:
        names: of all images that may be written.

    Raises:
        ImageError: none was written.
        UsageError: the disk refuses; or a name is not one line of UTF-8.
        MissingDependency: pyarrow is not installed, for Parquet.
    """
    for name in names:
        if len(name.splitlines()) != 1 or name != os.fsencode(name).decode(errors="replace"):
            raise UsageError(f"{name!r}: is not one line of UTF-8, as names in {path} are", hint="rename it")
    written = 0
    try:
        with FORMATS[path.suffix](path, columns) as write:

            def count(name: str, vector: Array) -> None:
                nonlocal written
                write(name, vector)
                written += 1

            yield count
            if not written:
                raise ImageError(f"no image could be read, so {path} is not written")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def names_file(path: Path) -> Path:
    """Where the images' names are, beside a file of vectors that has no place for them."""
    return path.with_suffix(".names.txt")


@contextlib.contextmanager
def _npy(path: Path, columns: int) -> Iterator[Write]:
    """(images, columns) float32; the names in a file of their own, one a line."""
    with atomic_write(names_file(path)) as names, atomic_write(path) as file:
        _write_header(file, 0, columns)
        rows = 0

        def write(name: str, vector: Array) -> None:
            nonlocal rows
            names.write(f"{name}\n".encode())
            file.write(vector.astype("<f4").tobytes())
            rows += 1

        yield write
        file.seek(0)
        _write_header(file, rows, columns)  # as long as the first: NumPy leaves room for the number of rows
        file.seek(0, io.SEEK_END)


def _write_header(file: BinaryIO, rows: int, columns: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _parquet(path: Path, columns: int) -> Iterator[Write]:
    """The columns ``path`` and ``embedding``."""
    from vitdeploy.ray.tables import vectors_parquet

    with atomic_write(path) as file, vectors_parquet(file, columns) as write_rows:
        names, vectors = list[str](), list[Array]()

        def flush() -> None:
            if names:
                write_rows(names, np.stack(vectors))
            names.clear()
            vectors.clear()

        def write(name: str, vector: Array) -> None:
            names.append(name)
            vectors.append(vector)
            if len(names) == _ROWS_AT_A_TIME:
                flush()

        yield write
        flush()


@contextlib.contextmanager
def _json_lines(path: Path, columns: int) -> Iterator[Write]:
    """``{"path": ..., "embedding": [...]}``, one a line."""
    with atomic_write(path) as file:
        yield lambda name, vector: _write_line(file, as_dict(name, vector))


def _write_line(file: BinaryIO, document: Mapping[str, Any]) -> None:
    file.write(f"{json.dumps(document, allow_nan=False)}\n".encode())


FORMATS: Mapping[str, Callable[[Path, int], AbstractContextManager[Write]]] = {
    ".npy": _npy,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
}
"""By the end of a file's name: opens it for vectors of so many columns."""


def as_dict(name: str, vector: Array) -> dict[str, Any]:
    """An image's vector as JSON has it: numbers that are exactly its own."""
    return {"path": name, "embedding": vector.tolist()}


def table(rows: Sequence[tuple[str, Array]], sizes: Sequence[Size | None] = ()) -> None:
    """Print what vectors look like: their columns, their length, and how they begin.

    Args:
        sizes: at which each was computed, where a bundle has several.
    """
    places = [(size_name(size),) if size else () for size in sizes] or [()] * len(rows)
    cells = [
        (
            name,
            *place,
            str(len(vector)),
            f"{np.linalg.norm(vector.astype(np.float64)):.4f}",
            "  ".join(f"{number:8.4f}" for number in vector[:_SHOWN]) + "  ..." * (len(vector) > _SHOWN),
        )
        for (name, vector), place in zip(rows, places, strict=True)
    ]
    size = ("image size",) if sizes else ()
    output.table(("image", *size, ">columns", ">norm", ">first"), cells)
