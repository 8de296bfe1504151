"""Image files in, labels out: right ones get right answers, wrong ones the protocol's error."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.asgi import application
from tests.helpers.bundles import LABELS, answer_images, random_image, write_bundle
from tests.helpers.live_server import Live, Reply
from vitdeploy import load
from vitdeploy.data import digits_images
from vitdeploy.images import kinds

PATH = "/v1/models/linear:predict"
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(autouse=True)
def still_right(live: Live) -> Iterator[None]:
    yield
    image = random_image(99)
    require_right(live.ask("POST", PATH, encoded(image, "PNG")), image)


def encoded(image: Image.Image, format: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def require_right(reply: Reply, *images: Image.Image, top_k: int = 5) -> None:
    """The likeliest classes of each image, by the linear classifier in float64."""
    assert reply.status == 200, reply
    document = reply.document
    assert (document["model_name"], document["model_version"]) == ("linear", "1")
    assert len(document["predictions"]) == len(images)
    for found, scores in zip(document["predictions"], softmax(answer_images(list(images))), strict=True):
        order = np.argsort(-scores)[:top_k]
        assert [p["index"] for p in found] == order.tolist()
        assert [p["label"] for p in found] == [LABELS[index] for index in order]
        assert np.allclose([p["score"] for p in found], scores[order], rtol=1e-3, atol=1e-6)


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """(name, filename, data) as multipart/form-data."""
    text = b""
    for name, filename, data in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        text += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        text += data + b"\r\n"
    return text + f"--{BOUNDARY}--\r\n".encode()


def b64(*files: bytes) -> bytes:
    instances = [{"b64": base64.b64encode(data).decode()} for data in files]
    return json.dumps({"instances": instances}).encode()


@pytest.mark.parametrize("format", kinds.formats())
def test_raw_bodies_of_every_format(live: Live, format: str) -> None:
    data = encoded(random_image(1).resize((20, 30)), format)
    for kind in ("application/octet-stream", "image/jpeg", "text/nonsense", None):
        headers = {} if kind is None else {"Content_Type": kind}
        require_right(live.ask("POST", PATH, data, **headers), decoded(data))


def test_forms_and_base64(live: Live) -> None:
    images = [random_image(seed) for seed in range(5)]
    files = [encoded(image, "PNG") for image in images]
    parts = [("image", f"{number}.png", data) for number, data in enumerate(files)]
    require_right(live.ask("POST", PATH, form(*parts), Content_Type=FORM), *images)
    mixed = [("note", None, b"hello"), *parts, ("other", "x", files[0])]
    require_right(live.ask("POST", PATH, form(*mixed), Content_Type=FORM), *images, images[0])
    require_right(live.ask("POST", PATH, b64(*files), Content_Type="application/json"), *images)
    require_right(live.ask("POST", "/v1/models/linear/versions/1:predict", files[0]), images[0])


@pytest.mark.parametrize("top_k", [1, 3, 5, 1000])
def test_top_k(live: Live, top_k: int) -> None:
    image = random_image(2)
    reply = live.ask("POST", f"{PATH}?top_k={top_k}", encoded(image, "PNG"))
    require_right(reply, image, top_k=top_k)


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "", "1.5", "9" * 50, "%00", "\u00b2"])
def test_top_k_that_is_none(live: Live, top_k: str) -> None:
    from urllib.parse import quote

    reply = live.ask("POST", f"{PATH}?top_k={quote(top_k, safe='%')}", encoded(random_image(2), "PNG"))
    assert (reply.status, "top_k" in reply.error) == (400, True)


@pytest.mark.slow
def test_the_digits(live_digits: Live, digits: Path) -> None:
    """Real images, and the same answers as the library gives."""
    with load(digits) as predictor:
        for path in digits_images():
            data = path.read_bytes()
            found = live_digits.ask("POST", "/v1/models/digits:predict", data).document["predictions"][0]
            expected = predictor.predict(data)[0]
            assert [p["index"] for p in found] == [p.index for p in expected]
            assert [p["label"] for p in found] == [p.label for p in expected]
            assert np.allclose([p["score"] for p in found], [p.score for p in expected], rtol=1e-4)
            assert found[0]["index"] == int(path.name[0])


@pytest.mark.slow
def test_unusual_images_are_read_as_the_library_reads_them(live: Live, linear: Path) -> None:
    """CMYK, 16 bits, palettes, transparency, animations, EXIF, one pixel, extreme shapes."""
    colour = random_image(3).resize((40, 30))
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (30, 40), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [random_image(seed).resize((16, 16)) for seed in range(20)]
    files = {
        "cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "cmyk tiff": encoded(colour.convert("CMYK"), "TIFF"),
        "16 bit png": encoded(grey16, "PNG"),
        "palette": encoded(colour.convert("P"), "PNG"),
        "transparent": encoded(colour.convert("RGBA"), "PNG"),
        "two colours": encoded(colour.convert("1"), "PNG"),
        "animated gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "turned": encoded(colour, "JPEG", exif=exif),
        "one pixel": encoded(colour.resize((1, 1)), "PNG"),
        "a line": encoded(colour.resize((2000, 1)), "PNG"),
        "a column": encoded(colour.resize((1, 2000)), "PNG"),
    }
    with load(linear) as predictor:
        for name, data in files.items():
            reply = live.ask("POST", PATH, data)
            expected = predictor.predict(data)[0]
            assert reply.status == 200, (name, reply)
            found = reply.document["predictions"][0]
            assert [p["index"] for p in found] == [p.index for p in expected], name
            assert np.allclose([p["score"] for p in found], [p.score for p in expected], rtol=1e-4), name


def png() -> bytes:
    return encoded(random_image(4).resize((64, 64)), "PNG")


@pytest.mark.parametrize("data, words", [
    (b"", "is empty"),
    (b"junk", "is not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    (b"%PDF-1.7\n%...", "is not an image"),
    (b"PK\x03\x04" + bytes(100), "is not an image"),
    (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40), "it is a HEIC image"),
    (b"\x00\x00\x00\x18ftypavif\x00\x00\x00\x00mif1avif" + bytes(40), ""),
    (b"\xff\xd8\xff\xe0" + bytes(50), ""),
    (png()[:100], "damaged or cut short"),
    (encoded(random_image(4).resize((64, 64)), "JPEG")[:400], "damaged or cut short"),
    (encoded(random_image(4).resize((64, 64)), "WEBP")[:200], ""),
    (encoded(Image.new("F", (8, 8)), "TIFF"), "32-bit floats"),
    (encoded(random_image(4), "ICO"), "is not an image"),
    (b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, ""),
])  # fmt: skip
def test_no_images(live: Live, data: bytes, words: str) -> None:
    for body, kind, where in (
        (data, "image/jpeg", "the image: "),
        (form(("image", "cat.jpg", data)), FORM, "file 1 (cat.jpg): "),
        (b64(data), "application/json", "instances[0]: "),
    ):
        reply = live.ask("POST", PATH, body, Content_Type=kind)
        assert reply.status == 400, reply
        assert where in reply.error
        assert words in reply.error


def test_one_bad_file_among_good_ones_is_named(live: Live) -> None:
    parts = [("image", f"{n}.png", png() if n != 2 else png()[:200]) for n in range(4)]
    reply = live.ask("POST", PATH, form(*parts), Content_Type=FORM)
    assert (reply.status, "file 3 (2.png)" in reply.error) == (400, True)


def test_huge_images_are_refused_by_their_header(live: Live, strict: Live) -> None:
    """Nothing is decoded: memory stays where it was."""
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    import zlib

    for width, height in ((100_000, 100_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)):
        fields = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
        chunk = fields + zlib.crc32(b"IHDR" + fields).to_bytes(4, "big")
        data = header + chunk + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
        before = live.rss()
        reply = live.ask("POST", PATH, data)
        assert (reply.status, "too large" in reply.error) == (400, True), reply
        assert live.rss() - before < 20 * 1024
    reply = strict.ask("POST", PATH, encoded(random_image(0), "PNG"))
    assert "8x8 pixels exceed the limit of 63" in reply.error


@pytest.mark.parametrize("body, kind", [
    (b"", FORM),
    (b"junk", FORM),
    (form(), FORM),
    (form(("image", None, b"text")), FORM),
    (form(("image", "x", b"data"))[:-20], FORM),
    (form(("image", "x", b"data")), "multipart/form-data"),
    (form(("image", "x", b"data")), "multipart/form-data; boundary="),
    (form(("image", "x", b"data")), f"multipart/form-data; boundary={'b' * 300}"),
    (form(("image", "x", b"data")), f"multipart/form-data; charset=zlib; boundary={BOUNDARY}"),
    (form(("image", "x", b"data")), f"multipart/form-data; charset=undefined; boundary={BOUNDARY}"),
    (form(("image", "x\xff", b"data")), f"multipart/form-data; charset=\xff; boundary={BOUNDARY}"),
    (form(("image", "x", b"d")).replace(b"Content-Disposition", b"Content-Nothing"), FORM),
    (form(("image", "x", b"d")).replace(b"name=", b"eman="), FORM),
    (form(("image", "x" * 100_000, b"d")), FORM),
    (form(*[("field", None, b"x")] * 100), FORM),
    (form(("field", None, bytes(2**21))), FORM),
    (f"--{BOUNDARY}\r\n".encode() * 1000, FORM),
    (b"{}", "application/json"),
    (b"[]", "application/json"),
    (b'{"instances": []}', "application/json"),
    (b'{"instances": {}}', "application/json"),
    (b'{"instances": ["AAAA"]}', "application/json"),
    (b'{"instances": [{"b64": 5}]}', "application/json"),
    (b'{"instances": [{"b64": "\xc3\xa4"}]}', "application/json"),
    (b'{"instances": [{"b64": "A"}]}', "application/json"),
    (b'{"instances": [{"b64": "AA AA"}]}', "application/json"),
], ids=range(26))  # fmt: skip
def test_garbage_around_images(live: Live, body: bytes, kind: str) -> None:
    reply = live.ask("POST", PATH, body, Content_Type=kind)
    assert reply.status == 400, reply
    assert reply.error


def test_a_form_that_breaks_off(live: Live) -> None:
    """It is no form with one file less."""
    body = form(("image", "1.png", png()), ("image", "2.png", png()))
    for cut in (3, 50, len(png()) + 20):
        reply = live.ask("POST", PATH, body[:-cut], Content_Type=FORM)
        assert (reply.status, reply.error) == (400, "the form cannot be read: it has no end")


def test_too_many_images(live: Live) -> None:
    file = encoded(random_image(0), "PNG")
    for body, kind in (
        (form(*[("image", "x", file)] * 65), FORM),
        (b64(*[file] * 65), "application/json"),
    ):
        assert live.ask("POST", PATH, body, Content_Type=kind).status == 400
    reply = live.ask("POST", PATH, b64(*[file] * 64), Content_Type="application/json")
    require_right(reply, *[random_image(0)] * 64)


def test_bundles_that_take_no_images(tmp_path: Path) -> None:
    """Features are no classes, and without preprocessing there is no input."""
    features = write_bundle(tmp_path / "features.bundle", output="features").root
    blind = write_bundle(tmp_path / "blind.bundle", preprocess=None).root

    async def main() -> None:
        async with application(features, blind) as served:
            for name, words in (("features", "no classes"), ("blind", "preprocess")):
                reply = await served.ask("POST", f"/v1/models/{name}:predict", png())
                assert (reply.status, words in reply.error) == (400, True), reply
            assert (await served.ask("GET", "/v1/models")).document["models"] == ["blind", "features"]

    asyncio.run(main())
