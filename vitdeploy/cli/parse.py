"""Flag values that are more than a word or a number."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Literal

from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import UsageError


def command_line() -> str:
    """What was typed, with the program's plain name."""
    return shlex.join(["vitdeploy", *sys.argv[1:]])


def names(text: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` as names, each once; None where the flag is not given.

    Raises:
        UsageError: there is no name in it.
    """
    if text is None:
        return None
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise UsageError(f"{text!r} names nothing", hint="separate names by commas")
    return found


def backends(text: str | None, provider: str | None) -> tuple[str, ...] | None:
    """``--backend`` as names; without it, a provider asks for the one backend that has providers."""
    return names(text) or (("onnxruntime",) if provider else None)


def integers(text: str, flag: str) -> tuple[int, ...]:
    """``"1,8,32"`` as positive integers.

    Raises:
        UsageError: names the flag.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise UsageError(f"{flag} {text}: not a list of positive whole numbers", hint=f"{flag} 1,8,32")
    return tuple(int(part) for part in parts)


def batch_range(text: str) -> BatchRange:
    """``"1,8,32"`` as the least, optimal and largest batch size; ``"8"`` as a fixed one.

    Raises:
        UsageError: neither one number nor three that rise.
    """
    sizes = integers(text, "--batch")
    if len(sizes) not in (1, 3):
        raise UsageError(
            f"--batch {text}: {len(sizes)} numbers, but it takes MIN,OPT,MAX or one fixed size",
            hint="--batch 1,8,32, or --batch 8",
        )
    return BatchRange(*(sizes * 3 if len(sizes) == 1 else sizes))


def profiles(texts: Sequence[str] | None) -> tuple[BatchRange, ...]:
    """``["1,1,1", "2,8,64"]`` as batch ranges.

    Raises:
        UsageError: one that is not three numbers that rise.
    """
    found = []
    for text in texts or ():
        sizes = integers(text, "--profile")
        if len(sizes) != 3:
            raise UsageError(f"--profile {text}: {len(sizes)} numbers", hint="--profile MIN,OPT,MAX")
        found.append(BatchRange(*sizes))
    return tuple(found)


def byte_count(text: str | None, flag: str) -> int | None:
    """``"512M"`` or ``"4G"`` in bytes, K being 1024.

    Raises:
        UsageError: neither; names the flag.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,12})([KMG])?(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{flag} {text}: not a size", hint=f"{flag} 512M, or 4G")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[(match[2] or "").upper()]


def image_sizes(text: str | None) -> tuple[Size, ...]:
    """``"384"``, ``"224x384"`` (height, width) or several, ``"224,384"``, in pixels; none where not given.

    Raises:
        UsageError: one is neither.
    """
    if text is None:
        return ()
    examples = "384, 224x384 (HxW), or 224,384"
    found = [_pixels(part.strip() or text, "--image-size", examples) for part in text.split(",")]
    return tuple((pixels, pixels) if isinstance(pixels, int) else pixels for pixels in found)


def numbers(text: str | None, flag: str) -> tuple[float, ...] | float | None:
    """``"0.485,0.456,0.406"`` as numbers, ``"0.5"`` as one.

    Raises:
        UsageError: neither; names the flag.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} {text}: not numbers", hint=f"{flag} 0.485,0.456,0.406, or 0.5") from error
    return values if len(values) > 1 else values[0]


def resize(text: str | None) -> int | Size | Literal["exact", "none"] | None:
    """``"256"``, the shorter side, ``"256x224"`` (height, width), ``"exact"`` or ``"none"``.

    Raises:
        UsageError: none of them.
    """
    if text is None:
        return None
    words: dict[str, Literal["exact", "none"]] = {"exact": "exact", "none": "none"}
    return words.get(text) or _pixels(text, "--resize", "256, 256x224 (HxW), exact or none")


def crop(text: str | None) -> float | int | Size | None:
    """``"0.875"``, the share that is kept, or ``"224"`` or ``"224x320"`` in pixels.

    Raises:
        UsageError: neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"0?\.[0-9]{1,6}|1\.0*", text.strip()):
        return float(text)
    return _pixels(text, "--crop", "0.875, or 224")


def _pixels(text: str, flag: str, examples: str) -> int | Size:
    match = re.fullmatch(r"([0-9]{1,5})(?:[xX×]([0-9]{1,5}))?", text.strip())
    if match is None or int(match[1]) == 0 or int(match[2] or 1) == 0:
        raise UsageError(f"{flag} {text}: not a size in pixels", hint=f"{flag} {examples}")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def duration(text: str, flag: str = "--budget") -> float:
    """``"90"``, ``"90s"`` or ``"5m"`` in seconds.

    Raises:
        UsageError: none of them; names the flag.
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(s|m|h)?", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{flag} {text}: not a duration", hint=f"{flag} 90s, or 5m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


def percentage(text: str, flag: str) -> float:
    """``"5%"`` or ``"0.05"`` as 0.05.

    Raises:
        UsageError: neither, or not between 0 and 1; names the flag.
    """
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*(%)?", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise UsageError(f"{flag} {text}: not a share", hint=f"{flag} 5%")
    return value
