"""A predictor of a bundle with several image sizes: every image where it fits, every tensor by its shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitdeploy
from tests.helpers.several_sizes import SIZES, answer, answer_image, preprocess, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Preprocess, Size
from vitdeploy.errors import ImageError, UsageError
from vitdeploy.images.preprocess import apply
from vitdeploy.predictor import Answer, Predictor

SMALL, LARGE, WIDE = SIZES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return several_sizes(tmp_path_factory.mktemp("sizes") / "linear.bundle", precisions=("fp32", "fp16"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


MIXED: list[tuple[Image.Image, Size]] = [
    (picture(9, 9), SMALL),
    (picture(40, 20), WIDE),
    (picture(50, 50), LARGE),
    (picture(20, 9), WIDE),
    (picture(20, 40), LARGE),
    (picture(8, 8), SMALL),
]
"""Images, and where they go."""


def test_each_image_goes_where_it_fits_and_is_answered_as_by_that_size_alone(bundle: Bundle) -> None:
    with Predictor.open(bundle) as predictor:
        answers = list(predictor.logit_answers(image for image, _ in MIXED))
        logits = predictor.logits([image for image, _ in MIXED])
        best = predictor.predict([image for image, _ in MIXED], top_k=1)
    assert len(answers) == len(MIXED)
    for (image, size), found, row, prediction in zip(MIXED, answers, logits, best, strict=True):
        expected = answer_image(image, size)
        assert isinstance(found, Answer)
        assert found.size == size
        np.testing.assert_allclose(found.row, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(row, found.row)
        assert prediction[0].index == int(np.argmax(expected))


def test_the_answers_are_those_of_a_bundle_of_that_size(bundle: Bundle, tmp_path: Path) -> None:
    with vitdeploy.load(bundle) as several:
        for index, size in enumerate(SIZES):
            alone = several_sizes(tmp_path / str(index), [size])
            images = [image for image, fits in MIXED if fits == size]
            with vitdeploy.load(alone) as single:
                np.testing.assert_array_equal(several.logits(images), single.logits(images))


@pytest.mark.slow
def test_a_photograph_is_turned_before_its_shape_is_looked_at(tmp_path: Path) -> None:
    lying = picture(20, 40)
    exif = lying.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees: wide
    lying.save(tmp_path / "turned.png", exif=exif)
    for exif_obeyed, size in ((False, LARGE), (True, WIDE)):
        bundle = several_sizes(tmp_path / str(exif_obeyed))
        specs = {size: Preprocess(size=size, exif=exif_obeyed) for size in SIZES}
        records = tuple(
            r.model_copy(update={"preprocess": specs[r.image_size]}) for r in bundle.manifest.sizes
        )
        with bundle.edit() as writer:
            writer.seal(bundle.manifest.model_copy(update={"preprocess": specs[SMALL], "sizes": records}))
            bundle = writer.commit()
        with Predictor.open(bundle) as predictor:
            (found,) = predictor.logit_answers([tmp_path / "turned.png"])
        assert isinstance(found, Answer)
        assert found.size == size


def test_tensors_go_by_their_shape(bundle: Bundle) -> None:
    random = np.random.default_rng(3)
    with Predictor.open(bundle) as predictor:
        for height, width in SIZES:
            inputs = random.normal(size=(11, 3, height, width)).astype(np.float32)
            for outputs in (predictor.run(inputs), predictor.outputs(inputs)["logits"]):
                np.testing.assert_allclose(outputs, answer(inputs), rtol=0, atol=1e-5)
        with pytest.raises(
            UsageError, match=r"no image size takes an input of the shape \(3, 9, 9\)"
        ) as caught:
            predictor.run(np.zeros((1, 3, 9, 9), np.float32))
    assert caught.value.hint == "the sizes are 8x8, 16x16, 8x16"


def test_two_sizes_of_one_shape_have_to_be_named(tmp_path: Path) -> None:
    """As patches are: a grid of 2 x 8 has as many rows as one of 4 x 4."""
    bundle = several_sizes(tmp_path / "b", [(8, 8), (4, 16)])
    flat = tuple(
        a.model_copy(update={"inputs": (a.inputs[0].model_copy(update={"shape": ("N", 192)}),)})
        for a in bundle.manifest.artifacts
    )
    with bundle.edit() as writer:
        writer.seal(bundle.manifest.model_copy(update={"artifacts": flat}))
        bundle = writer.commit()
    with (
        Predictor.open(bundle) as predictor,
        pytest.raises(UsageError, match=r"shape \(192\) may be of 8x8 or 4x16") as caught,
    ):
        predictor.run(np.zeros((1, 192), np.float32))
    assert caught.value.hint == "name the size"


def test_a_size_can_be_pinned(bundle: Bundle) -> None:
    image = picture(40, 20)
    for size in SIZES:
        for predictor in (vitdeploy.load(bundle, size=size), Predictor.open(bundle, fit=size)):
            with predictor:
                assert predictor.sizes == (size,)
                assert predictor.preprocess(image).shape == (3, *size)
                np.testing.assert_allclose(
                    predictor.logits(image)[0], answer_image(image, size), rtol=0, atol=1e-5
                )
    with pytest.raises(UsageError, match="no image size 9x9"):
        vitdeploy.load(bundle, size=9)


def test_one_size_of_several_is_a_predictor_of_its_own(bundle: Bundle) -> None:
    with Predictor.open(bundle) as predictor:
        one = predictor.at(WIDE)
        assert one is predictor.at(WIDE)
        assert one.at(WIDE) is one
        np.testing.assert_array_equal(one.preprocess(picture(9, 9)), apply(picture(9, 9), preprocess(WIDE)))
        with pytest.raises(UsageError):
            one.at(SMALL)
        with pytest.raises(UsageError):
            predictor.at((9, 9))
    with pytest.raises(UsageError, match="closed"):
        one.run(np.zeros((1, 3, *WIDE), np.float32))


def test_an_artifact_is_taken_at_every_size(bundle: Bundle) -> None:
    for wanted in ("fp16", "onnx-fp16"):
        with Predictor.open(bundle, artifact=wanted) as predictor:
            names = [predictor.at(size).session.facts.artifact for size in SIZES]
        assert names == ["onnx-fp16", "onnx-fp16-16x16", "onnx-fp16-8x16"]
    with Predictor.open(bundle, artifact="onnx-fp16-8x16") as predictor:
        assert predictor.sizes == (WIDE,)


def test_broken_images_stand_where_they_stood(bundle: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with Predictor.open(bundle) as predictor:
        found = list(predictor.logit_answers([picture(9, 9), broken, picture(40, 20)]))
    assert [isinstance(item, ImageError) for item in found] == [False, True, False]
    assert isinstance(found[2], Answer)
    assert found[2].size == WIDE


def test_the_wrong_size_would_be_seen(bundle: Bundle) -> None:
    """The planted fault: the tables of the sizes differ, so that no size answers for another."""
    for image, size in MIXED:
        for other in set(SIZES) - {size}:
            assert np.abs(answer_image(image, size) - answer_image(image, other)).max() > 1e-3
