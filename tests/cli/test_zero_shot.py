"""Classifiers of labels in words, held against the processor and the model that they were made from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import datasets

from tests.helpers.commands import Run
from tests.helpers.models import CONFIGS, random_state
from tests.helpers.paths import ROOT
from tests.helpers.text_checkpoints import (
    LABELS,
    logits_per_image,
    save_byte_pairs,
    save_clip,
    save_siglip,
    siglip_tokenizer,
    text_embeddings,
)
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import GOLDEN, Bundle
from vitdeploy.checkpoint.opening import Checkpoint, save_folder
from vitdeploy.config import Preprocess, ViTConfig

PHOTOGRAPHS = sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))
SAVE: dict[str, Callable[..., tuple[Any, Any]]] = {"clip": save_clip, "siglip": save_siglip}
RECORDED = ROOT / "tests/oracles/open_clip_texts"


def labels_file(folder: Path, labels: Sequence[str] = LABELS) -> Path:
    path = folder / "labels.txt"
    path.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return path


def logits_of(bundle: Bundle, pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    with get_backend("onnxruntime").load(bundle, bundle.artifact("fp32"), Options()) as session:
        return session.run({"pixel_values": pixels.float().numpy()})["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("family", SAVE)
def test_photographs_have_the_scores_of_processor_and_model(run: Run, tmp_path: Path, family: str) -> None:
    model, processor = SAVE[family](tmp_path / "model")
    target = tmp_path / "out.bundle"
    done = run("export", "-m", tmp_path / "model", "--zero-shot", labels_file(tmp_path), "-o", target)
    assert done.code == 0, done.err
    bundle = Bundle.open(target)

    photographs = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    pixels = processor.image_processor(photographs, return_tensors="pt")["pixel_values"]
    theirs = logits_per_image(model, processor, pixels, LABELS).numpy()
    assert np.abs(logits_of(bundle, pixels) - theirs).max() < 1e-5

    shares = 1 / (1 + np.exp(-theirs))
    if family == "clip":
        shares = np.exp(theirs) / np.exp(theirs).sum(axis=1, keepdims=True)
    for row, image in zip(
        shares, run("predict", target, *PHOTOGRAPHS, "--json").document["images"], strict=True
    ):
        found = {answer["label"]: answer["score"] for answer in image["predictions"]}
        assert found.keys() == set(LABELS)
        assert [found[label] for label in LABELS] == pytest.approx(row, abs=1e-3)
        assert image["predictions"][0]["label"] == LABELS[row.argmax()]

    golden = load_file(target / GOLDEN)
    exact = logits_per_image(model, processor, golden["pixel_values"], LABELS)
    assert float((golden["reference"] - exact).abs().max()) < 1e-9

    manifest = bundle.manifest
    assert manifest.labels == LABELS
    assert manifest.scores == {"clip": "softmax", "siglip": "sigmoid"}[family]
    assert manifest.provenance.facts["labels"] == "user"
    assert {"tokenizer.json", "labels.txt", "model.safetensors"} <= manifest.provenance.source_files.keys()
    shown = run("inspect", target).out
    assert "zero-shot, 5 labels" in shown
    assert "labels are embedded as they stand" in shown
    assert "left out" not in shown
    assert "softmax  [from the checkpoint]" in shown or "sigmoid  [from the checkpoint]" in shown


@pytest.mark.slow
def test_other_outputs_precisions_and_templates(run: Run, tmp_path: Path) -> None:
    model, processor = save_clip(tmp_path / "model")
    said = ("export", "-m", tmp_path / "model", "--zero-shot", labels_file(tmp_path), "--batch", "2")
    templates = ("--template", "a photo of a {}", "--template", "{}!")
    done = run(*said, *templates, "--fp16", "--input", "uint8", "-o", tmp_path / "a.bundle")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "a.bundle").manifest
    assert "labels are embedded as 'a photo of a {}', '{}!', averaged" in manifest.provenance.notes[-1]
    assert all(record.passed for record in manifest.parity)

    done = run(*said, "--output", "logits,embedding", "-o", tmp_path / "b.bundle")
    assert done.code == 0, done.err
    golden = load_file(tmp_path / "b.bundle" / GOLDEN)
    texts = text_embeddings(model, processor, LABELS)
    logits = model.logit_scale.double().exp() * golden["reference.embedding"] @ texts.T
    exact = logits_per_image(model, processor, golden["pixel_values"], LABELS)
    assert float((logits - exact).abs().max()) < 1e-9
    assert float((golden["reference"] - exact).abs().max()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_open_clip_s_own_files_have_its_logits(run: Run, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(RECORDED / name, folder)
    if name == "clip":
        save_byte_pairs(folder)
    else:
        siglip_tokenizer().save_pretrained(folder)
    done = run("export", "-m", folder, "--zero-shot", labels_file(tmp_path), "-o", tmp_path / "out.bundle")
    assert done.code == 0, done.err
    answer = load_file(RECORDED / name / "answer.safetensors")
    bundle = Bundle.open(tmp_path / "out.bundle")
    assert np.abs(logits_of(bundle, answer["pixels"]) - answer["logits"].numpy()).max() < 1e-5
    assert bundle.manifest.scores == {"clip": "softmax", "siglip": "sigmoid"}[name]


@pytest.mark.slow
def test_vectors_make_a_head_for_any_model_without_one(run: Run, tmp_path: Path) -> None:
    """Also in one's own format, and from what has neither text tower nor tokenizer."""
    config = ViTConfig(**{**vars(CONFIGS["clip"]), "classes": 0})
    spec = Preprocess(size=config.image_size)
    save_folder(Checkpoint(config, random_state(config), spec, None, "vitdeploy", "it"), tmp_path / "model")
    rows = {label: torch.randn(config.projection) for label in LABELS}
    save_file(rows, tmp_path / "vectors.safetensors", metadata={"logit_scale": str(math.log(20))})
    said = ("export", "-m", tmp_path / "model", "--batch", "2")
    done = run(*said, "--zero-shot", tmp_path / "vectors.safetensors", "-o", tmp_path / "a.bundle")
    assert done.code == 0, done.err
    assert run(*said, "--output", "embedding", "-o", tmp_path / "b.bundle").code == 0
    logits, embeddings = (load_file(tmp_path / f"{name}.bundle" / GOLDEN)["reference"] for name in "ab")
    assert Bundle.open(tmp_path / "a.bundle").manifest.provenance.facts["scores"] == "user"
    unit = torch.stack([rows[label].double() / rows[label].double().norm() for label in sorted(LABELS)])
    assert float((logits - 20 * embeddings @ unit.T).abs().max()) < 1e-12
    (image,) = run("predict", tmp_path / "a.bundle", PHOTOGRAPHS[0], "--json").document["images"]
    assert sum(answer["score"] for answer in image["predictions"]) == pytest.approx(1.0)
    assert {answer["label"] for answer in image["predictions"]} == set(LABELS)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("-m", "digits", "--zero-shot", "LABELS"), "digits has a head of 10 classes"),
        (("-m", "digits", "--zero-shot", "LABELS", "--labels", "LABELS"), "--zero-shot names the classes"),
        (("-m", "digits", "--template", "a {}"), "goes with the labels of --zero-shot"),
        (("-m", "digits", "--zero-shot", "LABELS", "--template", "a"), "--template 'a' has no {}"),
        (("-m", "digits", "--zero-shot", "v.safetensors", "--template", "a {}"), "not with vectors"),
        (("-m", "torch.nn:Identity", "--zero-shot", "LABELS"), "takes no zero-shot head"),
    ],
)
def test_what_does_not_go_together(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    words = [str(labels_file(tmp_path)) if word == "LABELS" else word for word in arguments]
    done = run("export", *words, "-o", tmp_path / "out.bundle")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "out.bundle").exists()


@pytest.mark.slow
def test_a_dry_run_shows_the_head(run: Run, tmp_path: Path) -> None:
    save_clip(tmp_path / "model")
    done = run(
        "export", "-m", tmp_path / "model", "--zero-shot", labels_file(tmp_path), "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["config"]["classes"], document["config"]["head_on"]) == (5, "embedding")
    assert document["output"] == "logits float32"
