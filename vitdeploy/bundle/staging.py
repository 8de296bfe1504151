"""A folder that appears all at once: built beside its place, made durable, moved there by one rename.

At whatever moment the process dies, the target is what it was before, or the complete new folder (or,
only where the file system cannot swap two folders, absent with the old folder kept beside it). What a
killed process leaves is found by the next one: a builder holds a lock on its temporary folder, and the
kernel drops that lock when the builder dies. Unlike a process number, a lock also tells the truth
about processes in other containers that share the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_PREFIX = ".vitdeploy-"
_TEMPORARY = ".tmp"
_REPLACED = ".old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class StagedFolder:
    """Context manager: fill ``path``, then ``commit()``; without a commit nothing remains.

    Missing parents of the target are created, and removed again if there is no commit.

    Raises:
        OSError: from every method, whatever the disk refuses.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._aside: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._make_parents()
            sweep(self.target)
            self._make_temporary()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()

    def _make_parents(self) -> None:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        for parent in reversed(missing):
            self._new_parents.append(parent)
            parent.mkdir()

    def _make_temporary(self) -> None:
        while True:
            self.path = self.target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_TEMPORARY}"
            self.path.mkdir()
            # Another process may sweep the new folder away before its lock is taken.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                self._lock = _lock(self.path)
                if self.path.exists():
                    return

    def commit(self, *, replace: bool) -> None:
        """Move the folder to its target; an existing folder there gives way only to ``replace``.

        Raises:
            FileExistsError: another one was put there meanwhile.
        """
        _sync(self.path)
        if replace and self.target.exists():
            self._replace()
        else:
            self._place()
        _sync_entry(self.target.parent)

    def _place(self) -> None:
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            reason = "another one was put there meanwhile"
            raise FileExistsError(errno.EEXIST, reason, str(self.target)) from error

    def _replace(self) -> None:
        if _exchange(self.path, self.target):  # what is at ``path`` now is the old folder
            return
        self._aside = self.target.parent / f"{_PREFIX}{secrets.token_hex(8)}.{self.target.name}{_REPLACED}"
        self.target.rename(self._aside)
        self.path.rename(self.target)

    def _clean(self) -> None:
        try:
            self._remove()
        except BaseException:  # Ctrl-C while cleaning up
            self._remove()
            raise

    def _remove(self) -> None:
        if self._aside:
            _settle(self._aside, self.target)
        if hasattr(self, "path"):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in reversed(self._new_parents):
            with contextlib.suppress(OSError):  # not empty: it holds the target
                parent.rmdir()


def sweep(target: Path) -> None:
    """Remove what killed processes left beside ``target``, and put back a folder they had moved away."""
    for leftover in sorted(target.parent.glob(f"{_PREFIX}*")):
        if leftover.name.endswith(f".{target.name}{_REPLACED}"):
            _settle(leftover, target)
        elif leftover.name.endswith(_TEMPORARY):
            with contextlib.suppress(OSError):  # its builder lives, or it is not ours to remove
                held = _lock(leftover)
                if held is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    os.close(held)


def _settle(aside: Path, target: Path) -> None:
    """Drop a replaced folder, or put it back where its replacement never arrived."""
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(target)


def _lock(folder: Path) -> int | None:
    """Take the lock on a folder; None where the file system has no locks.

    Raises:
        BlockingIOError: somebody holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux); False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_entry(Path(root, name))
        _sync_entry(Path(root))


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
