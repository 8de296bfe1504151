"""The record of a run on a GPU: one JSON file that every step adds to, whole at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The record, empty if there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update(path: Path, **parts: Any) -> None:
    """Set parts of the record; a reader sees the file before or after, never in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({**read(path), **parts}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
