"""Kinds of image files: which are read, with what, and what the others are called.

The lists are explicit, because whoever sends an image reaches its decoder: a server's clients, too.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

from PIL import features

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What photographs come in, by Pillow's names. AVIF comes on top where Pillow itself has its decoder."""
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_AVIF = (".avif", ".avifs")
_HEIF = (".heic", ".heif", ".hif")
_OTHER_IMAGES = frozenset(
    (
        *(*_AVIF, *_HEIF, ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".jxl", ".jxr", ".wdp", ".svg", ".svgz"),
        *(".psd", ".xcf", ".eps", ".ico", ".icns", ".tga", ".dds", ".exr", ".hdr", ".qoi", ".pcx", ".sgi"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm", ".fits", ".pam", ".pfm"),
    )
)
"""Images that are left out of a folder where nothing here reads them; the rest are other files."""

HEIF_EXTRA = 'pip install "vitdeploy[heic]"'

# What a file is by its first bytes, where it is none that is read.
_SIGNATURES = (
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"<svg", "an SVG drawing"),
    (b"<!DOCTYPE html", "an HTML page"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
)
HEAD_BYTES = 64
"""What :func:`kind_of` looks at."""
HEIC = "a HEIC image"
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here."""
    return (*_FORMATS, "AVIF") if _has_avif() else _FORMATS


def suffixes() -> frozenset[str]:
    """How the names of files end that are looked for in a folder, in lower case."""
    return frozenset((*_SUFFIXES, *(_AVIF if _has_avif() else ()), *(_HEIF if has_heif() else ())))


def has_heif() -> bool:
    """Whether the library that reads HEIC files is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def _has_avif() -> bool:
    return "avif" in features.modules and bool(features.check_module("avif"))


def unread_line(unread: Mapping[str, int]) -> str:
    """What of a folder was not read, in one line; empty where everything was.

    Args:
        unread: numbers of files, by the end of their names in lower case.
    """
    images = {suffix: count for suffix, count in sorted(unread.items()) if suffix in _OTHER_IMAGES}
    others = sum(unread.values()) - sum(images.values())
    parts = [f"{count} {suffix}" for suffix, count in images.items()]
    if others:
        parts.append(f"{others} other file{'s' * (others > 1)}")
    missing = not has_heif() and any(suffix in images for suffix in _HEIF)
    return f"not read: {', '.join(parts)}{f'; for HEIC: {HEIF_EXTRA}' if missing else ''}" if parts else ""


def formats_hint() -> str:
    """What is read."""
    names = (*formats(), "HEIC") if has_heif() else formats()
    return f"images are read from {', '.join(names)} files"


def kind_of(head: bytes) -> str | None:
    """What a file is that Pillow does not know, by its first bytes; None where they say nothing."""
    if head[4:8] == b"ftyp":  # ISO 14496-12: its size, its name, the major brand, a version, other brands
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[place : place + 4] for place in range(8, end, 4)}
        if not brands.isdisjoint(_AVIF_BRANDS):
            return "an AVIF image"
        return None if brands.isdisjoint(_HEIF_BRANDS) else HEIC
    start = head.lstrip()
    return next((kind for signature, kind in _SIGNATURES if start.startswith(signature)), None)
