"""Whatever kills or interrupts an export, no half-written bundle is ever to be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.small_bundles import siblings
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Manifest, Provenance
from vitdeploy.errors import BundleError


def write(target: Path, name: str = "tiny", *, force: bool = False) -> None:
    with BundleWriter(target, force=force) as writer:
        seal(writer, name)
        writer.commit()


def seal(writer: BundleWriter, name: str) -> None:
    writer.file("model.onnx").write_bytes(name.encode() * 100)
    provenance = Provenance(source="tiny", family="vit")
    created = "2026-11-21T03:00:00Z"
    writer.seal(Manifest(name=name, created=created, generator="vitdeploy 0.1.0", provenance=provenance))


# A child that dies, or is interrupted, at the n-th thing it does to the file system: Python reports
# those through audit events, so that running n up to the end visits every moment between two of them.
CHILD = """
import os, signal, sys, shutil
from pathlib import Path
from vitdeploy.bundle import staging
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Manifest, Provenance

os.fsync = lambda handle: None  # a killed process loses nothing that the kernel has
scratch, scenario, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
EVENTS = ("open", "os.", "shutil.")
countdown = 0

def hook(event, args):
    global countdown
    if countdown and event.startswith(EVENTS):
        countdown -= 1
        if not countdown:
            if ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt

def write(target, name, force):
    with BundleWriter(target, force=force) as writer:
        for file in ("model.onnx", "engines/sm_90/model.plan"):
            writer.file(file).write_bytes(name.encode() * 100)
        manifest = Manifest(name=name, created="2026-11-21T03:00:00Z", generator="vitdeploy 0.1.0",
                            provenance=Provenance(source="tiny", family="vit"))
        writer.seal(manifest)
        writer.commit()

def act(target):
    if scenario == "edit":
        Bundle.open(target).add(files={"more": scratch / "more"})
    else:
        write(target, "new", scenario != "fresh")

if scenario == "aside":
    staging._exchange = lambda one, other: False
(scratch / "more").write_bytes(b"more")
sys.addaudithook(hook)
n = 0
while True:
    n += 1
    parent = scratch / str(n)
    parent.mkdir()
    target = parent / "bundle"
    if scenario != "fresh":
        write(target, "old", False)
    child = os.fork()
    if child == 0:
        countdown = n
        try:
            act(target)
            os._exit(0 if countdown else 1)
        except KeyboardInterrupt:
            os._exit(1)
    if os.waitpid(child, 0)[1] == 0:
        break
print(n)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["kill", "interrupt"])
@pytest.mark.parametrize("scenario", ["fresh", "replace", "aside", "edit"])
def test_at_whatever_moment_it_ends_the_bundle_is_whole(
    tmp_path: Path, scenario: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    command = [sys.executable, "-c", CHILD, str(tmp_path), scenario, ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments > 20
    seen = {_state(tmp_path / str(n), scenario, ending) for n in range(1, moments + 1)}
    before = "nothing" if scenario == "fresh" else "old"
    assert {before, "new"} <= seen


def _state(parent: Path, scenario: str, ending: str) -> str:
    """What stands there after the end; checks that it is whole and that the next export tidies up."""
    target = parent / "bundle"
    state = "nothing"
    if target.exists():
        bundle = Bundle.open(target)
        bundle.verify()
        state = "new" if "more" in bundle.manifest.files else bundle.manifest.name
        if ending == "interrupt":
            assert siblings(target) == ["bundle"]
    else:
        assert scenario == "fresh" or (scenario == "aside" and ending == "kill")
        if ending == "interrupt":
            assert siblings(target) == []
    if state == "nothing" and scenario == "aside":  # between two renames: the old one waits beside
        with pytest.raises(BundleError, match="already exists"), BundleWriter(target):
            pass
        assert Bundle.open(target).manifest.name == "old"
    write(target, "last", force=True)
    assert siblings(target) == ["bundle"]
    return state


SLOW = """
import os, random, signal, sys, time
from pathlib import Path
from vitdeploy.bundle.folder import BundleWriter
from vitdeploy.bundle.manifest import Manifest, Provenance

target, rounds = Path(sys.argv[1]), int(sys.argv[2])

def write(name, step):
    with BundleWriter(target, force=True) as writer:
        for i in range(4):
            with writer.file(f"part{i}").open("wb") as file:
                for _ in range(5):
                    file.write(os.urandom(20_000))
                    file.flush()
                    step()
        writer.seal(Manifest(name=name, created="2026-11-21T03:00:00Z", generator="vitdeploy 0.1.0",
                             provenance=Provenance(source="tiny", family="vit")))
        writer.commit()

random.seed(0)
write("first", lambda: None)
for n in range(rounds):
    progress, tell = os.pipe()
    child = os.fork()
    if child == 0:
        write(str(n), lambda: os.write(tell, b"."))
        os._exit(0)
    os.close(tell)
    # While the files are written, soon after their 20 pieces, or when the child is done and the pipe ends.
    pieces = random.choice([*range(20), *[20] * 10, *[21] * 10])
    for _ in range(pieces):
        os.read(progress, 1)
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(progress)
    print(n, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_killed_at_random_moments_while_writing(tmp_path: Path) -> None:
    target, rounds = tmp_path / "parent" / "bundle", 40
    seen = set()
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(target), str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for n in range(rounds):
            assert int(process.stdout.readline()) == n
            if target.exists():
                bundle = Bundle.open(target)
                bundle.verify()
                seen.add(bundle.manifest.name)
                shutil.rmtree(target) if n % 3 == 0 else None
            else:
                seen.add("nothing")
            process.stdin.write("next\n")
            process.stdin.flush()
    assert "nothing" in seen
    assert len(seen) > 3
    write(target, force=True)
    assert siblings(target) == ["bundle"]


def test_a_living_writer_is_left_alone(target: Path) -> None:
    with BundleWriter(target) as slow:
        seal(slow, "slow")
        write(target.parent / "other")
        slow.commit()
    assert siblings(target) == ["bundle", "other"]
    Bundle.open(target).verify()


def _lose_the_race(slow: BundleWriter, target: Path) -> None:
    seal(slow, "slow")
    write(target, "fast")
    slow.commit()


def test_of_two_writers_one_wins_and_the_other_is_told(target: Path) -> None:
    slow = BundleWriter(target)
    with pytest.raises(BundleError, match="another one was put there meanwhile"), slow:
        _lose_the_race(slow, target)
    assert Bundle.open(target).manifest.name == "fast"
    assert siblings(target) == ["bundle"]
