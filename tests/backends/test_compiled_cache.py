"""Code that is kept: compiled once, never damaged, and never what somebody else could have written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vitdeploy.backends.compiled_cache import DIGEST, PACKAGE, load_or_compile
from vitdeploy.bundle.files import sha256
from vitdeploy.machine.cache import cache_folder

CODE = b"code" * 1000
KILLED = """
import os
from vitdeploy.backends.compiled_cache import load_or_compile
def compile_to(path):
    path.write_bytes(b"half")
    os._exit(9)
load_or_compile("kind", "name", compile_to, lambda path: path.read_bytes())
"""


class Compiler:
    """Writes and reads packages of four thousand bytes."""

    def __init__(self) -> None:
        self.calls = 0

    def compile(self, path: Path) -> None:
        self.calls += 1
        time.sleep(0.01)
        path.write_bytes(CODE)

    def load(self, path: Path) -> bytes:
        data = path.read_bytes()
        if data != CODE:
            raise RuntimeError("not a package")
        return data

    def __call__(self) -> None:
        assert load_or_compile("kind", "name", self.compile, self.load) == CODE


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder() -> Path:
    return cache_folder() / "kind"


def contents() -> set[str]:
    return {path.name for path in folder().iterdir()}


def test_compiled_once() -> None:
    compiler = Compiler()
    for _ in range(3):
        compiler()
    assert compiler.calls == 1
    assert contents() == {"name", "name.lock"}
    assert folder().stat().st_mode & 0o777 == 0o700


def test_who_wants_the_same_waits_for_it() -> None:
    compiler = Compiler()
    threads = [threading.Thread(target=compiler) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.calls == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "no package", "no digest", "junk"])
def test_a_damaged_entry_is_compiled_anew(damage: str) -> None:
    compiler = Compiler()
    compiler()
    entry = folder() / "name"
    package, digest = entry / PACKAGE, entry / DIGEST
    match damage:
        case "flipped":
            package.write_bytes(CODE[:-1] + b"x")
        case "cut":
            package.write_bytes(CODE[:-1])
        case "no package":
            package.unlink()
        case "no digest":
            digest.write_bytes(b"\xff")
        case "junk":  # by its digest it is intact: the runtime finds out
            package.write_bytes(b"junk")
            digest.write_text(sha256(package))
    compiler()
    compiler()
    assert compiler.calls == 2
    assert contents() == {"name", "name.lock"}


def test_a_folder_that_others_could_write_to_is_emptied() -> None:
    compiler = Compiler()
    compiler()
    (folder() / "link").symlink_to("/")
    folder().chmod(0o770)
    compiler()
    assert compiler.calls == 2
    assert contents() == {"name", "name.lock"}
    assert folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("why", ["another user's", "a link", "no folder"])
def test_without_a_cache_everything_happens_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    elsewhere, temporary = tmp_path / "elsewhere", tmp_path / "temporary"
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for needed in (cache_folder(), elsewhere, temporary):
        needed.mkdir(parents=True)
    match why:
        case "another user's":
            me = os.getuid()
            folder().mkdir()
            monkeypatch.setattr(os, "getuid", lambda: me + 1)
        case "a link":
            folder().symlink_to(elsewhere)
        case "no folder":
            folder().write_bytes(b"in the way")
    compiler = Compiler()
    compiler()
    compiler()
    assert compiler.calls == 2
    assert not list(elsewhere.iterdir())
    assert not list(temporary.iterdir())


def test_a_cache_that_can_only_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError(30, "read-only file system")

    compiler = Compiler()
    monkeypatch.setattr("vitdeploy.bundle.staging.StagedFolder.__enter__", refuse)
    compiler()
    compiler()
    assert compiler.calls == 2


def test_a_failure_leaves_nothing() -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        load_or_compile("kind", "name", fail, Compiler().load)
    assert contents() == {"name.lock"}


def test_what_a_killed_process_leaves_is_swept_away() -> None:
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == 9
    assert len(contents()) == 2  # the lock and half a package
    compiler = Compiler()
    compiler()
    assert contents() == {"name", "name.lock"}
