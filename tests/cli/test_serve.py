"""``vitdeploy serve`` says what is wrong before it listens, and ends as it is told to."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import WEIGHT, write_bundle
from tests.helpers.commands import COMMAND, Run
from vitdeploy.config import BatchRange
from vitdeploy.errors import UsageError
from vitdeploy.server.repository import parse_named_bundles


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, code, said",
    [
        (("--max-batch", "64"), 2, "--max-batch 64, but onnx-fp32 takes 8 at most"),
        (("--max-batch", "0"), 2, "--max-batch"),
        (("--buckets", "4,16"), 2, "--buckets 16, but onnx-fp32 runs 1 to 8"),
        (("--backend", "opnvino"), 2, "did you mean 'openvino'?"),
        (("--artifact", "fp16"), 2, "has no artifact 'fp16'"),
        (("--port", "70000"), 2, "--port"),
        (("--timeout", "soon"), 2, "--timeout soon: not a duration"),
        (("--drain", "0"), 2, "--drain 0: not a duration"),
        (("--max-body", "much"), 2, "--max-body much: not a size"),
        (("--host", "256.0.0.1"), 2, "cannot listen on 256.0.0.1"),
    ],
)
def test_bad_flags(run: Run, tmp_path: Path, flags: tuple[str, ...], code: int, said: str) -> None:
    write_bundle(tmp_path / "a.bundle")
    result = run("serve", tmp_path / "a.bundle", "--port", "0", *flags)
    assert result.code == code
    assert said in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_damaged_bundle(run: Run, tmp_path: Path) -> None:
    damaged = write_bundle(tmp_path / "damaged.bundle").root
    (damaged / "model.onnx").write_bytes(b"x" * (damaged / "model.onnx").stat().st_size)
    result = run("serve", damaged, "--port", "0")
    assert (result.code, result.out) == (2, "")
    assert "model.onnx changed" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "names, said",
    [
        (("x@0=a",), "version '0' is not a positive number"),
        (("x@1=a", "x@1=b"), "two bundles are x version 1"),
        (("..=a",), "'..' cannot name a model"),
        (("ü=a",), "'ü' cannot name a model"),
        (("a b=a",), "'a b' cannot name a model"),
        (("nothing",), "nothing: is not a bundle"),
    ],
)
def test_bad_names(run: Run, names: tuple[str, ...], said: str) -> None:
    result = run("serve", *names, "--port", "0")
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_a_taken_port_is_said_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "no.bundle", "--port", str(port))
    assert result.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in result.err


def test_wrong_outputs_are_not_served(run: Run, tmp_path: Path) -> None:
    write_bundle(tmp_path / "a.bundle", weight=WEIGHT + 0.1)
    result = run("serve", tmp_path / "a.bundle", "--port", "0")
    assert result.code == 5
    assert "is not served: its outputs are wrong at batch 1" in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    write_bundle(tmp_path / "a.bundle", batch=BatchRange(4, 4, 4))
    command = [*COMMAND, "serve", str(tmp_path / "a.bundle"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(re.match(r"serving http://127\.0\.0\.1:\d+$", line) for line in lines)
        process.send_signal(number)
        assert f"stopped by signal {int(number)}" in process.stderr.read()
        assert process.wait(120) == 0


NAMES = st.sampled_from(["a", "b.c", "D-1"]) | st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True
)


@pytest.mark.slow
@given(st.lists(st.tuples(NAMES, st.none() | st.integers(1, 4)), min_size=1, max_size=6))
def test_names_and_versions(wanted: list[tuple[str, int | None]]) -> None:
    """Versions that are not given count on from the highest so far; none is there twice."""
    expected: list[tuple[str, int]] = []
    for name, version in wanted:
        highest = max((v for n, v in expected if n == name), default=0)
        expected.append((name, highest + 1 if version is None else version))
    texts = [f"{name}{'' if version is None else f'@{version}'}=some/folder" for name, version in wanted]
    if len(set(expected)) < len(expected):
        with pytest.raises(UsageError, match="two bundles are"):
            parse_named_bundles(texts)
        return
    bundles = parse_named_bundles(texts)
    assert [(bundle.name, int(bundle.version)) for bundle in bundles] == expected
    assert {bundle.path for bundle in bundles} == {Path("some/folder")}


def test_a_bundle_without_a_name() -> None:
    (bundle,) = parse_named_bundles(["models/vit-b.v2.bundle"])
    assert (bundle.name, bundle.version) == ("vit-b.v2", "1")
    (bundle,) = parse_named_bundles(["a=b/c=d"])
    assert (bundle.name, bundle.path) == ("a", Path("b/c=d"))
