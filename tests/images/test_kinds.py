"""Which kinds of files are read: AVIF by Pillow itself, HEIC with an extra, and the others by their names."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from vitdeploy.errors import ImageError
from vitdeploy.images import kinds
from vitdeploy.images.decode import find_images, load_image

HEIC_HEAD = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40)
"""ISO 23008-12: a file type box with the brand of HEVC still images."""


def picture() -> Image.Image:
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (48, 32), Image.Resampling.BICUBIC
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_what_pillow_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    path.write_bytes(saved(picture(), "AVIF", quality=90))
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected)
    assert np.abs(expected.astype(int) - np.asarray(picture())).mean() < 8  # and it is the picture
    assert find_images([tmp_path]) == [path]


def test_a_pillow_without_avif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.avif").write_bytes(HEIC_HEAD.replace(b"heic", b"avif"))
    monkeypatch.setattr(features, "modules", {})
    monkeypatch.setattr(kinds, "_has_avif", kinds._has_avif.__wrapped__)
    assert "AVIF" not in kinds.formats()
    with pytest.raises(ImageError, match="is not an image that can be read: it is an AVIF image"):
        load_image(tmp_path / "a.avif")
    with pytest.raises(ImageError, match=r"not read: 1 \.avif$"):
        find_images([tmp_path])


def test_heic_is_read_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library: what it opens is checked and converted as any other image."""
    path = tmp_path / "a.HEIC"
    path.write_bytes(HEIC_HEAD)
    stand_in = SimpleNamespace(HeifImageFile=lambda stream: picture() if stream.read() == HEIC_HEAD else None)
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    monkeypatch.setattr(kinds, "has_heif", lambda: True)
    np.testing.assert_array_equal(np.asarray(load_image(path, heif=True)), np.asarray(picture()))
    with pytest.raises(ImageError, match="too large"):
        load_image(path, max_pixels=100, heif=True)
    assert find_images([tmp_path]) == [path]
    # A decoder that is not Pillow's own is out of the reach of a server's clients.
    with pytest.raises(ImageError, match="it is a HEIC image"):
        load_image(path)


def test_heic_as_the_library_reads_it(tmp_path: Path) -> None:
    library = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    library.from_pillow(picture()).save(path, quality=95)
    expected = np.asarray(library.open_heif(path).to_pillow().convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(path, heif=True)), expected)
    assert np.abs(expected.astype(int) - np.asarray(picture())).mean() < 12
    with pytest.raises(ImageError, match="too large"):
        load_image(path, max_pixels=100, heif=True)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ImageError, match="damaged or cut short"):
        load_image(path, heif=True)


def test_heic_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(HEIC_HEAD)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    with pytest.raises(ImageError, match="is a HEIC image, which needs the library pillow-heif") as caught:
        load_image(path, heif=True)
    assert caught.value.hint == 'pip install "vitdeploy[heic]"'


@pytest.mark.parametrize(
    "unread, line",
    [
        ({}, ""),
        ({".jp2": 1, ".txt": 2, "": 1}, "not read: 1 .jp2, 3 other files"),
        ({".txt": 1}, "not read: 1 other file"),
        (
            {".jxl": 2, ".heic": 3},
            'not read: 3 .heic, 2 .jxl; for HEIC: pip install "vitdeploy[heic]"',
        ),
    ],
)
def test_what_was_not_read(unread: dict[str, int], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    assert kinds.unread_line(unread) == line


@pytest.mark.parametrize(
    "head, kind",
    [
        (HEIC_HEAD, "a HEIC image"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1avif", "an AVIF image"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isomavc1" + b"avif", None),  # a video; text behind the box
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"nothing", None),
        (b"", None),
    ],
)
def test_kinds_by_their_first_bytes(head: bytes, kind: str | None) -> None:
    assert kinds.kind_of(head) == kind
