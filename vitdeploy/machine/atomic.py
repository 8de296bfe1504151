"""One file that appears all at once: whoever reads meanwhile reads what was there, or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Context manager: the file to write into; at the end it is made durable and moved to its place.

    Where an error ends it, the place is as it was. What a killed process leaves is called ``.NAME.*.tmp``.

    Raises:
        OSError: the disk refuses.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # moved, or never there
            beside.unlink()
