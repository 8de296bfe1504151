"""``:explain``: the rollout of a served model, what is refused, and a process that fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitdeploy
from tests.helpers.asgi import application
from tests.helpers.live_server import Live
from tests.helpers.processes import wait_for
from vitdeploy.data import digits_images
from vitdeploy.errors import ImageError
from vitdeploy.server import explaining
from vitdeploy.server.explaining import MOST_WAITING, Explained, Explainer
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.messages import RequestError

PATH = "/v1/models/digits:explain"
STAND_IN = """
import base64, json, os, pathlib, sys, time
sys.stdin.readline()
for line in sys.stdin:
    asked = json.loads(line)
    what = base64.b64decode(asked["image"]).decode()
    kind, _, rest = what.partition(":")
    answer = {"rollout": [[len(what)]], "picture": "data:", "size": "1x1"}
    if kind == "error":
        answer = {"error": {"kind": rest, "message": "so it is", "hint": "do that"}}
    elif kind == "exit":
        os._exit(3)
    elif kind == "wait":
        pathlib.Path(rest, "reached").touch()
        while not pathlib.Path(rest, "open").exists():
            time.sleep(0.01)
    print(json.dumps(answer), flush=True)
"""
"""A process that does what the image says."""
COMMAND = (sys.executable, "-c", STAND_IN)
MODEL: Any = SimpleNamespace(
    name="m",
    bundle=SimpleNamespace(root=Path("/nowhere"), manifest=SimpleNamespace(model=object(), digest="d")),
)


def explained(work: Callable[[Explainer], Awaitable[None]], **settings: Any) -> None:
    """Run ``work`` with an explainer whose process is the stand-in."""

    async def main() -> None:
        explainer = Explainer(COMMAND, ModelSettings(**settings))
        try:
            await work(explainer)
        finally:
            await explainer.close()

    asyncio.run(main())


async def refused(explainer: Explainer, *images: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await explainer.explain(MODEL, images)
    return caught.value


@pytest.mark.slow
def test_of_a_served_model(live_digits: Live, digits: Path, tmp_path: Path) -> None:
    paths = digits_images()[:2]
    expected = vitdeploy.explain(digits, paths[0], html=tmp_path / "page.html").images[0].rollout
    data = paths[0].read_bytes()
    reply = live_digits.ask("POST", PATH, data)
    assert reply.status == 200, reply
    document = reply.document
    assert (document["model_name"], document["model_version"]) == ("digits", "1")
    (found,) = document["explanations"]
    assert expected is not None
    np.testing.assert_allclose(found["rollout"], expected, rtol=1e-4)
    assert found["image_size"] == "32x32"
    with Image.open(io.BytesIO(base64.b64decode(found["picture"].partition(",")[2]))) as picture:
        assert picture.size == (320, 320)
    both = {"instances": [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in paths]}
    again = live_digits.ask("POST", "/v1/models/digits/versions/1:explain", json.dumps(both).encode(),
                            Content_Type="application/json")  # fmt: skip
    assert again.status == 200, again
    assert again.document["explanations"][0] == found
    assert again.document["explanations"][1] != found
    wrong = live_digits.ask("POST", PATH, b"text")
    assert (wrong.status, wrong.error) == (
        400,
        "the image: image of 4 bytes is not an image that can be read",
    )
    counted = live_digits.ask("GET", "/v2/models/digits/stats").document["model_stats"][0]
    predicted = live_digits.ask("POST", "/v1/models/digits:predict", data)
    assert predicted.status == 200
    after = live_digits.ask("GET", "/v2/models/digits/stats").document["model_stats"][0]
    success = [c["inference_stats"]["success"]["count"] for c in (counted, after)]
    assert success[1] == success[0] + 1  # what is explained is no request of the sessions


def test_a_server_that_is_told_not_to(strict: Live) -> None:
    reply = strict.ask("POST", "/v1/models/linear:explain", b"image")
    assert (reply.status, reply.error) == (503, "this server shows no attention rollouts (--no-explain)")


def test_what_does_not_apply_is_said_without_a_process(linear: Path) -> None:
    async def main() -> None:
        path = "/v1/models/linear:explain"
        async with application(linear, explain=("this does not exist",)) as served:
            reply = await served.ask("POST", path, b"image")
            assert reply.status == 400
            assert "is a module of somebody's own" in reply.error
            missing = await served.ask("POST", PATH, b"image")
            assert missing.status == 404
            empty = await served.ask("POST", path, b'{"instances": []}', {"Content-Type": "application/json"})
            assert (empty.status, empty.error) == (400, "the request has no image")
        async with application(linear) as served:
            reply = await served.ask("POST", path, b"image")
            assert (reply.status, "--no-explain" in reply.error) == (503, True)

    asyncio.run(main())


def test_answers_errors_and_a_process_that_ends() -> None:
    async def work(explainer: Explainer) -> None:
        assert await explainer.explain(MODEL, [b"one", b"three"]) == [
            Explained([[3]], "data:", "1x1"),
            Explained([[5]], "data:", "1x1"),
        ]
        (error,) = await explainer.explain(MODEL, [b"error:ImageError"])
        assert isinstance(error, ImageError)
        for kind, expected in (
            ("UsageError", "invalid"),
            ("MissingDependency", "unavailable"),
            ("BundleError", "unavailable"),
            ("ExportError", "internal"),
        ):
            refusal = await refused(explainer, f"error:{kind}".encode())
            assert (refusal.kind, refusal.message) == (expected, "model 'm': so it is (do that)")
        died = await refused(explainer, b"exit:")
        assert (died.kind, died.message) == ("internal", "model 'm': the rollout ended with 3")
        assert (await explainer.explain(MODEL, [b"one"]))[0] == Explained([[3]], "data:", "1x1")

    explained(work)


def test_a_command_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        explainer = Explainer(("/no/such/program",), ModelSettings())
        assert "cannot be started" in (await refused(explainer, b"one")).message
        await explainer.close()

    asyncio.run(main())


def test_a_process_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "_PATIENCE", 0.2)

    async def work(explainer: Explainer) -> None:
        assert "gave no answer" in (await refused(explainer, f"wait:{tmp_path}".encode())).message

    explained(work)


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    """One is answered at a time; too many are refused, and so is who waits too long for its turn."""

    async def work(explainer: Explainer) -> None:
        many = await refused(explainer, *[b"one"] * (MOST_WAITING + 1))
        assert many.kind == "invalid"
        first = asyncio.ensure_future(explainer.explain(MODEL, [f"wait:{tmp_path}".encode()]))
        await asyncio.to_thread(wait_for, (tmp_path / "reached").exists, 60)
        second = asyncio.ensure_future(refused(explainer, b"one"))
        await asyncio.sleep(0)
        full = await refused(explainer, *[b"one"] * (MOST_WAITING - 1))
        assert (full.kind, full.retry_after) == ("overloaded", 1.0)
        late = await second
        assert (late.kind, late.message) == ("timeout", "no rollout could be begun within 0.2 s")
        (tmp_path / "open").touch()
        assert isinstance((await first)[0], Explained)
        assert len(await explainer.explain(MODEL, [b"one"] * MOST_WAITING)) == MOST_WAITING

    explained(work, timeout=0.2)


def test_who_goes_away_disturbs_nobody(tmp_path: Path) -> None:
    async def work(explainer: Explainer) -> None:
        first = asyncio.ensure_future(explainer.explain(MODEL, [f"wait:{tmp_path}".encode()]))
        await asyncio.to_thread(wait_for, (tmp_path / "reached").exists, 60)
        second = asyncio.ensure_future(explainer.explain(MODEL, [b"three"]))
        await asyncio.sleep(0)
        first.cancel()
        (tmp_path / "open").touch()
        assert await second == [Explained([[5]], "data:", "1x1")]
        with pytest.raises(asyncio.CancelledError):
            await first

    explained(work)


def test_the_end_of_the_server_ends_the_process(tmp_path: Path) -> None:
    async def work(explainer: Explainer) -> None:
        first = asyncio.ensure_future(refused(explainer, f"wait:{tmp_path}".encode()))
        await asyncio.to_thread(wait_for, (tmp_path / "reached").exists, 60)
        explainer.abandon()
        assert ((await first).kind, (await first).message) == ("unavailable", "the server is shutting down")
        assert (await refused(explainer, b"one")).kind == "unavailable"

    explained(work)


def test_a_process_that_nobody_asks_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "_IDLE", 0.01)
    ended = []
    original = explaining.Worker.close
    monkeypatch.setattr(explaining.Worker, "close", lambda self: ended.append(self.pid) or original(self))

    async def work(explainer: Explainer) -> None:
        await explainer.explain(MODEL, [b"one"])
        assert await asyncio.to_thread(wait_for, lambda: len(ended) == 1, 60)
        assert (await explainer.explain(MODEL, [b"one"]))[0] == Explained([[3]], "data:", "1x1")

    explained(work)
