"""What a job is given: image files, or Parquet files, as pieces of work with what tells them apart."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitdeploy.errors import ImageError, UsageError
from vitdeploy.images.decode import find_images
from vitdeploy.ray import tables
from vitdeploy.ray.work import Item, Stamp

PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Inputs:
    """The work there is, before anything is known of what was done earlier."""

    items: tuple[Item, ...]
    column: str | None = None
    """Where the Parquet files have their images; None for image files."""
    problems: tuple[ImageError, ...] = field(default=())
    """Of paths that name nothing."""

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
    for path in paths:
        try:
            images = find_images([path])
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
    return Inputs(tuple(items.values()), None, tuple(problems))


def _parquet(paths: Iterable[str], wanted: str | None) -> Inputs:
    items: dict[str, Sequence[Item]] = {}
    problems: list[ImageError] = []
    column: str | None = None
    for path in paths:
        try:
            for found in _find_parquet(Path(path)):
                column = tables.image_column(found, wanted or column)
                items[_text(found)] = _row_groups(found)
        except ImageError as error:
            problems.append(error)
    return Inputs(tuple(item for groups in items.values() for item in groups), column, tuple(problems))


def _row_groups(path: Path) -> list[Item]:
    source, items, first = _text(path), [], 0
    stamp = _stamp(source)
    for number, rows in enumerate(tables.row_groups(path)):
        if rows:
            items.append(Item(source, stamp, number, first, rows))
        first += rows
    return items


def _find_parquet(path: Path) -> list[Path]:
    if not path.exists():
        raise ImageError(f"{path} does not exist", hint="check the path")
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(PARQUET) and not name.startswith(".")]
    if not found:
        raise ImageError(f"no Parquet file in directory {path}", hint=f"they end in {' or '.join(PARQUET)}")
    return sorted(found)


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
