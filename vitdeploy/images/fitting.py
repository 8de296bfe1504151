"""Which of a model's image sizes an image goes into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from vitdeploy.config import Size, size_name
from vitdeploy.errors import UsageError

Rule = Literal["aspect", "area"] | Size
"""How a size is chosen; a size itself is taken for every image."""
DEFAULT_RULE: Rule = "aspect"


def fit(image: Size, sizes: Sequence[Size], rule: Rule = DEFAULT_RULE) -> Size:
    """Return the size for an image.

    Ratios are compared, so that half as much is as far as twice as much. What is equally near goes to the
    earlier of ``sizes``.

    Args:
        image: its height and width, each at least 1; upright, where the preprocessing turns it so.
        sizes: to choose from; at least one.
        rule: ``"aspect"``, the nearest aspect ratio and of several such the nearest area; ``"area"``, the
            nearest area whatever its shape; or one of ``sizes``.

    Raises:
        UsageError: the rule is a size that is not among them.
    """
    if not isinstance(rule, str):
        return require_size(rule, sizes)
    if rule == "area":
        return min(sizes, key=lambda size: _apart(_area(size), _area(image)))
    return min(
        sizes, key=lambda size: (_apart(Fraction(*size), Fraction(*image)), _apart(_area(size), _area(image)))
    )


def require_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the size, which must be among ``sizes``.

    Raises:
        UsageError: it is not; names those that are.
    """
    if size not in sizes:
        known = ", ".join(map(size_name, sizes)) or "none"
        raise UsageError(f"there is no image size {size_name(size)}", hint=f"the bundle has {known}")
    return size


def parse_rule(text: str) -> Rule:
    """Read ``"aspect"``, ``"area"``, ``"384"`` or ``"384x512"`` (height x width).

    Raises:
        UsageError: none of them.
    """
    words: dict[str, Rule] = {"aspect": "aspect", "area": "area"}
    if text in words:
        return words[text]
    match = re.fullmatch(r"([0-9]{1,5})(?:[xX×]([0-9]{1,5}))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not height or not width:
        message = f"{text[:40]!r} says no size for images"
        raise UsageError(message, hint="aspect, area, or a size of the bundle (HxW)")
    return height, width


def rule_name(rule: Rule) -> str:
    """The text that ``parse_rule`` reads as this rule."""
    return rule if isinstance(rule, str) else size_name(rule)


def _area(size: Size) -> Fraction:
    return Fraction(size[0] * size[1])


def _apart(one: Fraction, other: Fraction) -> Fraction:
    """How many times larger the larger one is: |log| of the ratio orders the same, and would be rounded."""
    return max(one / other, other / one)
