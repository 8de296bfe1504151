"""Where a bundle was expected and there is none: what is there instead, so that the hint leads somewhere."""

from __future__ import annotations

import difflib
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

from vitdeploy.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES
from vitdeploy.errors import BundleError

_LOOKED_AT = 1000
"""Entries of a folder, at most."""
_NAMED = 4
"""Bundles in a hint, at most."""
_CHECKPOINTS = ("config.json", "*.safetensors", "pytorch_model*.bin")


def no_bundle(path: Path) -> BundleError:
    """The error for a path without a manifest."""
    around = next((parent for parent in path.parents if looks_like_bundle(parent)), None)
    if around is not None:
        return BundleError(
            f"{path}: is not a bundle (it is in one)", hint=f"name the bundle's folder: {around}"
        )
    if path.is_dir():
        inside = list(_bundles_in(path))
        if inside:
            hint = f"bundles in it: {_listed(inside)}"
        elif any(next(path.glob(pattern), None) for pattern in _CHECKPOINTS):
            hint = f"`vitdeploy export -m {shlex.quote(str(path))}` makes a bundle of a checkpoint"
        else:
            hint = _make(path)
        return BundleError(f"{path}: is not a bundle (it has no {MANIFEST})", hint=hint)
    why = "it is a file" if path.exists() else "it does not exist"
    beside = list(_bundles_in(path.parent))
    meant = _meant(path, beside)
    hint = f"bundles there: {_listed(beside)}" if beside else _make(path)
    return BundleError(f"{path}: is not a bundle ({why}){meant}", hint=hint)


def _meant(path: Path, bundles: list[Path]) -> str:
    """Which of the bundles is called about so; their suffix, which most have in common, does not count."""
    stems = {bundle.stem: bundle.name for bundle in bundles}
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.6)
    return f"; did you mean {stems[close[0]]!r}?" if close else ""


def looks_like_bundle(folder: Path) -> bool:
    """True for bundles, damaged ones too; false for a stranger's folder with a manifest.json."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return b'"generator": "vitdeploy' in file.read(MAX_MANIFEST_BYTES)
    except OSError:
        return False


def _bundles_in(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(itertools.islice(folder.iterdir(), _LOOKED_AT))
    except OSError:
        return
    yield from (entry for entry in entries if not entry.name.startswith(".") and looks_like_bundle(entry))


def _listed(bundles: list[Path]) -> str:
    more = f" and {len(bundles) - _NAMED} more" if len(bundles) > _NAMED else ""
    return ", ".join(map(str, bundles[:_NAMED])) + more


def _make(path: Path) -> str:
    free = shlex.quote(str(path if not path.exists() else path.with_name(f"{path.name}.bundle")))
    return f"`vitdeploy export -m MODEL -o {free}` makes one"
