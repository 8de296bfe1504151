"""Regular files of a folder that nobody vouches for: listed, identified without following links, hashed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Signature(NamedTuple):
    """Changes when a file is rewritten or replaced; survives moving its folder."""

    inode: int
    size: int
    modified: int


def names_below(folder: Path) -> Iterator[str]:
    """Relative paths of everything below ``folder`` that is no directory; links to directories count."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted(files + links):
            yield Path(root, name).relative_to(folder).as_posix()


def signature(root: Path, name: str) -> Signature:
    """What identifies the contents of a regular file reached without following any link below ``root``.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: a link on the way, or no regular file.
    """
    path = root
    for part in name.split("/"):
        path = path / part
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            raise ValueError(f"{name} is or passes a symbolic link")
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{name} is not a regular file")
    return Signature(info.st_ino, info.st_size, info.st_mtime_ns)


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
