"""Which size an image goes into."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.config import Size
from vitdeploy.errors import UsageError
from vitdeploy.images.fitting import fit, parse_rule

EDGE = st.integers(1, 5000)
SIZE = st.tuples(EDGE, EDGE)
SIZES = st.lists(SIZE, min_size=1, max_size=6, unique=True)
THREE = [(224, 224), (384, 384), (518, 336)]


@pytest.mark.parametrize(
    "image, by_aspect, by_area",
    [
        ((480, 640), (384, 384), (518, 336)),
        ((250, 250), (224, 224), (224, 224)),
        ((2000, 2000), (384, 384), (518, 336)),
        ((900, 600), (518, 336), (518, 336)),
        ((90, 60), (518, 336), (224, 224)),
        ((600, 900), (384, 384), (518, 336)),
    ],
)
def test_the_nearest_shape_first_or_the_nearest_area(image: Size, by_aspect: Size, by_area: Size) -> None:
    assert fit(image, THREE) == by_aspect
    assert fit(image, THREE, "area") == by_area


@pytest.mark.slow
@given(SIZE, SIZES)
def test_no_other_size_is_nearer(image: Size, sizes: list[Size]) -> None:
    def shape(size: Size) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(image[0] / image[1]))

    def area(size: Size) -> float:
        return abs(math.log(math.prod(size)) - math.log(math.prod(image)))

    rounding = 1e-9
    chosen, by_area = fit(image, sizes), fit(image, sizes, "area")
    assert chosen in sizes
    assert by_area in sizes
    assert area(by_area) <= min(map(area, sizes)) + rounding
    assert shape(chosen) <= min(map(shape, sizes)) + rounding
    alike = [size for size in sizes if size[0] * chosen[1] == size[1] * chosen[0]]
    assert area(chosen) <= min(map(area, alike)) + rounding


@pytest.mark.slow
@given(SIZE, SIZES)
def test_one_size_is_taken_for_every_image(image: Size, sizes: list[Size]) -> None:
    assert fit(image, sizes[:1]) == fit(image, sizes[:1], "area") == sizes[0]
    assert [fit(image, sizes, size) for size in sizes] == sizes


@given(SIZE, SIZE)
def test_what_lies_as_far_on_both_sides_goes_to_the_earlier_size(image: Size, other: Size) -> None:
    """Exactly as far, where logarithms would round."""
    (h, w), (a, b) = image, other
    taller, wider = (h * a, w * b), (h * b, w * a)  # of the aspect ratios h/w * a/b and h/w * b/a
    assert fit(image, [taller, wider]) == taller
    assert fit(image, [wider, taller]) == wider


def test_an_image_of_one_of_the_sizes_keeps_it() -> None:
    assert [fit(size, THREE) for size in THREE] == THREE


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no image size 448x448") as caught:
        fit((10, 10), THREE, (448, 448))
    assert caught.value.hint == "the bundle has 224x224, 384x384, 518x336"


@pytest.mark.slow
@given(SIZE)
def test_a_rule_is_read_back(size: Size) -> None:
    height, width = size
    assert parse_rule(f"{height}x{width}") == size
    assert parse_rule(f" {height}X{width} ") == size
    assert parse_rule(str(height)) == (height, height)


@given(st.text(max_size=12))
def test_any_text_is_a_rule_or_one_line(text: str) -> None:
    try:
        rule = parse_rule(text)
    except UsageError as error:
        assert "\n" not in error.message  # noqa: PT017
    else:
        assert rule in ("aspect", "area") or min(rule) > 0


@pytest.mark.parametrize("text", ["", "0", "0x5", "5x0", "x", "5x", "5x5x5", "-5", "1e3", "aspekt", "123456"])
def test_no_rule(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rule(text)
