"""Protobuf messages field by field, so that a reader can step over what it does not want to have in memory.

A message is a sequence of fields, each with its number and its kind before it, and its length where that
varies (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, BYTES = 0, 2
"""Kinds of field: a whole number; a length, and so many bytes."""
_FIXED = {1: 8, 5: 4}
"""Bytes of the kinds that have always as many."""
_LONGEST = 63
"""Bits of a number, without those of its last byte."""


class Field(NamedTuple):
    """Where a field begins, where its content does, and where that ends."""

    number: int
    kind: int
    begin: int
    content: int
    end: int


def fields(data: mmap.mmap, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message that lies between two places.

    Raises:
        ValueError, IndexError: there is none.
    """
    while begin < end:
        tag, content = _read_varint(data, begin)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, stop = _read_varint(data, content)
        elif kind == BYTES:
            length, content = _read_varint(data, content)
            stop = content + length
        else:
            stop = content + _FIXED.get(kind, end)
        if stop > end or not number:
            raise ValueError(f"no field at byte {begin}")
        yield Field(number, kind, begin, content, stop)
        begin = stop


def _read_varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """The number that begins at a place, and where it ends."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
        if shift > _LONGEST:
            raise ValueError(f"no number at byte {place}")


def varint(number: int) -> bytes:
    """A number as it is written, seven bits in a byte, the lowest first."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def header(number: int, length: int) -> bytes:
    """What comes before the bytes of a field."""
    return varint(number << 3 | BYTES) + varint(length)


def field_of(number: int, content: bytes) -> bytes:
    """A field with these bytes."""
    return header(number, len(content)) + content
