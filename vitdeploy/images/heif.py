"""HEIC files, which phones write: read by pillow-heif, the extra ``heic``. The only file that imports it."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image

from vitdeploy.errors import ImageError
from vitdeploy.images.kinds import HEIF_EXTRA


def open_heif(stream: BinaryIO, name: str) -> Image.Image:
    """The image of a HEIC file, not yet decoded; always upright, as its decoder turns it.

    Nothing is registered with Pillow, so that what is read elsewhere stays what it was.

    Raises:
        ImageError: the library that reads it is not installed.
        OSError, SyntaxError: the file is damaged.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{name} is a HEIC image, which needs the library pillow-heif", hint=HEIF_EXTRA
        ) from error
    image: Image.Image = pillow_heif.HeifImageFile(stream)
    return image
