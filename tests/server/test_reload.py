"""Bundles that change under a running server: not one request fails, and what is broken is not served."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.asgi import application
from tests.helpers.bundles import WEIGHT, answer, write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.live_server import (
    PATIENCE,
    Asking,
    Live,
    binary_request,
    held,
    json_request,
    logits_of,
    scaled,
    serving,
)
from tests.helpers.processes import wait_for
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.images import decode
from vitdeploy.server import served_model

INFER = "/v2/models/linear/infer"
PIXELS = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
REQUEST = binary_request(PIXELS)
RELOADING = ("--reload-seconds", 0.1)


def factor(live: Any) -> float:
    """How many times the linear classifier's logits the server gives."""
    logits = logits_of(live.ask("POST", INFER, REQUEST.body, **REQUEST.headers))
    found = float((logits / answer(PIXELS)).mean())
    assert np.allclose(logits, found * answer(PIXELS), rtol=1e-3, atol=1e-3)
    return round(found, 3)


def replace(target: Path, source: Path) -> None:
    """Put a copy of another bundle in its place, at once, as an export does."""
    made = Bundle.open(source)
    with BundleWriter(target, force=True) as writer:
        for name in made.manifest.files:
            shutil.copyfile(source / name, writer.file(name))
        writer.seal(made.manifest)
        writer.commit()


def put(target: Path, source: Path) -> None:
    """Put a copy of another bundle in the place of whatever is there, which need not be a bundle."""
    made = shutil.copytree(source, target.with_name("next"))
    (made / "manifest.json").touch()
    shutil.rmtree(target)
    made.rename(target)


def loads(live: Live, outcome: str, model: str = "linear") -> float:
    """How many loads of the model ended so."""
    wanted = f'vitdeploy_loads_total{{model="{model}",outcome="{outcome}",version="1"}} '
    lines = live.ask("GET", "/metrics").body.decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted)), 0.0)


@pytest.fixture
def own(linear: Path, tmp_path: Path) -> Path:
    """A copy of the linear classifier that a test may change."""
    return Path(shutil.copytree(linear, tmp_path / "served" / "linear.bundle"))


@pytest.mark.slow
def test_replaced_again_and_again_under_load(own: Path, tmp_path: Path) -> None:
    """Every answer is the old bundle's or the new one's, and never the old one's after the new one's."""
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    sources = [scaled(tmp_path / f"{times:g}.bundle", times) for times in factors]
    over = threading.Event()
    seen: list[list[float]] = []
    errors: list[BaseException] = []

    def work() -> None:
        mine: list[float] = []
        seen.append(mine)
        try:
            with server.client() as client:
                while not over.is_set():
                    mine.append(factor(client))
        except BaseException as error:
            errors.append(error)

    with serving(own, *RELOADING, "--max-delay-ms", 3) as server:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            for times, source in zip(factors[1:], sources[1:], strict=True):
                assert wait_for(lambda: len(seen) == len(threads) and all(seen), PATIENCE)
                replace(own, source)
                assert wait_for(lambda: errors or all(times in mine for mine in seen), PATIENCE)  # noqa: B023
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not errors, errors
        assert loads(server, "ok") == 6
        assert loads(server, "failed") == 0
    for mine in seen:
        assert set(mine) == set(factors)
        assert mine == sorted(mine)


@pytest.mark.slow
def test_a_bundle_that_is_removed_is_served_on(own: Path, twice: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(own, tmp_path / "other.bundle"))
    with serving(own, other, *RELOADING) as server:
        shutil.rmtree(own)
        replace(other, twice)  # which is looked at after the one that is gone
        assert wait_for(lambda: loads(server, "ok", "other") == 2, PATIENCE)
        assert factor(server) == 1
        assert server.ask("GET", "/v2/health/ready").status == 200
        shutil.copytree(twice, own.with_name("next")).rename(own)
        assert wait_for(lambda: factor(server) == 2, PATIENCE)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def half_a_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])


def no_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "manifest.json").touch()


def another_model(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    (folder / "manifest.json").touch()


def wrong_weights(folder: Path) -> None:
    shutil.rmtree(folder)
    write_bundle(folder, weight=(WEIGHT * 1.01).astype(np.float32))


def no_onnx(folder: Path) -> None:
    """Sealed and sound, but what is in it does not run."""
    made = Bundle.open(folder)
    with BundleWriter(folder, force=True) as writer:
        shutil.copyfile(folder / "golden.safetensors", writer.file("golden.safetensors"))
        writer.file("model.onnx").write_bytes(b"\x08\x0a" + b"\xff" * 1000)
        writer.seal(made.manifest)
        writer.commit()


def no_golden(folder: Path) -> None:
    shutil.rmtree(folder)
    write_bundle(folder, golden={})


BREAKAGES = [no_manifest, half_a_manifest, no_model, another_model, wrong_weights, no_onnx, no_golden]


@pytest.fixture(scope="module")
def reloading(linear: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Path]]:
    folder = Path(shutil.copytree(linear, tmp_path_factory.mktemp("reloading") / "linear.bundle"))
    with serving(folder, *RELOADING) as server:
        yield server, folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", BREAKAGES, ids=[function.__name__ for function in BREAKAGES])
