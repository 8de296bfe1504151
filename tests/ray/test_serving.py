"""The packaged folder, started by Ray's own command: answers of many clients at once, errors, the end."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.bundles import LABELS, WEIGHT, answer_images, golden_arrays, write_bundle
from tests.helpers.processes import MARK, marked, wait_for
from vitdeploy.errors import UsageError
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import write_package
from vitdeploy.ray.serving import DeploymentSettings, application

CLIENTS = 32
SCALE = np.float32(2**-5)
"""Makes the classifier less sure of itself, so that every image has scores of its own."""


@pytest.mark.slow
def test_settings_are_checked_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="args: max_bach: Extra inputs"):
        application("b", {"name": "m", "max_bach": 3})
    with pytest.raises(UsageError, match="args: threads"):
        application("b", {"name": "m", "threads": 0})
    with pytest.raises(UsageError, match="says no size"):
        application("b", {"name": "m", "fit": "widest"})
    assert DeploymentSettings(name="m").top_k == 5


def jpeg(number: int) -> bytes:
    """A cut of its own out of a real photograph."""
    photo = Image.fromarray(load_sample_images().images[number % 2])
    left, top = 9 * number % 300, 5 * number % 200
    buffer = io.BytesIO()
    photo.crop((left, top, left + 300, top + 200)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Client:
    """Speaks plain HTTP to one model."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.model = f"{self.root}/v1/models/photos"

    def ask(
        self, url: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                content, status = response.read(), response.status
        except urllib.error.HTTPError as error:
            content, status = error.read(), error.code
        except OSError:
            return 0, None
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()


@contextmanager
def serving(folder: Path, mark: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``serve run serve_config.yaml``, whatever becomes of the test."""
    config = folder / "serve_config.yaml"
    text = config.read_text().replace("port: 8000", f"port: {port}").replace("mb: 16 ", "mb: 0.2 ")
    config.write_text(text)
    environment = {
        **os.environ,
        MARK: mark,
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
        # On a busy machine Ray would give its proxy up before it has started.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    }
    command = [Path(sys.executable).with_name("serve"), "run", "serve_config.yaml"]
    with (folder.parent / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield server
        finally:
            server.kill()
            server.wait()
            for process in marked(mark):
                os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_the_packaged_folder_serves(tmp_path: Path) -> None:
    golden = golden_arrays()
    golden["reference"] = golden["reference"] * SCALE
    bundle = write_bundle(tmp_path / "photos.bundle", weight=WEIGHT * SCALE, golden=golden)
    folder = tmp_path / "package"
    settings = PackageSettings(max_batch=8, max_delay_ms=20, top_k=3, max_replicas=1)
    write_package(bundle, "ray", folder, name="photos", settings=settings)
    mark, port = uuid.uuid4().hex, free_port()
    client = Client(port)
    with serving(folder, mark, port) as server:
        ready = wait_for(lambda: client.ask(client.model)[0] == 200 or server.poll() is not None, 900, 0.5)
        assert ready, (tmp_path / "serve.log").read_text()[-4000:]
        assert server.poll() is None, (tmp_path / "serve.log").read_text()[-4000:]
        expected = {"model_name": "photos", "model_version": "1", "ready": True}
        assert client.ask(client.model) == (200, expected)
        assert client.ask(f"{client.root}/-/healthz")[0] == 200
        check_own_answers(client)
        check_errors(client)
        check_own_answers(client)
        server.send_signal(signal.SIGINT)
        server.wait(120)
        assert wait_for(lambda: not marked(mark), 180), marked(mark)


def check_own_answers(client: Client) -> None:
    """Many clients at once, each with an image of its own, get what the matrix product in float64 says."""
    images = [jpeg(number) for number in range(CLIENTS)]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda image: client.ask(f"{client.model}:predict", image), images))
    logits = answer_images([Image.open(io.BytesIO(image)) for image in images]) * SCALE
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    assert len({tuple(row) for row in scores.round(6)}) == CLIENTS
    for (status, answer), row in zip(answers, scores, strict=True):
        assert status == 200, answer
        assert answer.keys() == {"model_name", "model_version", "predictions"}
        (predictions,) = answer["predictions"]
        order = np.argsort(-row)[:3]
        assert [p["index"] for p in predictions] == order.tolist()
        assert [p["label"] for p in predictions] == [LABELS[index] for index in order]
        np.testing.assert_allclose([p["score"] for p in predictions], row[order], rtol=1e-4, atol=1e-9)


def check_errors(client: Client) -> None:
    good, predict = jpeg(0), f"{client.model}:predict"
    for body in (good[:700], b"no image", b""):
        status, answer = client.ask(predict, body)
        assert status == 400
        assert answer.keys() == {"error"}
    assert client.ask(predict, bytes(300_000))[0] == 413
    assert client.ask(predict, b"", "GET")[0] == 405
    assert client.ask(client.model, good)[0] == 405
    assert client.ask(f"{client.root}/v1/models/others:predict", good)[0] == 404
    assert client.ask(f"{client.model}/versions/2:predict", good)[0] == 404
    assert client.ask(f"{client.root}/", good)[0] == 404
    assert client.ask(predict, good, Content_Type="multipart/form-data; boundary=x")[0] == 415
    assert client.ask(f"{predict}?top_k=none", good)[0] == 400
    status, answer = client.ask(f"{client.model}/versions/1:predict?top_k=1", good)
    assert (status, len(answer["predictions"][0])) == (200, 1)
