"""The programs of a model card."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def card_programs(card: str, language: str) -> list[str]:
    """The bodies of its blocks in a language."""
    return [body for name, body in _BLOCK.findall(card) if name == language]
