"""CLIP and SigLIP from the folder that transformers wrote to vectors and labels of photographs.

Held against the processor and the model together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn import datasets

from tests.helpers.commands import Run
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import pixel_values

PHOTOGRAPHS = sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))
VISION: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
TEXT = {**VISION, "vocab_size": 40, "max_position_embeddings": 8}
LABELS: dict[str, Any] = {
    "id2label": {i: f"thing {i}" for i in range(12)},
    "label2id": {f"thing {i}": i for i in range(12)},
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
    "Siglip": {"size": {"height": 64, "width": 64}},
}


def save(folder: Path, kind: str, model_class: str) -> tuple[Any, Any]:
    """A model whose every parameter matters, saved with its processor as a user would; returns both."""
    torch.manual_seed(3)
    text = {name: value for name, value in TEXT.items() if name not in ("image_size", "patch_size")}
    labels = LABELS if "Classification" in model_class else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=text, **labels)
    model = getattr(transformers, kind + model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**PROCESSORS[kind])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def pixels_of(processor: Any, path: Path) -> torch.Tensor:
    pixels: torch.Tensor = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_labels_and_probabilities_of_photographs(run: Run, tmp_path: Path, kind: str) -> None:
    model, processor = save(tmp_path / "model", kind, "ForImageClassification")
    bundle = tmp_path / "out.bundle"
    done = run("export", "-m", tmp_path / "model", "-o", bundle, "--batch", "1,2,4")
    assert done.code == 0, done.err
    predicted = json.loads(run("predict", bundle, *PHOTOGRAPHS, "--json").out)["images"]
    assert len(predicted) == len(PHOTOGRAPHS) == 2
    for path, image in zip(PHOTOGRAPHS, predicted, strict=True):
        with torch.inference_mode():
            best = model(pixels_of(processor, path)).logits.softmax(-1)[0].topk(5)
        assert [p["label"] for p in image["predictions"]] == [f"thing {i}" for i in best.indices]
        np.testing.assert_allclose([p["score"] for p in image["predictions"]], best.values, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_embeddings_of_photographs(run: Run, tmp_path: Path, kind: str) -> None:
    """In fp32 within 1e-4 of the original in float64, in fp16 through the gate and in the same direction."""
    model, processor = save(tmp_path / "model", kind, "Model")
    flags = ("--fp32", "--fp16", "--output", "embedding", "--batch", "1,2,4", "--format", "onnx")
    done = run("export", "-m", tmp_path / "model", "-o", tmp_path / "out.bundle", *flags)
    assert done.code == 0, done.err
    bundle = Bundle.open(tmp_path / "out.bundle")
    theirs = torch.cat([pixels_of(processor, path) for path in PHOTOGRAPHS])
    ours = np.stack(
        [pixel_values(load_image(path), bundle.manifest.preprocess, "float") for path in PHOTOGRAPHS]
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    with torch.inference_mode():
        features = model.double().get_image_features(theirs.double())
    features = getattr(features, "pooler_output", features)
    expected = (features / features.norm(dim=-1, keepdim=True)).numpy()
    assert expected[0] @ expected[1] < 0.999
    for precision, error in (("fp32", 1e-4), ("fp16", 3e-2)):
        artifact = bundle.artifact(precision)
        with get_backend("onnxruntime").load(bundle, artifact, Options()) as session:
            found = session.run({"pixel_values": ours})["embedding"]
        assert np.linalg.norm(found - expected) <= error * np.linalg.norm(expected)
        np.testing.assert_allclose((found * expected).sum(axis=1), 1, atol=1e-3)
