"""JSON files beside weights, and of the user's; needs no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitdeploy.errors import CheckpointError

AGAIN = "download or save it again"
PERMISSIONS = "check the path and its permissions"
"""Hints."""
_MAX_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, too large, or no JSON object.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object", hint=AGAIN)
    return content


def read_bytes(path: Path) -> bytes:
    """Read a small file whole.

    Raises:
        CheckpointError: the file is missing or too large.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, too many for a configuration",
                hint="give the folder of a checkpoint",
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=PERMISSIONS) from error
