"""The user's cache: whole files, whoever writes meanwhile, and no error where it cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.machines import FULL, OLD, RTX
from tests.fakes.tensorrt_builds import linear
from vitdeploy.machine.cache import CacheFile, cache_folder
from vitdeploy.tensorrt.caches import KernelCache, TimingCache

WRITE = """
import sys
from pathlib import Path
from vitdeploy.machine.cache import CacheFile
file, mine = CacheFile(Path(sys.argv[1])), sys.argv[2].encode()
for count in range(50):
    with file.locked():
        file.write(file.read() + mine * 1000 + b"\\n")
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "shared"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen |= set(CacheFile(path).read().splitlines())
    assert [writer.returncode for writer in writers] == [0, 0]
    lines = path.read_bytes().splitlines()
    assert sorted(lines) == [b"a" * 1000] * 50 + [b"b" * 1000] * 50
    assert seen <= set(lines)  # never half a line
    assert {entry.name for entry in path.parent.iterdir()} == {"shared", "shared.lock"}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "vitdeploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vitdeploy"


@pytest.mark.parametrize("parts", [("../../etc", "passwd"), ("a/b", "c d"), ("NVIDIA L4\n", "10.8")])
def test_any_name_is_one_plain_file(parts: tuple[str, ...]) -> None:
    file = CacheFile.of("timing", *parts)
    assert file.path.parent == cache_folder() / "timing"
    assert not set(file.path.name) & set("/\\ \n")


def test_a_folder_that_cannot_be_used_is_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    file = CacheFile(tmp_path / "file" / "cache")
    file.write(b"data")
    assert file.read() == b""
    with file.locked():
        pass


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CacheFile(tmp_path / "cache")
    file.write(b"old")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    file.write(b"new")
    assert file.read() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_measurements_of_two_builds_come_together(version: str) -> None:
    cache = TimingCache.of(version, "NVIDIA L4")
    for index in range(2):
        built = linear(version)
        cache.load(built.config)
        assert built.plan() is not None
        cache.save(built.config)
        assert b'"builds": %d' % (index + 1) in cache.file.read()


def test_a_configuration_without_a_timing_cache() -> None:
    cache = TimingCache.of(OLD, "NVIDIA L4")
    cache.save(linear(OLD).config)
    assert not cache.file.path.exists()


def test_kernels_are_written_only_when_there_are_new_ones() -> None:
    kernels = KernelCache.of("1.7.1.116", "NVIDIA L4", "a" * 64)
    assert kernels.file.path.name == "1.7.1.116-NVIDIA_L4-" + "a" * 32
    cache = linear(RTX).engine().create_runtime_config().create_runtime_cache()
    kernels.load(cache)
    kernels.save(cache)
    written = kernels.file.path.stat().st_mtime_ns
    kernels.load(cache)
    kernels.save(cache)
    assert kernels.file.path.stat().st_mtime_ns == written
