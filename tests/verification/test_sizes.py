"""Verification of a bundle with several image sizes: each against its own golden tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.helpers.several_sizes import LABELS, SIZES, answer_image, golden_arrays, several_sizes
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import VitdeployError
from vitdeploy.verification.local import VerifyReport, verify_bundle

SMALL, LARGE, WIDE = SIZES


def verify(bundle: Bundle, **options: object) -> VerifyReport:
    return verify_bundle(bundle, backends=["onnxruntime"], **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_size_is_compared_with_its_own_reference(tmp_path: Path) -> None:
    report = verify(several_sizes(tmp_path / "b", precisions=("fp32", "fp16")))
    assert report.failures == ()
    assert report.preprocess.images == 2 * len(SIZES)
    compared = {(record.artifact, record.batch) for record in report.parity}
    suffixes = ("", "-16x16", "-8x16")
    assert compared == {
        (f"onnx-{precision}{suffix}", batch)
        for precision in ("fp32", "fp16")
        for suffix in suffixes
        for batch in (1, 2, 8)
    }


@pytest.mark.slow
def test_a_graph_with_the_positions_of_another_size_is_caught(tmp_path: Path) -> None:
    report = verify(several_sizes(tmp_path / "b", table_of={WIDE: LARGE}))
    assert report.failures
    assert all("onnx-fp32-8x16" in failure for failure in report.failures)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_golden_tensors_of_another_size_are_caught(tmp_path: Path, whole: bool) -> None:
    """The references of another size alone, or with all that belongs to it."""
    bundle = several_sizes(tmp_path / "b")
    own, other = golden_arrays(WIDE), golden_arrays(LARGE)
    arrays = other if whole else own | {"reference": other["reference"]}
    with bundle.edit() as writer:
        save_file(arrays, writer.file("golden.8x16.safetensors"))
        writer.seal(bundle.manifest)
        bundle = writer.commit()
    if whole:
        with pytest.raises(VitdeployError, match="8x16"):
            verify(bundle).check()
    else:
        failures = verify(bundle).failures
        assert failures
        assert all("onnx-fp32-8x16" in failure for failure in failures)


@pytest.mark.slow
def test_pixels_that_differ_at_one_size_are_caught(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "b")
    arrays = load_file(bundle.path("golden.16x16.safetensors"))
    arrays["image.1.pixel_values"][0, 3, 3] += 0.25
    with bundle.edit() as writer:
        save_file(arrays, writer.file("golden.16x16.safetensors"))
        writer.seal(bundle.manifest)
        bundle = writer.commit()
    (failure,) = verify(bundle).failures
    assert failure == "preprocessing: 16x16: image.1: pixels differ by 0.25"


@pytest.mark.slow
def test_accuracy_is_of_every_size(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "b")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(6)]
    folder = tmp_path / "data"
    folder.mkdir()
    truth = [int(answer_image(image, SMALL).argmax()) for image in images]
    for index, (image, label) in enumerate(zip(images, truth, strict=True)):
        image.save(folder / f"{LABELS[label]}_{index}.png")
    right = {
        size: sum(
            int(answer_image(image, size).argmax()) == label
            for image, label in zip(images, truth, strict=True)
        )
        for size in SIZES
    }
    report = verify(bundle, data=folder)
    assert {record.model: record.correct for record in report.accuracy} == {
        "onnx-fp32": right[SMALL],
        "onnx-fp32-16x16": right[LARGE],
        "onnx-fp32-8x16": right[WIDE],
    }
