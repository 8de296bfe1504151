"""Train the small digits ViT that vitdeploy ships, from nothing.

    python examples/train_digits.py [--out DIR] [--epochs N]

Data: scikit-learn's bundled digits, 1797 grey 8x8 images of handwritten digits (the test set of the
UCI "Optical Recognition of Handwritten Digits"). A stratified quarter of them is held out: the model
never sees it, and the script writes it beside the weights so that anyone can measure accuracy.

The run is seeded, on one thread, and takes about a minute and a half. The same processor and library
versions give the same bytes; another processor rounds differently and may get one image more or less right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Preprocess, ViTConfig
from vitdeploy.data import digits_folder
from vitdeploy.images import preprocess
from vitdeploy.model.reference import forward_float64, state_of
from vitdeploy.model.registry import parameter_count
from vitdeploy.model.vit import ViT

SEED = 0
HELD_OUT = 0.25
EPOCHS = 60
BATCH = 64
PEAK_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
SHIFT, ROTATION, SCALE = 0.1, 0.12, 0.08
"""Random augmentation: fraction of the image, radians, fraction of the size."""
SAMPLES = ("png", "jpg")
"""The first two held-out images of every digit become files, one of each kind."""

MODEL = ViTConfig(image_size=(32, 32), patch_size=8, width=96, depth=4, heads=3, mlp_width=192, classes=10)
PIXELS = Preprocess(size=(32, 32), resize="exact", resample="bilinear")


def dataset() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All digits: grey images (1797, 8, 8) with levels 0..16 spread over 0..255, and their labels."""
    digits = load_digits()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)


def split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and of the held-out images, each in rising order."""
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, random_state=SEED, stratify=labels
    )
    return np.sort(train), np.sort(held_out)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Grey images (K, 8, 8) through the shipped preprocessing: (K, 3, 32, 32) float32."""
    arrays = [preprocess.apply(Image.fromarray(image).convert("RGB"), PIXELS) for image in images]
    return torch.from_numpy(np.stack(arrays))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn and scale every image (K, 3, H, W) a little; what comes in from outside is background."""
    k = len(pixels)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(k, *shape, generator=generator) * 2 - 1) * limit

    angle, scale, shift = uniform(ROTATION), 1 + uniform(SCALE), uniform(2 * SHIFT, 2, 1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (K, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift], dim=2), list(pixels.shape), align_corners=False)
    # Zero padding stands for background once black, which normalises to -1, is moved to 0.
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1


def initialise(model: ViT) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as the ViT paper's code does it."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the run, then a cosine to zero."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(pixels: Tensor, labels: Tensor, epochs: int) -> ViT:
    """Train a fresh model on (K, 3, 32, 32) images and their labels (K)."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = ViT(MODEL)
    initialise(model)
    per_epoch = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, epochs * per_epoch))
    for epoch in range(epochs):
        losses = 0.0
        for batch in torch.randperm(len(labels), generator=generator)[: per_epoch * BATCH].split(BATCH):
            logits = model(augment(pixels[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses += loss.item()
        print(f"epoch {epoch + 1:3}/{epochs}  loss {losses / per_epoch:.4f}", flush=True)
    return model.eval()


def accuracy(model: ViT, pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose largest float64 logit is their label."""
    return (forward_float64(model, pixels).argmax(dim=1) == labels).double().mean().item()


def write_checkpoint(folder: Path, model: ViT) -> None:
    """The weights under our own names, and the configuration that ``vitdeploy -m FOLDER`` reads."""
    (folder / "model.safetensors").write_bytes(save(state_of(model)))
    config = {
        "model_type": "vitdeploy",
        "model": dataclasses.asdict(MODEL),
        "preprocess": dataclasses.asdict(PIXELS),
        "labels": [str(digit) for digit in range(MODEL.classes)],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_held_out(
    folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64]
) -> None:
    """All held-out images in one compact file, and a few of them as image files at the model's size."""
    np.savez_compressed(
        folder / "heldout.npz",
        images=images[indices],
        labels=labels[indices].astype(np.uint8),
        indices=indices.astype(np.uint16),
    )
    files = folder / "images"
    files.mkdir(exist_ok=True)
    height, width = PIXELS.size
    for digit in range(MODEL.classes):
        chosen = indices[labels[indices] == digit]
        for index, suffix in zip(chosen, SAMPLES, strict=False):
            large = Image.fromarray(images[index]).resize((width, height), Image.Resampling.BILINEAR)
            large.save(files / f"{digit}_{index:04}.{suffix}", quality=95)


CARD = """# A small ViT for handwritten digits

| | |
|---|---|
| model | ViT, {height}x{width} RGB, {shape}; {parameters} parameters, fp32 |
| data | scikit-learn's `load_digits`: 1797 grey 8x8 images, 10 classes |
| split | stratified, seed {seed}: {train} to train, {held_out} held out (`heldout.npz`) |
| accuracy on the held-out images | **{accuracy:.2%}** ({right} of {held_out}), in float64 |
| accuracy on the training images | {train_accuracy:.2%} |
| training | {epochs} epochs from random weights, AdamW, shifts, turns and scaling; no other data |
| made by | `python examples/train_digits.py` with torch {torch}, scikit-learn {sklearn} |

An image is resized to {height}x{width} with Pillow's bilinear filter and normalised with mean and deviation
0.5. `images/` has the first two held-out images of every digit, a PNG and a JPEG; a name is the label and the
image's number in `load_digits`.

It is there to have a real model and real images at hand, not to read digits: the images are tiny and come
from 13 writers, and the split does not keep writers apart, so it will read other people's digits less well.

Data: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, CC BY 4.0 (the set's test part). The weights are under this project's
licence.
"""


def write_card(folder: Path, epochs: int, held_out: tuple[float, int], training: tuple[float, int]) -> None:
    """The model card; each part of the split is its accuracy and its number of images."""
    card = CARD.format(
        height=MODEL.image_size[0],
        width=MODEL.image_size[1],
        shape=f"patch {MODEL.patch_size}, width {MODEL.width}, depth {MODEL.depth}, {MODEL.heads} heads",
        parameters=f"{parameter_count(MODEL):,}",
        seed=SEED,
        accuracy=held_out[0],
        right=round(held_out[0] * held_out[1]),
        held_out=held_out[1],
        train_accuracy=training[0],
        train=training[1],
        epochs=epochs,
        torch=torch.__version__.partition("+")[0],
        sklearn=sklearn.__version__,
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits ViT that vitdeploy ships.")
    parser.add_argument("--out", type=Path, default=digits_folder(), help="default: the package's own folder")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    # One thread adds numbers up in one order, whatever the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    start = time.perf_counter()
    images, labels = dataset()
    train_part, held_out = split(labels)
    pixels, targets = to_tensor(images), torch.from_numpy(labels)
    model = train(pixels[train_part], targets[train_part], arguments.epochs)
    scores = [(accuracy(model, pixels[part], targets[part]), len(part)) for part in (held_out, train_part)]

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.out, model)
    write_held_out(arguments.out, images, labels, held_out)
    write_card(arguments.out, arguments.epochs, *scores)
    seconds = time.perf_counter() - start
    print(f"accuracy on {len(held_out)} held-out images: {scores[0][0]:.2%}, {seconds:.0f} s")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
