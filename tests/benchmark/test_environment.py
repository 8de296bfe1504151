"""What is said of the machine and of the revision that was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vitdeploy.benchmark.environment import git_revision, governor


def test_governor(tmp_path: Path) -> None:
    assert governor(tmp_path) is None
    file = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    file.parent.mkdir(parents=True)
    file.write_text("powersave\n")
    assert governor(tmp_path) == "powersave"


def test_git(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None

    def run(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    run("init", "-q")
    (tmp_path / "file").write_text("1")
    run("add", "file")
    run("commit", "-q", "-m", "one")
    found = git_revision(tmp_path)
    assert found is not None
    assert (found.revision, found.dirty) == (run("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("2")
    changed = git_revision(tmp_path)
    assert changed is not None
    assert changed.dirty
