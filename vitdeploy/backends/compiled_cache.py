"""Where code that was compiled on this machine is kept for the next time: the user's own cache folder.

What is loaded from there is executed, so it is trusted only in a folder that nobody else can write to. Each
entry is a folder that appears all at once, with the hash of what was written: a damaged one is compiled anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.staging import StagedFolder
from vitdeploy.machine.cache import CacheFile, cache_folder

PACKAGE = "model.pt2"
DIGEST = "sha256"
_T = TypeVar("_T")


def load_or_compile(
    kind: str, name: str, compile_to: Callable[[Path], None], load: Callable[[Path], _T]
) -> _T:
    """Load what an earlier call has compiled under this name; compile and keep it where there is none.

    Processes that want the same at the same time wait for the first of them. Where the cache cannot be
    used or is not the user's alone, everything is compiled into a temporary folder.

    Args:
        kind, name: the cache's folder and the entry in it, plain file names.
        compile_to: writes the package.
        load: opens it; RuntimeError where it cannot. The file may be gone afterwards.

    Raises:
        OSError: the disk is full, or the like.
        Whatever ``compile_to`` and, of a new package, ``load`` raise.
    """
    folder = _private(cache_folder() / kind)
    if folder is None:
        return _compile_without_cache(compile_to, load)
    entry = folder / name
    with CacheFile(entry).locked():
        if _intact(entry):
            with contextlib.suppress(RuntimeError):
                return load(entry / PACKAGE)
        with contextlib.ExitStack() as stack:
            try:
                staged = stack.enter_context(StagedFolder(entry))
            except OSError:  # it can be read, but not written
                return _compile_without_cache(compile_to, load)
            made = staged.path / PACKAGE
            compile_to(made)
            loaded = load(made)
            (staged.path / DIGEST).write_text(sha256(made), encoding="ascii")
            staged.commit(replace=True)
            return loaded


def _compile_without_cache(compile_to: Callable[[Path], None], load: Callable[[Path], _T]) -> _T:
    with tempfile.TemporaryDirectory(prefix="vitdeploy-") as folder:
        made = Path(folder) / PACKAGE
        compile_to(made)
        return load(made)


def _private(folder: Path) -> Path | None:
    """The folder, there and nobody else's to write to; None where that cannot be.

    One that others could write to until now is emptied: who knows whose code is in it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or (hasattr(os, "getuid") and info.st_uid != os.getuid()):
            return None
        if stat.S_IMODE(info.st_mode) & 0o022:
            folder.chmod(0o700)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError:
        return None
    return folder


def _intact(entry: Path) -> bool:
    """Whether the package is byte for byte what was compiled."""
    try:
        return sha256(entry / PACKAGE) == (entry / DIGEST).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
