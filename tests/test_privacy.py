"""Nothing is told to anybody, and nothing is kept at home, unless the user asks for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import in_a_process
from tests.helpers.exports import Exported
from tests.helpers.live_server import serving
from vitdeploy.data import digits_images


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new home, of this process's children, too."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.slow
def test_a_home_stays_empty(home: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "digits.bundle"
    exported = in_a_process("export", "-m", "digits", "-o", bundle, HOME=str(home))
    assert exported.code == 0, exported.err
    assert in_a_process("predict", bundle, digits_images()[0], HOME=str(home)).code == 0
    with serving(bundle) as server:
        assert server.ask("GET", "/v2/health/ready").status == 200
    assert [*home.rglob("*")] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows which hosts are asked for")
def test_nobody_is_looked_up(home: Path, digits: Exported, tmp_path: Path) -> None:
    log = tmp_path / "connections"
    trace = ["strace", "-f", "-qq", "-e", "trace=network", "-o", log]
    # ONNX Runtime would begin some seconds after its first session.
    code = "import sys, time, vitdeploy; vitdeploy.load(sys.argv[1]).predict(sys.argv[2]); time.sleep(15)"
    done = subprocess.run(
        [*trace, sys.executable, "-c", code, digits.folder, digits_images()[0]],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r".*(?:sin6?_port|nscd).*", log.read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("said, kept", [(None, "1"), ("0", "0")])
def test_the_user_may_allow_telemetry(home: Path, said: str | None, kept: str) -> None:
    code = (
        "from vitdeploy.backends.onnxruntime_providers import import_onnxruntime as get; get(); "
        "import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {**os.environ, **({"ORT_DISABLE_TELEMETRY": said} if said else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == kept, done.stderr
