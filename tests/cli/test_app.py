"""The frame around the verbs: help, exit codes, errors as one line and a hint, JSON, signals, pipes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.bundles import random_image
from tests.helpers.commands import COMMAND, Run
from vitdeploy.bundle.folder import Bundle
from vitdeploy.cli import diagnosis, main

VERBS = ("export", "optimize", "engine", "verify", "bench", "inspect", "predict", "list", "doctor")


@pytest.mark.slow
def test_help(run: Run) -> None:
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert all(f"\n  {verb}" in result.out for verb in VERBS)
    assert run() == result
    assert run("-h") == result


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.code == 0
    assert f"Examples:\n    vitdeploy {verb}" in result.out
    assert "--json" in result.out


def test_version(run: Run) -> None:
    import vitdeploy

    assert run("--version").out == f"vitdeploy {vitdeploy.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["exprt"], "no such command 'exprt'; did you mean 'export'?"),
        (["export", "--fp61"], "no such option: --fp61; did you mean '--fp16'?"),
        (["export", "--modle", "x"], "no such option: --modle; did you mean '--model'?"),
        (["predict"], "missing argument 'BUNDLE'"),
        (["export", "--opset", "x"], "--opset takes a whole number, not 'x'"),
        (["export", "--opset", "2.5"], "--opset takes a whole number, not '2.5'"),
        (["export", "--atol", "a: b"], "--atol takes a number, not 'a: b'"),
        (["predict", "b", "i", "--top-k", "0"], "--top-k takes a whole number of at least 1, not '0'"),
        (["serve", "b", "--port", "70000"], "--port takes a whole number from 0 to 65535, not '70000'"),
        (["export", "--model"], "option '--model' requires an argument"),
        (["inspect", "a", "b"], "got unexpected extra argument"),
    ],
)
def test_usage_errors(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    assert "\nhint: vitdeploy" in result.err
    assert len(result.err.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, code, kind",
    [
        (["inspect", "--json", "--nonsense"], 2, "UsageError"),
        (["verify", "nowhere", "--json"], 2, "BundleError"),
        (["export", "-m", "digitz", "--json"], 2, "UsageError"),
        (["predict", "nowhere", "x.png", "--json", "--csv"], 2, "UsageError"),
    ],
)
def test_errors_as_json(run: Run, arguments: list[str], code: int, kind: str) -> None:
    result = run(*arguments)
    assert result.code == code
    assert result.document["ok"] is False
    error = result.document["error"]
    assert error.keys() == {"kind", "message", "hint"}
    assert error["kind"] == kind
    assert f"error: {error['message']}" in result.err


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("two\nlines")


def test_a_bug_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy.cli.diagnosis.diagnose", broken)
    result = run("doctor")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[0] == "error: this is a bug in vitdeploy: RuntimeError: two lines"
    assert "Traceback" not in result.err
    assert run("doctor", "--json").document["error"]["kind"] == "VitdeployError"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy.cli.diagnosis.diagnose", broken)
    with pytest.raises(RuntimeError, match="two"):
        main(["--debug", "doctor"])


@pytest.mark.slow
def test_a_pipe_that_closes_is_no_error(bundle: Bundle, tmp_path: Path) -> None:
    image = tmp_path / "one.png"
    random_image(0).save(image)
    writer = subprocess.Popen(
        [*COMMAND, "predict", bundle.root, image, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 128 + signal.SIGPIPE


# In processes of their own, as users meet them: a test runner may have plans of its own for a signal.
_INTERRUPTED = """
import signal, sys
from vitdeploy.cli import diagnosis
from vitdeploy.cli import main

def interrupted():
    signal.raise_signal({number})

def renamed():
    try:
        signal.raise_signal({number})
    except KeyboardInterrupt as error:  # what an extension module does while it is imported
        raise ImportError("initialization failed") from error

# Under nohup or in the background of a script they are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
before = signal.getsignal({number})
diagnosis.diagnose = {how}
code = main({arguments})
assert signal.getsignal({number}) is before
sys.exit(code)
"""


def interrupted(number: signal.Signals, how: str, *arguments: str) -> tuple[int, str, str]:
    script = _INTERRUPTED.format(number=int(number), how=how, arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_with_one_line(number: signal.Signals) -> None:
    assert interrupted(number, "interrupted", "doctor") == (
        128 + number, "", f"error: interrupted by {number.name}\n",
    )  # fmt: skip


@pytest.mark.slow
def test_an_interruption_that_a_library_renames() -> None:
    result = interrupted(signal.SIGINT, "renamed", "doctor", "--json")
    assert result == (130, "", "error: interrupted by SIGINT\n")


_IMPORTED = """
import signal, sys, time
from pathlib import Path
from vitdeploy.cli import diagnosis
from vitdeploy.cli import interruption, main

Path("fragile.py").write_text(
    "import signal, sys, time\\n"
    "signal.raise_signal(signal.SIGINT)\\n"
    "time.sleep(0.1)\\n"
    "print('imported', file=sys.stderr)\\n"
    "time.sleep({inside})\\n"
)

def work():
    import fragile
    time.sleep(30)

sys.path.insert(0, ".")
signal.signal(signal.SIGINT, signal.default_int_handler)
interruption._PATIENCE = {patience}
diagnosis.diagnose = work
sys.exit(main(["doctor"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "inside, patience, said", [(0, 10, "imported\n"), (600, 0.3, "imported\n"), (0, 0, "")]
)
def test_an_interruption_waits_for_an_import(tmp_path: Path, inside: int, patience: float, said: str) -> None:
    """An extension module that is interrupted while it is imported may abort the process."""
    script = _IMPORTED.format(inside=inside, patience=patience)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
    )
    assert (done.returncode, done.stderr) == (130, f"{said}error: interrupted by SIGINT\n")


def test_an_ignored_signal_stays_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnose = diagnosis.diagnose

    def hang_up() -> diagnosis.Diagnosis:
        signal.raise_signal(signal.SIGHUP)
        return diagnose()

    monkeypatch.setattr("vitdeploy.cli.diagnosis.diagnose", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert run("doctor").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_without_unicode(bundle: Bundle, tmp_path: Path) -> None:
    image = tmp_path / "kočka.png"
    random_image(0).save(image)
    command = [*COMMAND, "predict", bundle.root, image]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert "ko\\u010dka.png" in done.stdout


def test_json_is_ascii(bundle: Bundle, tmp_path: Path, run: Run) -> None:
    image = tmp_path / "kočka.png"
    random_image(0).save(image)
    out = run("predict", bundle.root, image, "--json").out
    assert out.isascii()
    assert json.loads(out)["images"][0]["path"] == str(image)


def test_an_error_is_a_line_however_long_a_path_is(run: Run) -> None:
    result = run("predict", "x/" * 700 + "\nb\tc.bundle", "image.png")
    lines = result.err.splitlines()
    assert result.code == 2
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert sum(len(line.partition(": ")[2]) for line in lines) <= 400
    assert "is not a bundle" in lines[0]
