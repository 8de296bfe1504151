"""Images to calibrate with are chosen evenly, others are held out, and what says nothing is refused."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pictures import picture, pictures
from vitdeploy.bundle.golden import golden_images
from vitdeploy.bundle.quantisation import CalibrationRecord
from vitdeploy.config import Preprocess
from vitdeploy.data import digits_folder
from vitdeploy.errors import ImageError, UsageError
from vitdeploy.images.preprocess import apply_uint8
from vitdeploy.quantisation.calibration import CalibrationImages, from_tensors, read_folder, roughness

SPEC = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("calibration"), 100)


@pytest.fixture(scope="module")
def images(folder: Path) -> CalibrationImages:
    return read_folder(folder, SPEC)


def test_forty_eight_images_are_chosen_evenly(folder: Path, images: CalibrationImages) -> None:
    assert (images.images.shape, images.held_out.shape) == ((32, 8, 8, 3), (16, 8, 8, 3))
    numbers = {digest(path): int(path.stem) for path in folder.iterdir()}
    chosen = sorted(numbers[text] for text in (*images.record.images, *images.record.held_out))
    assert chosen == [i * 100 // 48 for i in range(48)]
    held = [numbers[text] for text in images.record.held_out]
    assert held == sorted(held)
    assert all(5 <= later - earlier <= 8 for earlier, later in itertools.pairwise(held))


def test_no_held_out_image_is_calibrated_with(images: CalibrationImages) -> None:
    assert not set(images.record.images) & set(images.record.held_out)
    calibrated = {image.tobytes() for image in images.images}
    assert not calibrated & {image.tobytes() for image in images.held_out}


def test_pixels_are_those_of_the_preprocessing(folder: Path, images: CalibrationImages) -> None:
    paths = {digest(path): path for path in folder.iterdir()}
    for pixels, text in zip(images.held_out, images.record.held_out, strict=True):
        np.testing.assert_array_equal(pixels, apply_uint8(Image.open(paths[text]).convert("RGB"), SPEC))


def test_the_choice_is_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        shutil.copy(path, copied)
    assert read_folder(copied, SPEC).record == read_folder(folder, SPEC).record


def test_every_subfolder_takes_part(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / name).mkdir()
        for i in range(30):
            picture(1000 * number + i).save(tmp_path / name / f"{i:02d}.png")
    found = read_folder(tmp_path, SPEC)
    kinds = {digest(path): path.parent.name for path in tmp_path.rglob("*.png")}
    for part in (found.record.images, found.record.held_out):
        counts = [sum(kinds[text] == name for text in part) for name in ("cat", "dog", "emu")]
        assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("count, held_out", [(8, 2), (12, 4), (20, 6), (47, 15)])
def test_a_third_of_few_images_is_held_out(tmp_path: Path, count: int, held_out: int) -> None:
    found = read_folder(pictures(tmp_path / "few", count), SPEC)
    assert (len(found.images), len(found.held_out)) == (count - held_out, held_out)


def test_what_is_no_image_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, 8)
    (tmp_path / "notes.txt").write_text("no image")
    assert read_folder(tmp_path, SPEC).note == "not read: 1 other file"


def test_the_same_picture_twice_counts_once(tmp_path: Path) -> None:
    pictures(tmp_path, 10)
    for i in range(10):
        shutil.copy(tmp_path / f"{i:03d}.png", tmp_path / f"{i:03d}-copy.png")
        Image.open(tmp_path / f"{i:03d}.png").save(
            tmp_path / f"{i:03d}-again.bmp"
        )  # other bytes, same pixels
    found = read_folder(tmp_path, SPEC)
    assert len(found.images) + len(found.held_out) == 10
    assert len({image.tobytes() for image in (*found.images, *found.held_out)}) == 10


class TestRefusals:
    def test_few(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="has 7 images: too few to calibrate with") as caught:
            read_folder(pictures(tmp_path, 7), SPEC)
        assert "a folder with 48 or more typical images (at least 8)" in str(caught.value.hint)

    def test_all_alike(self, tmp_path: Path) -> None:
        for i in range(12):
            picture(3).save(tmp_path / f"{i}.png")
        with pytest.raises(UsageError, match="of 12 images, 1 differ where the model sees them"):
            read_folder(tmp_path, SPEC)

    def test_plain_colours(self, tmp_path: Path) -> None:
        for level in range(12):
            Image.new("L", (20, 20), 20 * level).save(tmp_path / f"{level}.png")
        with pytest.raises(UsageError, match="of 12 images, 0 are more than one plain colour"):
            read_folder(tmp_path, SPEC)

    @pytest.mark.parametrize("size", [(32, 32), (50, 70), (240, 320)], ids=str)
    def test_noise(self, tmp_path: Path, size: tuple[int, int]) -> None:
        random, spec = np.random.default_rng(0), Preprocess(size=(32, 32), mean=SPEC.mean, std=SPEC.std)
        for i in range(12):
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        with pytest.raises(UsageError, match="of 12 images, 12 are noise, whose pixels") as caught:
            read_folder(tmp_path, spec)
        assert caught.value.exit_code == 2
        assert len(f"{caught.value} {caught.value.hint}") - len(str(tmp_path)) < 400
        pictures(tmp_path, 13)  # more than half are pictures: these decide
        assert len(read_folder(tmp_path, spec).images) == 17

    def test_damaged(self, tmp_path: Path) -> None:
        pictures(tmp_path, 9)
        data = (tmp_path / "004.png").read_bytes()
        (tmp_path / "004.png").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=r"004\.png is damaged or cut short"):
            read_folder(tmp_path, SPEC)

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="no image in directory"):
            read_folder(tmp_path, SPEC)
        with pytest.raises(ImageError, match="does not exist"):
            read_folder(tmp_path / "nowhere", SPEC)


def test_pictures_are_no_noise() -> None:
    digits = [np.asarray(Image.open(path)) for path in sorted((digits_folder() / "images").rglob("*.png"))]
    assert max(roughness(pixels[..., None] if pixels.ndim == 2 else pixels) for pixels in digits) < 0.5
    scenes = golden_images((64, 64))
    assert max(map(roughness, scenes[:3])) < 0.5
    assert roughness(scenes[3]) == pytest.approx(1, abs=0.05)  # it is drawn as noise


@pytest.mark.slow
def test_real_images_are_no_noise(real_model_folder: Path) -> None:
    spec = Preprocess(size=(224, 224), mean=SPEC.mean, std=SPEC.std)
    found = read_folder(real_model_folder / "calibration", spec)
    assert max(roughness(pixels) for pixels in (*found.images, *found.held_out)) < 0.3


class TestKept:
    """What a bundle keeps of them serves the same model again."""

    def test_round_trip(self, images: CalibrationImages) -> None:
        again = from_tensors(images.tensors(), images.record, SPEC, Path("a.bundle"))
        np.testing.assert_array_equal(again.images, images.images)
        np.testing.assert_array_equal(again.held_out, images.held_out)
        assert again.record == images.record

    def test_another_size(self, images: CalibrationImages) -> None:
        other = Preprocess(size=(16, 8), mean=SPEC.mean, std=SPEC.std)
        with pytest.raises(UsageError, match="images are 8x8 with 3 channels, and the model reads 16x8"):
            from_tensors(images.tensors(), images.record, other, Path("a.bundle"))

    def test_other_channels(self, images: CalibrationImages) -> None:
        grey = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,))
        with pytest.raises(UsageError, match="with 3 channels, and the model reads 8x8 with 1"):
            from_tensors(images.tensors(), images.record, grey, Path("a.bundle"))

    @pytest.mark.parametrize("with_record", [True, False])
    def test_a_bundle_that_is_not_quantised(self, images: CalibrationImages, with_record: bool) -> None:
        record = images.record if with_record else None
        with pytest.raises(UsageError, match=r"a\.bundle: the bundle has no calibration images"):
            from_tensors({}, record, SPEC, Path("a.bundle"))


def test_grey_models(tmp_path: Path) -> None:
    found = read_folder(pictures(tmp_path, 8), Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,)))
    assert found.images.shape == (6, 8, 8, 1)


def test_a_record_is_of_hashes() -> None:
    with pytest.raises(ValueError, match="pattern"):
        CalibrationRecord(images=("cat.png",), held_out=("a" * 64,))
