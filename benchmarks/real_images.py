"""Images of two tasks, drawn from what scikit-learn and scikit-image carry: the same on every machine.

``crops``: which of 20 photographs a small grey crop is from; ``digits``: scikit-learn's handwritten digits.
Each image is 256 x 256 RGB, so that DINOv2's preprocessing cuts 224 x 224 out of it and resizes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""(height, width, 3)."""

SIDE = 256
TASKS = ("crops", "digits")
SPLITS: Mapping[str, int] = {"train": 0, "test": 1}
"""And what is drawn for them begins with."""
CROPS: Mapping[str, int] = {"train": 18, "test": 10}
"""Of each photograph."""
DIGITS: Mapping[str, slice] = {"train": slice(0, 400), "test": slice(400, 600)}
"""Of the shuffled digits."""
CALIBRATION = 24
"""Images of each task's training split."""
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)
"""In scikit-image's wheel; scikit-learn has two more."""

Labelled = tuple[str, Pixels]


def labels(task: str) -> list[str]:
    """The classes of a task, in the order of a model's outputs."""
    if task == "digits":
        return [str(digit) for digit in range(10)]
    return sorted(["china", "flower", *(name.split(".")[0] for name in PHOTOGRAPHS)])


def save_images(folder: Path, wheel: Path) -> None:
    """Write ``TASK-SPLIT/LABEL/NUMBER.png`` for both tasks, and the mixed ``calibration`` without labels.

    Args:
        folder: that is there.
        wheel: scikit-image's, with the photographs.
    """
    calibration = folder / "calibration"
    calibration.mkdir()
    photographs = read_photographs(wheel)
    for task in TASKS:
        for split in SPLITS:
            images = list(crops(photographs, split) if task == "crops" else digits(split))
            for number, (label, pixels) in enumerate(images):
                path = folder / f"{task}-{split}" / label / f"{number:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            if split == "train":
                for number in np.linspace(0, len(images) - 1, CALIBRATION).astype(int):
                    Image.fromarray(images[number][1]).save(calibration / f"{task}-{number:04}.png")


def read_photographs(wheel: Path) -> dict[str, Image.Image]:
    """All by label."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    found = {"china": Image.fromarray(china), "flower": Image.fromarray(flower)}
    with ZipFile(wheel) as archive:
        for name in PHOTOGRAPHS:
            data = archive.read(f"skimage/data/{name}")
            found[name.split(".")[0]] = Image.open(io.BytesIO(data)).convert("RGB")
    return found


def crops(photographs: Mapping[str, Image.Image], split: str) -> Iterator[Labelled]:
    """Enlarged crops of every photograph: grey, or colour were a clue, and of varying contrast."""
    random = np.random.default_rng([SPLITS[split], 0])
    for label in labels("crops"):
        photograph = photographs[label]
        for _ in range(CROPS[split]):
            side = min(int(random.integers(40, 110)), photograph.height - 1, photograph.width - 1)
            top = int(random.integers(photograph.height - side))
            left = int(random.integers(photograph.width - side))
            cut = photograph.crop((left, top, left + side, top + side)).convert("L")
            levels = np.array(cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
            if random.random() < 0.5:
                levels = levels[:, ::-1]
            levels = (levels - 128) * random.uniform(0.6, 1.4) + 128 + random.uniform(-30, 30)
            yield label, _grey(levels.clip(0, 255).astype(np.uint8))


def digits(split: str) -> Iterator[Labelled]:
    """Handwritten digits, enlarged, on a black border."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))[DIGITS[split]]
    for index in order:
        small = Image.fromarray((found.images[index] * 255 / 16).astype(np.uint8))
        levels = np.zeros((SIDE, SIDE), np.uint8)
        levels[20:-20, 20:-20] = np.array(small.resize((SIDE - 40, SIDE - 40), Image.Resampling.BICUBIC))
        yield str(found.target[index]), _grey(levels)


def read_images(folder: Path) -> tuple[Pixels, list[str]]:
    """The images of a split, (N, height, width, 3), and the label of each."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    return np.stack([np.array(Image.open(path)) for path in paths]), [path.parent.name for path in paths]


def _grey(levels: Pixels) -> Pixels:
    return np.repeat(levels[..., None], 3, axis=-1)
