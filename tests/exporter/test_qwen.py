"""Towers of vision-language models, exported to buckets, answer as transformers' tower does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitdeploy
from tests.helpers import qwen_models
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange, QwenVisionConfig
from vitdeploy.errors import UsageError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.predictor import Predictor
from vitdeploy.verification.local import verify_bundle
from vitdeploy.vision_language import for_ort_genai, for_vllm, patches_of_images

RANGE = BatchRange(1, 2, 4)
BUCKETS = [(80, 112), (64, 64)]
"""20 x 28 patches, whose windows are of three sizes, and 16 x 16."""


def exported(folder: Path, target: Path, **options: Any) -> Bundle:
    return run_export(ExportRequest(model=folder, batch=RANGE, **options), target)


@pytest.fixture(scope="module")
def tower() -> Any:
    return qwen_models.tower("qwen2_5_vl")


@pytest.fixture(scope="module")
def folder(tower: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_models.save(tower, tmp_path_factory.mktemp("qwen") / "tower")


@pytest.fixture(scope="module")
def buckets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tower for the processor's patches, at two sizes."""
    return exported(
        folder,
        tmp_path_factory.mktemp("buckets") / "out.bundle",
        image_size=BUCKETS[0],
        further_sizes=tuple(BUCKETS[1:]),
        input="patches",
        precisions=("fp32", "fp16", "bf16"),
    )


