"""Image files: finding them, and decoding them to 8-bit RGB with every failure as one clear error."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitdeploy.errors import ImageError
from vitdeploy.images.kinds import (
    HEAD_BYTES,
    HEIC,
    formats,
    formats_hint,
    kind_of,
    suffixes,
    unread_line,
)

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | io.BufferedIOBase | Image.Image

_PILLOW = r"PIL\."
"""Its modules."""
MAX_PIXELS = 89_478_485
"""Largest image that is decoded or resized to: 256 MiB as RGB. Pillow itself only warns from here on."""


def find_images(paths: Iterable[str | os.PathLike[str]], unread: Counter[str] | None = None) -> list[Path]:
    """Return the image files that ``paths`` name, each once, in a stable order.

    A file is taken as it is, whatever its suffix; a directory is walked, its images sorted by path.
    Hidden files and directories inside it are left out.

    Args:
        unread: counts the files of directories that are left out, by suffix; see ``kinds.unread_line``.

    Raises:
        ImageError: a path does not exist, or a directory holds no image.
    """
    found: dict[Path, None] = {}
    unread = Counter() if unread is None else unread
    for path in map(Path, paths):
        if path.is_dir():
            images, others = _walk(path)
            unread.update(others)
            if not images:
                what = f"; {unread_line(others)}" if others else ""
                raise ImageError(f"no image in directory {_printable(path)}{what}", hint=formats_hint())
            found.update(dict.fromkeys(images))
        elif path.exists():
            found[path] = None
        else:
            raise ImageError(f"{_printable(path)} does not exist", hint="check the path")
    return list(found)


def _walk(directory: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a directory, and how many other files it has, by suffix."""

    def unreadable(error: OSError) -> NoReturn:
        raise ImageError(
            f"directory {_printable(error.filename)} cannot be read: {error.strerror}",
            hint="check its permissions",
        )

    images, others, wanted = list[Path](), Counter[str](), suffixes()
    for parent, directories, files in os.walk(directory, onerror=unreadable):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix in wanted:
                images.append(path)
            else:
                others[suffix] += 1
    return sorted(images), others


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, *, heif: bool = False) -> Image.Image:
    """Decode an image completely and return it as 8-bit RGB.

    Args:
        source: a path, the bytes of a file, a binary file object, or a Pillow image. JPEG, PNG, WebP, GIF,
            BMP, TIFF, PPM and, where Pillow has it, AVIF are read; of an animation, the first frame.
        max_pixels: no larger image is decoded.
        heif: whether HEIC files are read too, where the extra ``heic`` is installed. Its decoder is not
            Pillow's own, so servers leave it out of their clients' reach.

    Transparency is dropped, not blended, as ``convert("RGB")`` and so transformers' and timm's loaders do.
    16-bit grey is scaled to 8 bits. EXIF data stays with the image: ``apply`` turns it where its
    ``Preprocess`` says so.

    Raises:
        ImageError: it does not exist, is no image, is damaged or cut short, has a pixel type whose range is
            unknown, or has more than ``max_pixels`` pixels.
    """
    name = _describe(source)
    try:
        with _quiet(), _opened(source, name, heif) as image:
            _check_size(image, name, max_pixels)
            return _to_rgb(image, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]  # "Image size (N pixels) exceeds limit of M pixels"
        raise ImageError(f"{name} is too large to decode: {size}", hint="scale it down first") from error
    except Exception as error:  # a damaged file can raise anything from inside a decoder
        if isinstance(error, OSError) and error.strerror:  # from the operating system, not from a decoder
            raise ImageError(f"{name} cannot be read: {error.strerror}", hint="check the path") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} is damaged or cut short: {reason}", hint="copy it again, or save it again as PNG or JPEG"
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """Return ``image`` turned as its EXIF data says; as it is where that is missing or unreadable."""
    try:
        with _quiet():
            return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data can raise anything
        return image


def keep_quiet() -> None:
    """Keep back Pillow's warnings for good: in a process of our own, whose threads decode side by side."""
    warnings.filterwarnings("ignore", module=_PILLOW)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back Pillow's warnings: about sizes, which are checked here, and about harmless odd metadata.

    Only Pillow's: warning filters belong to the process, so threads that cross here could leave one behind.
    """
    if ("ignore", None, Warning, re.compile(_PILLOW), 0) in warnings.filters:
        yield
        return
    with warnings.catch_warnings():
        keep_quiet()
        yield


@contextmanager
def _opened(source: ImageSource, name: str, heif: bool) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        stream: BinaryIO
        if isinstance(source, Image.Image):
            yield source
            return
        if isinstance(source, (str, os.PathLike)):
            stream = stack.enter_context(Path(source).open("rb"))
        elif isinstance(source, (bytes, bytearray, memoryview)):
            stream = io.BytesIO(source)
        elif hasattr(source, "read"):
            stream = cast(BinaryIO, source) if source.seekable() else io.BytesIO(source.read())
        else:
            raise ImageError(
                f"cannot read an image from {type(source).__name__}",
                hint="pass a path, bytes, a binary file or a Pillow image (PIL.Image.fromarray(array))",
            )
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
        if not head:
            raise ImageError(f"{name} is empty", hint="copy or download it again")
        if heif and kind_of(head) == HEIC:
            from vitdeploy.images.heif import open_heif

            yield stack.enter_context(open_heif(stream, name))
            return
        try:
            image = Image.open(stream, formats=formats())
        except UnidentifiedImageError as error:
            what = f": it is {kind}" if (kind := kind_of(head)) else ""
            raise ImageError(f"{name} is not an image that can be read{what}", hint=formats_hint()) from error
        yield stack.enter_context(image)


def _check_size(image: Image.Image, name: str, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ImageError(
            f"{name} is too large to decode: {width}x{height} pixels exceed the limit of {limit} pixels",
            hint="scale it down first",
        )
    if width * height == 0:
        raise ImageError(f"{name} has no pixels: {width}x{height}", hint="save it again")


def is_deep_grey(path: str | os.PathLike[str]) -> bool:
    """Whether an image file has 16-bit grey, by a look at its header; False where it cannot be read."""
    try:
        with _quiet(), _opened(path, "", heif=False) as image:
            return _has_deep_grey(image)
    except Exception:  # as in load_image
        return False


def _has_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if _has_deep_grey(image):
        # Pillow's own conversion clips at 255, which leaves black and white.
        levels = (np.asarray(image).astype(np.uint32) + 128) // 257
        grey = Image.fromarray(levels.astype(np.uint8))
        grey.info = dict(image.info)  # EXIF
        return grey.convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ImageError(
            f"{name} has 32-bit {kind} as pixels, whose range is unknown", hint="save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def _describe(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return _printable(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return _printable(name) if isinstance(name, (str, os.PathLike)) else "image"


def _printable(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)
