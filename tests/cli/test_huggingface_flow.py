"""From a folder that transformers wrote to labels of photographs, held against the processor + model pair."""

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

PHOTOGRAPHS = sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))
SMALL: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "id2label": {i: f"thing {i}" for i in range(12)},
}
MLP = {"intermediate_size": 96}
CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}

FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", MLP, "ViTImageProcessorPil", {"size": {"height": 64, "width": 64}}),
    "vit_not_square": (
        "ViT",
        MLP | {"image_size": [64, 96]},
        "ViTImageProcessorPil",
        {"size": {"height": 64, "width": 96}},
    ),
    "deit": ("DeiT", MLP, "DeiTImageProcessorPil", CROPPED | {"size": {"height": 72, "width": 72}}),
    "beit": (
        "Beit",
        MLP | {"use_relative_position_bias": True},
        "BeitImageProcessorPil",
        {"size": {"height": 64, "width": 64}},
    ),
    "msn": ("ViTMSN", MLP, "ViTImageProcessorPil", {"size": {"height": 64, "width": 64}}),
    "dinov2_registers": (
        "Dinov2WithRegisters",
        {"use_swiglu_ffn": True, "mlp_ratio": 2},
        "BitImageProcessorPil",
        CROPPED,
    ),
}


def save(folder: Path, family: str) -> tuple[Any, Any]:
    """A model whose every parameter matters, saved with its processor as a user would; returns both."""
    prefix, change, processor_class, settings = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **change})
    head = "ForImageClassificationWithTeacher" if prefix == "DeiT" else "ForImageClassification"
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    processor = getattr(transformers, processor_class)(**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


SCORES: dict[str, dict[str, Any]] = {
    "softmax": {"num_labels": 4},
    "sigmoid": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "one output": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "several values": {"num_labels": 3, "problem_type": "regression"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_those_of_the_pipeline(run: Run, tmp_path: Path, kind: str) -> None:
    folder, bundle = tmp_path / "model", tmp_path / "out.bundle"
    torch.manual_seed(0)
    given = {name: value for name, value in SMALL.items() if name != "id2label"}
    config = transformers.ViTConfig(**given, **MLP, **SCORES[kind])
    model = transformers.ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    processor = transformers.ViTImageProcessorPil(size={"height": 64, "width": 64})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pipeline = transformers.pipeline("image-classification", model, image_processor=processor)
    done = run("export", "-m", folder, "-o", bundle)
    assert done.code == 0, done.err
    images = json.loads(run("predict", bundle, *PHOTOGRAPHS, "--json").out)["images"]
    for path, image in zip(PHOTOGRAPHS, images, strict=True):
        theirs = pipeline(Image.open(path).convert("RGB"), top_k=5)
        ours = image["predictions"]
        assert [prediction["label"] for prediction in ours] == [answer["label"] for answer in theirs]
        np.testing.assert_allclose(
            [prediction["score"] for prediction in ours], [answer["score"] for answer in theirs], atol=2e-5
        )


@pytest.mark.slow
def test_a_photograph_that_was_taken_sideways(run: Run, tmp_path: Path) -> None:
    model, processor = save(tmp_path / "model", "vit_not_square")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = tmp_path / "phone.jpg"
    Image.open(PHOTOGRAPHS[0]).convert("RGB").save(photograph, exif=exif)
    pipeline = transformers.pipeline("image-classification", model, image_processor=processor)
    theirs = pipeline(str(photograph), top_k=5)
    assert theirs != pipeline(str(PHOTOGRAPHS[0]), top_k=5)
    bundle = tmp_path / "out.bundle"
    assert run("export", "-m", tmp_path / "model", "-o", bundle).code == 0
    (image,) = json.loads(run("predict", bundle, photograph, "--json").out)["images"]
    assert [prediction["label"] for prediction in image["predictions"]] == [a["label"] for a in theirs]
    np.testing.assert_allclose(
        [prediction["score"] for prediction in image["predictions"]], [a["score"] for a in theirs], atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_probabilities_of_photographs(run: Run, tmp_path: Path, family: str) -> None:
    model, processor = save(tmp_path / "model", family)
    bundle = tmp_path / "out.bundle"
    done = run("export", "-m", tmp_path / "model", "-o", bundle, "--batch", "1,2,4")
    assert done.code == 0, done.err
    predicted = json.loads(run("predict", bundle, *PHOTOGRAPHS, "--json").out)["images"]
    assert len(predicted) == len(PHOTOGRAPHS) == 2
    for path, image in zip(PHOTOGRAPHS, predicted, strict=True):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            theirs = model(pixels).logits.softmax(-1)[0]
        best = theirs.topk(5)
        assert [p["label"] for p in image["predictions"]] == [
            model.config.id2label[int(i)] for i in best.indices
        ]
        np.testing.assert_allclose([p["score"] for p in image["predictions"]], best.values, atol=1e-3)
        with torch.inference_mode():
            exact = model.double()(pixels.double()).logits.numpy()
            model.float()
        opened = Bundle.open(bundle)
        with get_backend("onnxruntime").load(opened, opened.artifact("fp32"), Options()) as session:
            ours = session.run({"pixel_values": pixels.numpy()})["logits"]
        assert np.linalg.norm(ours - exact) <= 1e-4 * np.linalg.norm(exact)
