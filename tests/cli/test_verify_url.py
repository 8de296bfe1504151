"""``vitdeploy verify --url``: exit codes, what is printed, JSON, the watch and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import IO

import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import linear, predict, served
from tests.fakes.v2_server import V2Server
from tests.helpers.bundles import write_bundle
from tests.helpers.commands import COMMAND, Run
from vitdeploy.bundle.folder import Bundle


@pytest.fixture
def single(tmp_path: Path) -> Bundle:
    """The linear classifier in fp32."""
    return write_bundle(tmp_path / "linear.bundle")


@pytest.mark.slow
def test_a_right_server(run: Run, single: Bundle) -> None:
    with V2Server({"linear": served()}, name="vitdeploy", predict=predict()) as server:
        result = run("verify", single.root, "--url", server.url)
    assert result.code == 0, result.err
    assert len(re.findall(r"^linear +http \((binary|json)\) .* ok$", result.out, re.MULTILINE)) == 6
    assert len(re.findall(r"^image\.\d +(PNG|JPEG) .* ok$", result.out, re.MULTILINE)) == 4
    assert re.search(r"^latency: [0-9.]+ ms median, .* \(100 calls of one image, binary\)$", result.out, re.M)
    assert "answers as" in result.out
    assert "6 comparisons, 5 labels, 4 image files" in result.out


@pytest.mark.slow
def test_a_wrong_server_exits_5(run: Run, single: Bundle) -> None:
    with V2Server({"linear": served(lambda x: linear()(x[:, ::-1]))}) as server:
        result = run("verify", single.root, "--url", server.url)
        assert result.code == 5
        assert result.out.count("FAILED") == 6
        assert "likely cause: the answers are what the model gives for BGR tensors" in result.out
        assert result.err.count("error: ") == 1
        assert "does not answer as" in result.err
        as_json = run("verify", single.root, "--url", server.url, "--json")
    assert as_json.code == 5
    assert as_json.document["ok"] is False
    assert as_json.document["error"]["kind"] == "ParityError"
    assert "BGR" in as_json.document["causes"][0]


def test_json(run: Run, single: Bundle) -> None:
    with GrpcServer({"linear": served()}) as server:
        result = run("verify", single.root, "--url", server.url, "--json", "--batch", "2,4")
    assert result.code == 0
    document = result.document
    assert document["ok"] is True
    assert document["url"] == server.url
    assert [record["batch"] for record in document["parity"]] == [2, 4]
    assert document["latency"]["calls"] == 100
    assert document["fits"] == "fp32"


def test_a_server_that_is_not_there(run: Run, single: Bundle) -> None:
    result = run("verify", single.root, "--url", "http://127.0.0.1:1", "--json")
    assert result.code == 2
    assert result.document["error"]["kind"] == "ServerError"
    assert "nothing listens there" in result.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "x"], "is a bundle, which carries its own reference"),
        (["--watch", "5"], "--watch is about a live server"),
        (["--header", "a: b"], "--header is about a live server"),
        (["--url", "http://a:1", "--backend", "onnxruntime"], "--backend is about how this machine runs"),
        (["--url", "http://a:1", "--data", "folder"], "--data is about how this machine runs"),
        (["--url", "http://a:1", "--threads", "2"], "--threads is about how this machine runs"),
        (["--url", "http://a:1", "--provider", "cpu"], "--provider is about how this machine runs"),
        (["--url", "http://a:1", "--metrics-port", "0"], "--metrics-port goes with --watch"),
        (["--url", "http://a:1", "--watch", "0"], "--watch 0: not a number of seconds"),
        (["--url", "http://a:1", "--timeout", "-1"], "timeout"),
        (["--url", "http://a:1", "--header", "nonsense"], "is not NAME: VALUE"),
        (["--url", "ftp://a:1"], "unknown protocol 'ftp'"),
        (["--url", "http://a:1", "--artifact", "onnx-fp31"], "did you mean 'onnx-fp32'"),
        (["--url", "http://a:1", "--batch", "1,x"], "--batch 1,x"),
    ],
)
def test_flags_that_do_not_go_together(run: Run, single: Bundle, flags: list[str], message: str) -> None:
    result = run("verify", single.root, *flags)
    assert result.code == 2
    assert message in result.err


def test_a_header_s_value_is_not_repeated(run: Run, single: Bundle) -> None:
    result = run("verify", single.root, "--url", "http://a:1", "--header", "Authori zation: secret")
    assert result.code == 2
    assert "secret" not in result.err


def watching(bundle: Bundle, url: str, *flags: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "verify", str(bundle.root), "--url", url, "--watch", "0.2", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(stream: IO[str] | None, pattern: str) -> str:
    assert stream is not None
    end = time.monotonic() + 300
    while time.monotonic() < end:
        line = stream.readline()
        if re.search(pattern, line):
            return line
        assert line, f"ended before {pattern!r}"
    raise AssertionError(f"no {pattern!r} in time")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_until_interrupted(single: Bundle, number: signal.Signals) -> None:
    with V2Server({"linear": served()}) as server:
        process = watching(single, server.url)
        read_until(process.stdout, r"round 2 .* ok ")
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert re.search(r"\d rounds, all passed; relative error at most \d", out)
    assert "Traceback" not in err


@pytest.mark.slow
def test_watch_interrupted_while_the_server_is_slow(single: Bundle) -> None:
    with V2Server({"linear": served()}, fault="slow") as server:
        process = watching(single, server.url, "--timeout", "3600")
        read_until(process.stderr, "every 0.2 s")
        end = time.monotonic() + 300
        while not server.batches and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)  # the server answers only after that
    assert process.returncode == 5
    assert "before the first round was over" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_watch_with_a_failure_exits_5_and_exports_metrics(single: Bundle) -> None:
    model = served()
    with V2Server({"linear": model}) as server:
        process = watching(single, server.url, "--metrics-port", "0", "--json")
        where = read_until(process.stderr, r"^metrics: http").split()[1]
        read_until(process.stderr, r"round 1 .* ok ")
        model.versions["1"] = lambda x: -linear()(x)
        read_until(process.stderr, r" FAILED .*likely cause: the server gives the negated logits")
        with urllib.request.urlopen(where) as answer:
            text = answer.read().decode()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=600)
    assert re.search(r'^vitdeploy_live_failures_total\{reason="mismatch"\} [1-9]', text, re.MULTILINE)
    assert process.returncode == 5
    document = json.loads(out)
    assert document["ok"] is False
    assert document["mismatches"] >= 1
    assert document["error"]["kind"] == "ParityError"


@pytest.mark.slow
def test_a_missing_library_names_the_extra(single: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tritonclient").mkdir()
    (tmp_path / "tritonclient" / "__init__.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [*COMMAND, "verify", str(single.root), "--url", "http://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3
    assert 'pip install "vitdeploy[client]"' in done.stderr
