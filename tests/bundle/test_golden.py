"""The golden images: deterministic, distinct, at any size, and like what they are named after."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitdeploy.bundle.golden import GOLDEN_NAMES, golden_images, raw_images

SIZES = [(224, 224), (384, 224), (56, 98), (28, 28), (8, 8), (1, 1), (1, 9), (9, 1), (3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_twice_the_same(size: tuple[int, int]) -> None:
    images = golden_images(size)
    assert len(images) == len(GOLDEN_NAMES) == 8
    for image, again in zip(images, golden_images(size), strict=True):
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert np.array_equal(image, again)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) >= 8])
def test_no_two_are_the_same(size: tuple[int, int]) -> None:
    assert len({image.tobytes() for image in golden_images(size)}) == len(GOLDEN_NAMES)


@pytest.mark.parametrize("size", [(8, 8), (28, 56)])
def test_one_channel_is_the_grey_of_pillow(size: tuple[int, int]) -> None:
    for image, grey in zip(golden_images(size), golden_images(size, 1), strict=True):
        assert grey.shape == (*size, 1)
        assert np.array_equal(grey[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    assert len({image.tobytes() for image in golden_images(size, 1)}) == len(GOLDEN_NAMES)


@pytest.mark.parametrize("channels", [2, 4, 12, 50])
def test_no_two_channels_of_a_scene_are_the_same(channels: int) -> None:
    drawn = dict(zip(GOLDEN_NAMES, golden_images((16, 24), channels), strict=True))
    for name, image in drawn.items():
        assert image.shape == (16, 24, channels)
        assert image.dtype == np.uint8
        if name not in ("black", "white", "checkerboard", "bright_pixel"):
            assert len({image[..., channel].tobytes() for channel in range(channels)}) == channels
    assert np.array_equal(drawn["foliage"][..., :2], golden_images((16, 24))[2][..., :2])


def test_names_say_what_is_drawn() -> None:
    images = dict(zip(GOLDEN_NAMES, golden_images((64, 96)), strict=True))
    assert (images["black"] == 0).all()
    assert (images["white"] == 255).all()
    board = images["checkerboard"].astype(int)
    assert (np.abs(np.diff(board, axis=0)) == 255).all()
    assert (np.abs(np.diff(board, axis=1)) == 255).all()
    assert (images["bright_pixel"] == 255).sum() == 3
    assert images["bright_pixel"].sum() == 3 * 255
    assert abs(images["noise"].mean() - 127.5) < 3
    assert len(np.unique(images["noise"])) == 256


@pytest.mark.parametrize("name", ["landscape", "still_life", "foliage"])
def test_scenes_are_like_photographs(name: str) -> None:
    image = golden_images((224, 224))[GOLDEN_NAMES.index(name)].astype(float)
    assert image.std() > 30
    assert len(np.unique(image)) > 150
    # Neighbours resemble each other and colours differ, neither of which is true of noise.
    correlation = np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1]
    assert correlation > 0.9
    assert np.abs(np.diff(image.mean(axis=(0, 1)))).min() > 3


def test_a_scene_is_the_same_scene_at_another_size() -> None:
    for name in ("landscape", "still_life"):
        small, large = (golden_images((n, n))[GOLDEN_NAMES.index(name)].astype(float) for n in (32, 128))
        shrunk = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.7


def test_raw_images_have_other_sizes() -> None:
    first, second = raw_images()
    assert first.shape == (213, 320, 3)
    assert second.shape == (240, 97, 3)
    assert all(
        np.array_equal(image, again) for image, again in zip(raw_images(), (first, second), strict=True)
    )
