"""Checkpoints laid out as people have them, each opened as a whole: what is read of it, and what is said."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import TINY, opened, refusal
from tests.helpers.paths import ORACLES
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference


def of_transformers(folder: Path, **changes: Any) -> Path:
    """What ``save_pretrained`` writes."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**TINY, **changes})
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def of_timm(**changes: Tensor) -> dict[str, Tensor]:
    """timm's state dict of a tiny ViT, of 16 patches of 4x4 pixels."""
    return load_file(ORACLES / "timm" / "vit" / "model.safetensors") | changes


@pytest.mark.parametrize(
    "changes, scores, labels",
    [
        (
            {"id2label": dict(enumerate("abcd")), "problem_type": "multi_label_classification"},
            "sigmoid",
            ("a", "b", "c", "d"),
        ),
        ({"num_labels": 1}, "sigmoid", ("LABEL_0",)),
        ({"num_labels": 1, "problem_type": "regression"}, "none", ("LABEL_0",)),
        ({"num_labels": 4}, "softmax", ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")),
    ],
    ids=["multilabel", "one_logit", "regression", "usual"],
)
def test_what_logits_mean(
    tmp_path: Path, changes: dict[str, Any], scores: str, labels: tuple[str, ...]
) -> None:
    """As transformers' image classification pipeline takes them."""
    model = opened(str(of_transformers(tmp_path / "model", **changes)))
    assert (model.scores, model.labels) == (scores, labels)


def test_shards_of_pickles_give_transformers_logits(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "sharded_bin")
    original = transformers.ViTForImageClassification.from_pretrained(folder).double().eval()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"pytorch_model-00001-of-00002.bin": sorted(state)[:20]}
    parts["pytorch_model-00002-of-00002.bin"] = sorted(state)[20:]
    for part, names in parts.items():
        torch.save({name: state[name] for name in names}, folder / part)
    index = {"weight_map": {name: part for part, names in parts.items() for name in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model, pixels = opened(str(folder)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours = forward_float64(build_reference(model.config, model.state), pixels)
    with torch.inference_mode():
        torch.testing.assert_close(ours, original(pixels).logits, rtol=0, atol=1e-10)


def averaged() -> object:
    raw = {name: tensor + 1 for name, tensor in of_timm().items()}
    return {"state_dict": raw, "state_dict_ema": of_timm(), "epoch": 9}


TRAINING: dict[str, tuple[Callable[[], object], str]] = {
    "ema.pth": (averaged, "weights taken from 'state_dict_ema' of ema.pth, not from 'state_dict' beside it"),
    "checkpoint-best.pth": (
        lambda: {"model": of_timm(), "args": argparse.Namespace(a=1)},
        "weights taken from 'model' of checkpoint-best.pth",
    ),
    "last.pt": (
        lambda: {"state_dict": {f"model.{name}": tensor for name, tensor in of_timm().items()}},
        "the prefix 'model.' of every name was dropped",
    ),
    "model_best.pth.tar": (
        lambda: {"state_dict": of_timm(), "epoch": 9},
        "weights taken from 'state_dict' of model_best.pth.tar",
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_files_of_training_scripts(tmp_path: Path, name: str) -> None:
    content, note = TRAINING[name]
    torch.save(content(), tmp_path / name)
    model = opened(str(tmp_path / name))
    assert note in model.notes
    assert torch.equal(model.state["norm.weight"], of_timm()["norm.weight"])


def test_the_mean_of_the_patches_is_told_by_its_norm(tmp_path: Path) -> None:
    """``global_pool="avg"`` of timm has its LayerNorm behind the mean, under a name of its own."""
    state = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t
        for name, t in of_timm().items()
    }
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "checkpoint-best.pth")
    model = opened(str(tmp_path / "checkpoint-best.pth"))
    assert (model.config.pool, model.config.final_norm) == ("mean", "pooled")


def test_a_rotary_model_of_timm(tmp_path: Path) -> None:
    """vit_*_rope_ape_* has the tensor names of DeiT III: its name alone tells."""
    save_file(load_file(ORACLES / "timm" / "deit3" / "model.safetensors"), tmp_path / "model.safetensors")
    config = {"architecture": "vit_small_patch16_rope_ape_224", "num_classes": 5, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(str(tmp_path))
    assert "timm's architecture vit_small_patch16_rope_ape_224 (other rotary" in error.message


def test_torchvision_with_a_plain_head(tmp_path: Path) -> None:
    state = load_file(ORACLES / "torchvision" / "vit.safetensors")
    torch.save(
        {name.replace("heads.head.", "heads."): t for name, t in state.items()}, tmp_path / "tv_heads.pth"
    )
    model = opened(str(tmp_path / "tv_heads.pth"))
    assert torch.equal(model.state["head.bias"], state["heads.head.bias"])


def test_patches_that_are_no_square(tmp_path: Path) -> None:
    torch.save(of_timm(), tmp_path / "rect.pth")
    square, asked = (opened(str(tmp_path / "rect.pth"), image_size=size) for size in (None, (8, 32)))
    assert (square.config.image_size, asked.config.image_size) == ((16, 16), (8, 32))
    assert any("settles it" in note for note in square.notes)
    assert torch.equal(asked.state["pos_embed"], of_timm()["pos_embed"][0])


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "lfs")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 346293852\n"
    (folder / "model.safetensors").write_text(pointer)
    error = refusal(str(folder))
    assert "is a Git LFS pointer" in error.message
    assert "git lfs pull" in (error.hint or "")


def test_transformers_with_a_dropout_before_its_head(tmp_path: Path) -> None:
    folder = of_transformers(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    moved = {name.replace("classifier.", "classifier.1."): tensor for name, tensor in state.items()}
    save_file(moved, folder / "model.safetensors")
    model = opened(str(folder))
    assert torch.equal(model.state["head.weight"], state["classifier.weight"])
    assert "the head is the linear layer 'classifier.1'" in model.notes