@pytest.fixture(scope="module")
def deepstack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    """Qwen3-VL's structure for images, and the original."""
    model, root = qwen_models.tower("qwen3_vl"), tmp_path_factory.mktemp("deepstack")
    qwen_models.save(model, root / "tower")
    return model, exported(root / "tower", root / "out.bundle", image_size=(24, 40), input="uint8")


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("size", BUCKETS)
def test_a_bucket_answers_as_transformers_does_through_its_own_processor(
    size: tuple[int, int], tower: Any, buckets: Bundle
) -> None:
    bundle = buckets.at_size(size)
    pictures = [qwen_models.photograph(size, seed) for seed in range(3)]
    seen = qwen_models.processor()(pictures, return_tensors="np")
    grid = (size[0] // qwen_models.PATCH, size[1] // qwen_models.PATCH)
    assert bundle.manifest.grid_thw == (1, *grid)
    patches = patches_of_images(seen["pixel_values"], seen["image_grid_thw"], bundle.manifest.grid_thw)
    expected = qwen_models.answers(tower, torch.from_numpy(patches), grid)["image_features"].numpy()
    assert relative(expected[0], expected[1]) > 1e-2
    errors = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
    for artifact in bundle.manifest.artifacts:
        if artifact.precision == "bf16":  # ONNX Runtime does not load it
            continue
        with get_backend("onnxruntime").load(bundle, artifact, Options()) as session:
            found = session.run({"pixel_values": patches})["image_features"]
            alone = session.run({"pixel_values": patches[:1]})["image_features"]
        assert relative(found, expected) <= errors[artifact.precision]
        if artifact.precision == "fp32":
            assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(alone, found[:1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_every_precision_passed_its_gate(buckets: Bundle) -> None:
    manifest = buckets.at_size(BUCKETS[0]).manifest
    assert [artifact.name for artifact in manifest.artifacts] == ["onnx-fp32", "onnx-fp16", "onnx-bf16"]
    assert all(record.passed for record in manifest.parity)
    assert {record.batch for record in manifest.parity if record.artifact == "onnx-fp32"} == {1, 2, 4}
    norms = {"merger.norm", *(f"blocks.{i}.norm{k}" for i in range(3) for k in (1, 2))}
    assert set(manifest.artifacts[1].islands) == norms
    assert isinstance(manifest.model, QwenVisionConfig)
    assert "group_windows" in {rewrite.name for rewrite in manifest.rewrites}


@pytest.mark.slow
def test_a_bundle_of_patches_says_what_it_reads(buckets: Bundle) -> None:
    bundle = buckets.at_size(BUCKETS[1])
    written = json.loads((bundle.root / "manifest.json").read_text())
    assert written["grid_thw"] == [1, 20, 28]
    assert written["sizes"][0]["grid_thw"] == [1, 16, 16]
    # The weights lie there once; graphs hold what the size settles.
    weights = (bundle.root / "weights.safetensors").stat().st_size
    assert (bundle.root / "model.onnx.data").stat().st_size < 1.2 * weights
    assert written["input"] == "patches"
    artifact = bundle.manifest.artifacts[0]
    assert artifact.inputs[0].shape == ("N", 256, 96)
    assert bundle.golden()["pixel_values"].shape[1:] == (256, 96)
    assert buckets.golden()["pixel_values"].shape == (8, 560, 96)
    assert not any(name.startswith("image.") for name in bundle.golden())
    assert bundle.manifest.refuses_images == "reads patches as its own image processor makes them, not images"
    with Predictor.open(bundle) as predictor, pytest.raises(UsageError, match="reads patches"):
        predictor.preprocess(qwen_models.photograph((64, 64)))
    # Tensors go to the size of their shape.
    with Predictor.open(buckets, backend="torch") as predictor:
        for size in BUCKETS:
            golden = buckets.at_size(size).golden()
            found = predictor.outputs(golden["pixel_values"])["image_features"]
            assert relative(found, golden["reference"]) < 1e-5


@pytest.mark.slow
def test_it_is_verified_like_any_other(buckets: Bundle) -> None:
    report = verify_bundle(buckets.root, backends=("onnxruntime", "torch"))
    assert report.passed


@pytest.mark.slow
def test_images_go_in_and_deepstack_features_come_out(deepstack: tuple[Any, Bundle]) -> None:
    model, bundle = deepstack
    assert bundle.manifest.outputs == ("image_features", "deepstack_features")
    assert not bundle.manifest.embeds_images
    picture = qwen_models.photograph((100, 100))
    spec = bundle.manifest.preprocess
    assert spec is not None
    with Predictor.open(bundle) as predictor:
        raw = predictor.preprocess(picture)
        found = predictor.outputs(raw[None])
        with pytest.raises(UsageError, match="no vector of each image") as error:
            predictor.embed(picture)
    assert (error.value.hint or "").startswith("Predictor.outputs")
    assert raw.shape == (24, 40, 3)
    pixels = ((raw / 255 - np.array(spec.mean)) / np.array(spec.std)).transpose(2, 0, 1)[None]
    expected = qwen_models.answers(model, qwen_models.patches(pixels.astype(np.float32)), (6, 10))
    for name, answer in expected.items():
        assert relative(found[name], answer.numpy()) < 1e-4
    plain = {name: answer.numpy() for name, answer in expected.items()}
    given = for_vllm(found, bundle.manifest.grid_thw)
    beside = [
        plain["image_features"][0],
        plain["deepstack_features"][0, 0],
        plain["deepstack_features"][0, 1],
    ]
    assert relative(given["image_embeds"], np.concatenate(beside, axis=1)) < 1e-4


@pytest.mark.slow
def test_planted_large_values_of_the_last_down_projection_become_an_island(tmp_path: Path) -> None:
    """As in Qwen2.5-VL-3B, whose last down projection leaves the range of fp16."""
    model = qwen_models.tower("qwen2_5_vl")
    with torch.no_grad():
        down, up = model.blocks[2].mlp.down_proj, model.blocks[2].mlp.up_proj
        up.weight.mul_(300)
        up.bias.mul_(300)
        down.weight[5].mul_(600)
    folder = qwen_models.save(model, tmp_path / "tower")
    bundle = exported(folder, tmp_path / "out.bundle", image_size=(24, 40), precisions=("fp16",))
    (artifact,) = bundle.manifest.artifacts
    assert artifact.precision == "mixed"
    assert "blocks.2.mlp.fc2" in artifact.islands
    assert not any(
        name.startswith(("blocks.0.mlp", "blocks.1.mlp", "blocks.0.attn")) for name in artifact.islands
    )
    assert "blocks.2" in (artifact.fallback or "")
    assert all(record.passed for record in bundle.manifest.parity if record.artifact == artifact.name)


# --- what is beside a bundle -------------------------------------------------------------------------------


def test_what_does_not_go_in_is_refused_by_name() -> None:
    patches = np.zeros((2 * 64, 96), np.float32)
    same = np.array([[1, 8, 8], [1, 8, 8]])
    assert patches_of_images(patches, same, (1, 8, 8)).shape == (2, 64, 96)
    with pytest.raises(UsageError, match="a video's patches, of 4 times, do not go into a tower for stills"):
        patches_of_images(patches, np.array([[4, 8, 8]]), (1, 8, 8))
    with pytest.raises(
        UsageError, match="images of 6x10 patches among 2 grids do not go into a bundle of 8x8"
    ):
        patches_of_images(patches, np.array([[1, 8, 8], [1, 6, 10]]), (1, 8, 8))
    with pytest.raises(UsageError, match="images of 8x8 patches do not go into a bundle of 4x16"):
        patches_of_images(patches, same, (1, 4, 16))
    with pytest.raises(UsageError, match=r"\(128, 96\) is not the shape of the patches of 1 images"):
        patches_of_images(patches, same[:1], (1, 8, 8))
    with pytest.raises(UsageError, match="no grid of patches"):
        patches_of_images(patches, same, None)
    with pytest.raises(UsageError, match="there are no image_features among logits"):
        for_vllm({"logits": patches}, (1, 8, 8))


def test_features_in_the_forms_of_others() -> None:
    features = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    deepstack = 100 + np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4)
    alone = for_vllm({"image_features": features}, (1, 2, 6))
    np.testing.assert_array_equal(alone["image_embeds"], np.concatenate(list(features)))
    assert alone["image_grid_thw"].tolist() == [[1, 2, 6], [1, 2, 6]]
    assert alone["image_grid_thw"].dtype == np.int64
    outputs = {"image_features": features, "deepstack_features": deepstack}
    wide = for_vllm(outputs, (1, 2, 6))["image_embeds"]
    for image in range(2):
        for row in range(3):
            expected = [features[image, row], deepstack[image, 0, row], deepstack[image, 1, row]]
            np.testing.assert_array_equal(wide[3 * image + row], np.concatenate(expected))
    genai = for_ort_genai(outputs, (1, 2, 6))
    np.testing.assert_array_equal(genai["image_features"], np.concatenate(list(features)))
    np.testing.assert_array_equal(genai["deepstack_features"][1, 3:], deepstack[1, 1])


def test_models_without_patches_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digits reads no patches") as error:
        vitdeploy.export("digits", tmp_path / "x", input="patches", format="onnx")
    assert error.value.hint == "it reads: float, uint8"
    with pytest.raises(UsageError, match="tensors, not patches"):
        vitdeploy.export(torch.nn.Flatten(), tmp_path / "x", input="patches", format="onnx")