def test_a_broken_bundle_leaves_the_old_one_in_service(
    reloading: tuple[Live, Path], linear: Path, twice: Path, damage: Callable[[Path], None]
) -> None:
    server, folder = reloading
    with server.watched():
        put(folder, linear)
        assert wait_for(lambda: factor(server) == 1, PATIENCE)
        before = loads(server, "failed")
        damage(folder)
        assert wait_for(lambda: loads(server, "failed") > before, PATIENCE)
        assert factor(server) == 1
        assert server.ask("GET", "/v2/health/ready").status == 200
        assert "linear" in server.said()
        put(folder, twice)
        assert wait_for(lambda: factor(server) == 2, PATIENCE)  # it still looks


@pytest.mark.slow
def test_an_export_that_replaces_the_bundle(digits: Path, tmp_path: Path) -> None:
    """As the user does it: ``vitdeploy export --force`` while the server runs."""
    folder = Path(shutil.copytree(digits, tmp_path / "served" / "digits.bundle"))
    with serving(folder, *RELOADING) as server:
        digest = server.ask("GET", "/v2/models/digits").document["parameters"]["bundle_digest"]
        over = threading.Event()
        statuses: list[int] = []

        def work() -> None:
            request = json_request(np.zeros((1, 3, 32, 32), np.float32))
            with server.client() as client:
                while not over.wait(0.01):
                    statuses.append(client.ask("POST", "/v2/models/digits/infer", request.body).status)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            result = in_a_process(
                "export", "-m", "digits", "-o", folder, "--fp32", "--batch", "1,4,16", "--force"
            )
            assert result.code == 0, result.err
            assert statuses, "nothing was asked meanwhile"

            def replaced() -> bool:
                found = server.ask("GET", "/v2/models/digits").document["parameters"]["bundle_digest"]
                return bool(found != digest)

            assert wait_for(replaced, PATIENCE)
            assert wait_for(lambda: len(statuses) > 50, PATIENCE)
        finally:
            over.set()
            thread.join(PATIENCE)
        assert server.ask("GET", "/v2/models/digits/config").document["max_batch_size"] == 16
    assert set(statuses) == {200}


@pytest.mark.parametrize("change", ["unload", "load"])
def test_an_image_that_is_being_decoded_is_finished(
    linear: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its model before it asks for a session."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    decoding, may_go_on = threading.Event(), threading.Event()

    def load_image(*arguments: Any) -> Any:
        decoding.set()
        assert may_go_on.wait(PATIENCE)
        return decode.load_image(*arguments)

    monkeypatch.setattr(served_model, "load_image", load_image)

    async def main() -> None:
        async with application(linear) as served:
            asked = asyncio.create_task(served.ask("POST", "/v1/models/linear:predict", file.getvalue()))
            assert await asyncio.to_thread(decoding.wait, PATIENCE)
            assert (await served.ask("POST", f"/v2/repository/models/linear/{change}")).status == 200
            assert not asked.done()
            may_go_on.set()
            reply = await asked
            assert reply.status == 200, reply
            assert len(reply.document["predictions"][0]) == 5

    asyncio.run(main())


@pytest.mark.slow
def test_unloading_under_load_finishes_what_was_accepted(linear: Path) -> None:
    with held(linear, "--timeout", "10m") as (server, gate):
        running = Asking(server, REQUEST)
        gate.require_reached()
        waiting = Asking(server, REQUEST, 4)
        server.require_queued(4)
        assert server.ask("POST", "/v2/repository/models/linear/unload", b"{}").status == 200
        refused = server.ask("POST", INFER, REQUEST.body, **REQUEST.headers)
        assert refused.status == 503
        assert "unavailable model: 'linear': unloaded" in refused.error
        gate.open()
        for reply in (*running.replies(), *waiting.replies()):
            assert np.allclose(logits_of(reply), answer(PIXELS), rtol=1e-4, atol=1e-4)
        assert server.ask("POST", "/v2/repository/models/linear/load", b"{}").status == 200
        assert factor(server) == 1
