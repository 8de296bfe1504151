"""Image files become pixels beside the event loop: many in one hop, and each bit as the library has it."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.asgi import application
from tests.helpers.bundles import SPEC, random_image, write_bundle
from tests.helpers.clock import settled
from tests.helpers.live_server import PATIENCE
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.server import decoding as under_test
from vitdeploy.server.batcher import Batcher
from vitdeploy.server.decoding import Decoding


class Files:
    """Decodes to a file's length, while ``open`` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.threads: list[tuple[bytes, int]] = []
        """Every file, and the thread that decoded it."""

    def __call__(self, data: bytes) -> int | KeyError:
        self.threads.append((data, threading.get_ident()))
        assert self.open.wait(PATIENCE)
        if data == b"bad":
            raise ValueError("bad")
        return KeyError("kept") if data == b"error" else len(data)


class Counting(ThreadPoolExecutor):
    """Counts what it is given."""

    hops = 0

    def submit(self, *work: Any, **named: Any) -> Any:
        self.hops += 1
        return super().submit(*work, **named)


def with_decoding(
    test: Callable[[Decoding[int | KeyError], Files, Counting], Coroutine[Any, Any, None]], threads: int = 1
) -> None:
    async def main() -> None:
        files = Files()
        with Counting(4) as pool:
            try:
                async with asyncio.timeout(PATIENCE):
                    await test(Decoding(files, pool, threads), files, pool)
            finally:
                files.open.set()

    asyncio.run(main())


def test_what_waits_is_decoded_in_one_hop_in_its_order() -> None:
    async def test(decoding: Decoding[int | KeyError], files: Files, pool: Counting) -> None:
        first = decoding.decoded(b"x")
        await settled()
        waiting = [decoding.decoded(b"x" * count) for count in range(2, 30)]
        await settled()
        assert pool.hops == 1
        files.open.set()
        assert await asyncio.gather(first, *waiting) == list(range(1, 30))
        assert pool.hops == 2
        assert [len(data) for data, _ in files.threads] == list(range(1, 30))

    with_decoding(test)


def test_all_threads_are_busy() -> None:
    async def test(decoding: Decoding[int | KeyError], files: Files, pool: Counting) -> None:
        waiting = [decoding.decoded(b"x" * count) for count in range(1, 9)]
        await settled()
        assert pool.hops == 3
        files.open.set()
        assert await asyncio.gather(*waiting) == list(range(1, 9))
        assert pool.hops == 3
        assert sorted(len(data) for data, _ in files.threads) == list(range(1, 9))

    with_decoding(test, threads=3)


def test_large_files_are_not_held_up_by_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_TOGETHER", 10)

    async def test(decoding: Decoding[int | KeyError], files: Files, pool: Counting) -> None:
        files.open.set()
        sizes = [4, 4, 4, 30, 1, 9, 2]
        assert await asyncio.gather(*(decoding.decoded(b"x" * size) for size in sizes)) == sizes
        assert pool.hops == 4  # 4+4+4, 30, 1+9, 2

    with_decoding(test)


def test_what_is_cancelled_is_not_decoded_and_what_fails_fails_alone() -> None:
    async def test(decoding: Decoding[int | KeyError], files: Files, pool: Counting) -> None:
        running = decoding.decoded(b"running")
        await settled()
        gone, bad, good = decoding.decoded(b"gone"), decoding.decoded(b"bad"), decoding.decoded(b"good")
        gone.cancel()
        running.cancel()
        files.open.set()
        with pytest.raises(ValueError, match="bad"):
            await bad
        assert await good == 4
        assert isinstance(await decoding.decoded(b"error"), KeyError)  # that is what became of it
        assert [data for data, _ in files.threads] == [b"running", b"bad", b"good", b"error"]

    with_decoding(test)


def encoded(image: Image.Image, format: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def odd_files() -> list[bytes]:
    """Of every pixel type, and of sizes that are enlarged, reduced and cropped."""
    colour = random_image(3).resize((40, 30), Image.Resampling.BICUBIC)
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (30, 40), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [(colour.convert(mode), "PNG") for mode in ("RGB", "L", "LA", "RGBA", "P", "1")]
    kinds += [(colour.convert("CMYK"), "JPEG"), (colour.convert("L"), "JPEG"), (grey16, "PNG")]
    kinds += [(colour, format) for format in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    sizes = [(1, 1), (8, 8), (3, 200), (200, 3), (17, 9)]
    found = [encoded(image, format) for image, format in kinds]
    found += [encoded(random_image(4).resize(size), "JPEG", quality=95) for size in sizes]
    return [*found, encoded(colour, "JPEG", exif=exif)]


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_the_pixels_are_the_library_s(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and one after the other, in one request and in many."""
    folder, seen = write_bundle(tmp_path / "linear.bundle", kind=kind).root, list[np.ndarray[Any, Any]]()
    submit = Batcher.submit

    async def watched(self: Batcher, inputs: Any, timeout: float | None = None) -> Any:
        seen.append(inputs["pixel_values"])
        return await submit(self, inputs, timeout)

    monkeypatch.setattr(Batcher, "submit", watched)
    files = odd_files()
    wanted = [pixel_values(load_image(data), SPEC, kind) for data in files]  # type: ignore[arg-type]

    async def main() -> None:
        async with application(folder) as served:
            path = "/v1/models/linear:predict"
            for data, pixels in zip(files, wanted, strict=True):
                reply = await served.ask("POST", path, data)
                assert reply.status == 200, reply
                assert same(seen.pop(), pixels)
            await asyncio.gather(*(served.ask("POST", path, data) for data in files * 3))
            assert len(seen) == 3 * len(files)
            left = [pixels.tobytes() for pixels in wanted * 3]
            for found in seen:
                left.remove(found.tobytes())

    asyncio.run(main())


def same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return found.dtype == wanted.dtype and found.shape == (1, *wanted.shape) and (found[0] == wanted).all()
