"""A folder that a command writes of a bundle: what may be replaced is only what it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path

from vitdeploy.bundle.files import names_below
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError

GENERATOR = "vitdeploy"


def output_folder(output: Path, bundle: Bundle, *, marker: str, kind: str, force: bool) -> Path:
    """The folder to write, without links.

    Args:
        marker: the JSON file that says what else lies in such a folder: ``generator`` and ``files``.
        kind: what the folder is, in a word.

    Raises:
        UsageError: it is inside of the bundle, a file, there already, or with ``force`` of another kind.
    """
    try:
        folder = output.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{output}: is no usable path: {error}") from error
    if folder.is_relative_to(bundle.root.resolve()):
        raise UsageError(f"{output}: is inside of the bundle", hint="choose a folder beside it")
    if not folder.exists():
        return folder
    if not folder.is_dir() or folder.is_mount():
        what = "a mount point" if folder.is_dir() else "a file"
        raise UsageError(f"{output}: is {what}", hint="choose a folder that does not exist yet")
    if not force:
        raise UsageError(f"{output}: already exists", hint=f"--force replaces an earlier {kind}")
    if not any(folder.iterdir()):
        return folder
    written = _written_before(folder, marker)
    if written is None:
        article = "an" if kind[0] in "aeiou" else "a"
        raise UsageError(f"{output}: is not {article} {kind}, so --force does not replace it")
    strange = [
        name for name in names_below(folder) if name not in written and "__pycache__" not in name.split("/")
    ]
    if strange:
        raise UsageError(
            f"{output}: holds what vitdeploy did not write: {', '.join(strange[:8])}",
            hint="move it elsewhere, or choose another folder",
        )
    return folder


def _written_before(folder: Path, marker: str) -> frozenset[str] | None:
    """The files that an earlier run wrote into this folder; None where it is of another kind."""
    try:
        document = json.loads((folder / marker).read_text(encoding="utf-8"))
        ours = str(document["generator"]).startswith(GENERATOR)
        return frozenset([marker, *document["files"]]) if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
