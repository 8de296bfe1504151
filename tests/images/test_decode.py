"""Decoding: every kind of image that people have, and every kind of file that is none."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from vitdeploy.errors import ImageError
from vitdeploy.images.decode import MAX_PIXELS, load_image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


@pytest.fixture(autouse=True)
def _no_warning_gets_out() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((100, 100, 190, 163))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write. ``rows`` includes the filter bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def failure(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


# --- sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_source_gives_the_same_pixels(kind: str, photograph: Image.Image, tmp_path: Path) -> None:
    data = encoded(photograph, kind)
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    with path.open("rb") as stream, Image.open(path) as lazy:
        for source in (
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            stream,
            io.BytesIO(data),
            lazy,
        ):
            image = load_image(source)  # type: ignore[arg-type]
            assert type(image) is Image.Image
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), expected)
        assert not stream.closed


def test_a_stream_is_read_from_its_start_and_need_not_seek(photograph: Image.Image) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.stream = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return self.stream.readinto(buffer)

    data = encoded(photograph, "PNG")
    stream = io.BytesIO(data)
    stream.seek(20)
    assert np.array_equal(np.asarray(load_image(stream)), np.asarray(photograph))
    assert np.array_equal(np.asarray(load_image(Pipe(data))), np.asarray(photograph))  # type: ignore[arg-type]


def test_a_pillow_image_is_neither_changed_nor_closed(photograph: Image.Image) -> None:
    grey = photograph.convert("L")
    before = grey.tobytes()
    load_image(grey).paste((1, 2, 3), (0, 0, 90, 63))
    assert (grey.mode, grey.tobytes()) == ("L", before)
    copy = photograph.copy()
    load_image(copy).paste((1, 2, 3), (0, 0, 90, 63))
    assert copy.tobytes() == photograph.tobytes()


# --- kinds of pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    inks = np.zeros((16, 32, 4), dtype=np.uint8)
    inks[:, :16] = (255, 0, 0, 0)
    inks[:, 16:] = (0, 128, 255, 51)
    pixels = np.asarray(load_image(encoded(Image.frombytes("CMYK", (32, 16), inks.tobytes()), kind))).astype(
        int
    )
    for column, ink in ((4, inks[0, 0]), (28, inks[0, 31])):
        cyan_magenta_yellow, black = ink[:3] / 255, ink[3] / 255
        expected = 255 * (1 - cyan_magenta_yellow) * (1 - black)
        assert np.abs(pixels[8, column] - expected).max() <= 4  # JPEG is lossy


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 32767, 32768, 65278, 65407, 65535]])
    expected = np.floor(values / 65535 * 255 + 0.5)
    rows = b"\x00" + values.astype(">u2").tobytes()
    png16 = png(12, 1, 16, 0, rows)
    pgm16 = b"P5 12 1 65535\n" + values.astype(">u2").tobytes()
    tiff16 = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    for data in (png16, pgm16, tiff16):
        pixels = np.asarray(load_image(data))
        assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))
    assert np.array_equal(np.asarray(load_image(Image.fromarray(values.astype(np.uint16))))[..., 0], expected)


def test_16_bit_big_endian_tiff() -> None:
    values = np.array([[0, 257 * 7], [257 * 100, 65535]], dtype=np.uint16)
    tags = [
        (256, 3, 2),
        (257, 3, 2),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 3, 2),
        (279, 4, 8),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    data = b"MM\x00\x2a" + struct.pack(">I", 16) + values.astype(">u2").tobytes() + directory
    assert np.asarray(load_image(data))[..., 0].tolist() == [[0, 7], [100, 255]]


def test_16_bit_colour_and_alpha() -> None:
    values = np.array([[65535, 0, 32896], [257, 514, 771]], dtype=">u2")
    opaque = np.concatenate([values, [[65535], [0]]], axis=1).astype(">u2")
    for colour, samples in ((2, values), (6, opaque)):
        pixels = np.asarray(load_image(png(2, 1, 16, colour, b"\x00" + samples.tobytes())))
        assert pixels.tolist() == [[[255, 0, 128], [1, 2, 3]]]
    grey_alpha = np.array([65535, 0, 257, 65535], dtype=">u2")
    assert np.asarray(load_image(png(2, 1, 16, 4, b"\x00" + grey_alpha.tobytes())))[0, :, 0].tolist() == [
        255,
        1,
    ]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(kind: str) -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2, 1])
    pixels = np.asarray(load_image(encoded(image, kind)))
    assert pixels.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90], [40, 50, 60]]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    for source in (encoded(image, "PNG", transparency=transparency), image):
        assert np.asarray(load_image(source)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_dropped_not_blended(kind: str) -> None:
    pixels = np.array([[[200, 100, 50, 255], [200, 100, 50, 1], [30, 60, 90, 128]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(load_image(encoded(Image.fromarray(pixels), kind, **options)), pixels[..., :3])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_is_the_same_in_all_channels(mode: str) -> None:
    grey = Image.new("L", (16, 8))
    grey.putdata([255 * (i % 3 == 0) for i in range(128)])
    pixels = np.asarray(load_image(encoded(grey.convert(mode), "PNG")))
    assert pixels.shape == (8, 16, 3)
    if mode != "1":
        assert np.array_equal(pixels[..., 0], np.asarray(grey))
    assert set(np.unique(pixels)) <= {0, 255}
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_covers_the_whole_range(depth: int) -> None:
    row = {1: 0b01000000, 2: 0b00110110, 4: 0x0F}[depth]
    pixels = np.asarray(load_image(png(2, 1, depth, 0, bytes([0, row]))))[0, :, 0]
    assert pixels.tolist() == [0, 255]


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel(kind: str) -> None:
    pixels = np.asarray(load_image(encoded(Image.new("RGB", (1, 1), (255, 255, 255)), kind)))
    assert pixels.tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=others, **options)
    assert (np.asarray(load_image(data)) == (255, 0, 0)).all()


def test_a_telephones_jpeg_of_several_pictures() -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    pixels = np.asarray(load_image(encoded(first, "MPO", save_all=True, append_images=[second])))
    assert pixels.shape == (16, 16, 3)
    assert (pixels[..., 0] > 250).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode: str) -> None:
    image = Image.new(mode, (4, 4), 7)
    assert "32-bit" in failure(image).message
    error = failure(encoded(image, "TIFF"))
    assert "32-bit" in error.message
    assert "8 or 16 bits" in str(error.hint)


# --- what is no image --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_short_anywhere(kind: str, photograph: Image.Image, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(photograph, kind, **options)
    path = tmp_path / "photo.bin"
    for kept in (1, 2, 5, 17, 30, len(data) // 4, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:kept])
        assert str(path) in failure(path).message
        failure(data[:kept])


def test_a_truncated_jpeg_says_so(photograph: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    data = encoded(photograph, "JPEG")
    path.write_bytes(data[: len(data) // 2])
    error = failure(path)
    assert error.message.startswith(f"{path} is damaged or cut short: ")
    assert "again" in str(error.hint)


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"hello, I am no image\n" * 50, ""),
        (b"\x00" * 500, ""),
        (b"\x80\x04K*.", ""),
        (b"%PDF-1.7\n", ": it is a PDF document"),
        (b"<svg></svg>", ": it is an SVG drawing"),
        (b"\n<!DOCTYPE html><html>", ": it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": it is a Git LFS pointer, not the"),
    ],
)
def test_not_an_image(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    error = failure(path)
    assert error.message.startswith(f"{path} is not an image that can be read{kind}")
    assert kind or error.message.endswith("read")
    assert "JPEG, PNG" in str(error.hint)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_stay_closed(kind: str) -> None:
    data = encoded(Image.new("RGB", (32, 32)), kind)
    assert "not an image that can be read" in failure(data).message


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert failure(path).message == f"{path} is empty"
    assert "image of 0 bytes is empty" in failure(b"").message
    assert "image is empty" in failure(io.BytesIO()).message


def test_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jpg"
    assert failure(missing).message == f"{missing} cannot be read: No such file or directory"
    assert "Is a directory" in failure(tmp_path).message
    assert "File name too long" in failure("x" * 5000).message
    failure("a\0b.jpg")
    assert "\\n" in failure(tmp_path / "two\nlines.jpg").message


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3), dtype=np.uint8), io.StringIO("text")])
def test_other_objects(source: object) -> None:
    failure(source)


def test_an_array_is_refused_with_the_way_to_pass_it() -> None:
    error = failure(np.zeros((4, 4, 3), dtype=np.uint8))
    assert "ndarray" in error.message
    assert "fromarray" in str(error.hint)


def test_an_image_of_a_closed_file(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.save(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as image:
        pass
    failure(image)


def test_an_image_without_pixels() -> None:
    assert "0x7" in failure(Image.new("RGB", (0, 7))).message


@pytest.mark.parametrize(
    "width,height", [(9460, 9460), (13000, 13000), (60000, 60000), (2**31 - 1, 2**31 - 1)]
)
def test_decompression_bombs_are_not_decoded(width: int, height: int, tmp_path: Path) -> None:
    assert width * height > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 1, 0, bytes(100_000)))
    error = failure(path)
    assert error.message.startswith(f"{path} is too large to decode: ")
    assert f"{width}x{height}" in error.message or str(width * height) in error.message


def test_the_limit_holds_whatever_pillows_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "60000x60000" in failure(png(60000, 60000, 1, 0)).message


@pytest.mark.slow
def test_a_text_chunk_that_explodes_is_refused() -> None:
    body = b"Comment\x00\x00" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    failure(png(1, 1, 8, 0, b"\x00\x00", extra=chunk))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_bytes_give_an_image_or_our_error(kind: str, data: st.DataObject) -> None:
    image = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    content = bytearray(encoded(image, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    message = ""
    try:
        assert load_image(bytes(content)).mode == "RGB"
    except ImageError as error:
        message = error.message
    assert "\n" not in message
