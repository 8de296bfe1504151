"""Without a folder for temporary files: one line, whoever would have written there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import Result, in_this_process
from vitdeploy.errors import DeviceUnavailable
from vitdeploy.machine.child import Worker
from vitdeploy.machine.temporary import temporary_folder

MESSAGE = "no folder for temporary files can be written to"


@pytest.fixture
def nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own search, over folders none of which is there; pytest has its own files already."""
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_there_is_one() -> None:
    assert Path(temporary_folder()).is_dir()


@pytest.mark.usefixtures("nowhere")
def test_there_is_none() -> None:
    with pytest.raises(DeviceUnavailable, match=MESSAGE) as caught:
        temporary_folder()
    assert "TMPDIR" in str(caught.value.hint)
    with pytest.raises(DeviceUnavailable, match=MESSAGE):
        Worker(["true"], {}, {}, None)


@pytest.mark.usefixtures("nowhere")
def test_commands_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "b.bundle").root

    def refused(*arguments: object) -> Result:
        result = in_this_process(capsys, *arguments)
        assert (result.code, result.out) == (3, "")
        assert result.err.startswith(f"error: {MESSAGE}\nhint: ")
        assert len(result.err.splitlines()) == 2
        return result

    refused("bench", bundle, "--budget", 1)
    refused("export", "-m", "digits", "-o", tmp_path / "x.bundle")
    doctor = in_this_process(capsys, "doctor")
    assert doctor.code == 3
    assert MESSAGE in doctor.out
    assert in_this_process(capsys, "doctor", "--json").document["temporary_folder"] is None
    # What a library of somebody else's wants to write is no bug of ours.
    monkeypatch.setattr("vitdeploy.cli.diagnosis.diagnose", tempfile.gettempdir)
    refused("doctor")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.bundle"]
