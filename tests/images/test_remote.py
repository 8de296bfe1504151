"""Images at addresses: fetched from a server of the test's own, within bounds, and from nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bundles import random_image
from vitdeploy.errors import ImageError
from vitdeploy.images.decode import load_image
from vitdeploy.images.remote import RemoteImage, is_address


class _Handler(BaseHTTPRequestHandler):
    """``/NAME.png`` is a file of the folder; ``/to/ADDRESS`` leads elsewhere; nothing else is there."""

    folder: Path

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        path = self.folder / self.path[1:]
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(path.read_bytes())

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that have seen enough hang up."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    random_image(3).save(tmp_path / "3.png")
    handler = type("Handler", (_Handler,), {"folder": tmp_path})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_image_is_fetched(address: str) -> None:
    for url in (f"{address}/3.png", f"{address}/to/{address}/3.png"):
        image = load_image(RemoteImage(url))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(random_image(3)))


@pytest.mark.parametrize(
    "path, message",
    [
        ("/none.png", "answers 404"),
        ("/to/file:///etc/passwd", "answers 302"),
        ("/to/ftp://127.0.0.1/x.png", "cannot be fetched"),
        ("/to//", "answers 404"),
    ],
)
def test_what_is_no_image_there(address: str, path: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(RemoteImage(address + path))
    assert message in caught.value.message
    assert f"{address}{path}" in caught.value.message  # the address as it was typed
    assert len(caught.value.message) < 300


def test_bounds(address: str) -> None:
    with pytest.raises(ImageError, match="has more than 50 bytes"):
        RemoteImage(f"{address}/3.png", limit=50).read()
    with pytest.raises(ImageError, match=r"was not there within 1e-06 s|cannot be fetched"):
        RemoteImage(f"{address}/3.png", seconds=1e-6).read()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://[::1/x.png", "http:///x.png", "http://x y/"]
)
def test_addresses_that_lead_nowhere(url: str) -> None:
    with pytest.raises(ImageError, match="cannot be fetched"):
        RemoteImage(url).read()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y.png", "data://x", "s3://bucket/x.png"])
def test_other_kinds_of_addresses(url: str) -> None:
    assert is_address(url)
    with pytest.raises(ImageError, match="over http and https only") as caught:
        RemoteImage(url)
    assert url in caught.value.message


@pytest.mark.parametrize("path", ["a.png", "./http:/x", "/a://b", "a/b://c"])
def test_paths_are_no_addresses(path: str) -> None:
    assert not is_address(path)
