"""Zero-shot heads: labels through the text tower and the tokenizer, held against transformers in float64."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.checkpoints import edit_config, edit_weights
from tests.helpers.models import CONFIGS
from tests.helpers.paths import ROOT
from tests.helpers.text_checkpoints import (
    LABELS,
    TEMPLATES,
    byte_pairs,
    clip_tokenizer,
    save_byte_pairs,
    save_clip,
    save_siglip,
    text_embeddings,
)
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.opening import open_model
from vitdeploy.checkpoint.places import from_path
from vitdeploy.checkpoint.texts.head import Head, zero_shot_head
from vitdeploy.checkpoint.texts.prompts import ZeroShot
from vitdeploy.checkpoint.texts.tokenizer import canonical, read_tokenizer
from vitdeploy.config import ViTConfig
from vitdeploy.errors import CheckpointError, UsageError, VitdeployError
from vitdeploy.model import text as text_model

IMAGE = ViTConfig(image_size=(32, 32), patch_size=8, width=48, heads=3, depth=1, classes=0)
CLIP, SIGLIP = ViTConfig(**{**vars(IMAGE), "projection": 24}), IMAGE
SAVE: dict[str, Callable[..., tuple[Any, Any]]] = {"clip": save_clip, "siglip": save_siglip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """By family: the folder, and the model and processor in it."""
    root = tmp_path_factory.mktemp("texts")
    return {family: (root / family, *save(root / family)) for family, save in SAVE.items()}


def head(folder: Path, family: str, labels: Any = LABELS, *templates: str) -> Head:
    foreign, _ = from_path(folder, "the model")
    return zero_shot_head(ZeroShot(labels, templates), CLIP if family == "clip" else SIGLIP, foreign)


def refusal(make: Callable[[], object], kind: type[VitdeployError] = UsageError) -> str:
    with pytest.raises(kind) as error:
        make()
    assert "\n" not in error.value.message
    assert error.value.hint
    assert len(f"{error.value.message}{error.value.hint}") <= 400
    return error.value.message


# --- labels in words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SAVE)
def test_the_head_is_the_scaled_embeddings_of_the_labels(
    family: str, folders: dict[str, tuple[Path, Any, Any]]
) -> None:
    folder, model, processor = folders[family]
    made = head(folder, family)
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, LABELS)
    assert made.labels == LABELS
    assert made.weight.dtype == torch.float64
    assert float((made.weight - expected).abs().max()) < 1e-12
    bias = getattr(model, "logit_bias", torch.zeros(1)).double()
    assert torch.equal(made.bias, bias.expand(len(LABELS)).detach())
    assert made.scores == {"clip": "softmax", "siglip": "sigmoid"}[family]
    assert {"tokenizer.json", "tokenizer_config.json"} == made.files.keys()


@pytest.mark.parametrize("family", SAVE)
def test_several_templates_are_averaged_as_unit_vectors(
    family: str, folders: dict[str, tuple[Path, Any, Any]]
) -> None:
    folder, model, processor = folders[family]
    made = head(folder, family, LABELS, *TEMPLATES)
    for row, label in zip(made.weight, LABELS, strict=True):
        texts = [f"a photo of a {label}", f"{label} in a painting: {label}", f"The {label}."]
        mean = text_embeddings(model, processor, texts).mean(dim=0)
        expected = model.logit_scale.double().exp() * mean / mean.norm()
        assert float((row - expected).abs().max()) < 1e-12
    assert "averaged" in made.notes[0]


def test_the_first_configurations_of_clip_end_at_the_highest_token(tmp_path: Path) -> None:
    model, processor = save_clip(tmp_path, legacy=True)
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, LABELS)
    assert float((head(tmp_path, "clip").weight - expected).abs().max()) < 1e-12


@pytest.mark.slow
def test_both_rules_end_at_the_first_of_several_ends(tmp_path: Path) -> None:
    labels = ("cat <|endoftext|> dog", "cat")
    for name, legacy in (("now", False), ("then", True)):
        model, processor = save_clip(tmp_path / name, legacy=legacy)
        expected = model.logit_scale.double().exp() * text_embeddings(model, processor, labels)
        assert float((head(tmp_path / name, "clip", labels).weight - expected).abs().max()) < 1e-12
        # The same, since nothing behind the end is seen.
        assert float((expected[0] - expected[1]).abs().max()) < 1e-12


def test_an_end_by_position_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the last token is read, not the first end."""
    labels = ("cat <|endoftext|> dog", "cat")
    model, processor = save_clip(tmp_path)
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, labels)
    last = lambda tower, tokens: torch.full((len(tokens),), tokens.shape[1] - 1)  # noqa: E731
    monkeypatch.setattr(text_model.TextTower, "read_at", last)
    assert float((head(tmp_path, "clip", labels).weight - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("family", SAVE)
def test_a_causal_mask_too_much_or_too_little_would_be_seen(
    family: str, folders: dict[str, tuple[Path, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, processor = folders[family]
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, LABELS)
    swapped = {"CausalAttention": text_model.Attention, "Attention": text_model.CausalAttention}
    for name, other in swapped.items():
        monkeypatch.setattr(text_model, name, other)
    assert float((head(folder, family).weight - expected).abs().max()) > 1e-3


def test_what_text_config_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    model, processor = save_clip(
        tmp_path, num_attention_heads=8, hidden_act="quick_gelu", layer_norm_eps=1e-5
    )
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, LABELS)
    stated = model.config.text_config.to_dict()
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    edit_config(tmp_path, text_config={k: v for k, v in stated.items() if k not in names})
    assert float((head(tmp_path, "clip").weight - expected).abs().max()) < 1e-12
    # Of elder files text_config_dict is all of it.
    edit_config(tmp_path, text_config={"eos_token_id": 0}, text_config_dict=stated)
    assert float((head(tmp_path, "clip").weight - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_what_open_clip_s_text_towers_need(tmp_path: Path, name: str) -> None:
    """The logits themselves: tests/cli/test_zero_shot.py."""
    folder = tmp_path / name
    shutil.copytree(ROOT / "tests/oracles/open_clip_texts" / name, folder)
    image = ViTConfig(**{**vars(IMAGE), "projection": 12})

    def made() -> Head:
        return zero_shot_head(ZeroShot(LABELS), image, from_path(folder, "the model")[0])

    assert "no tokenizer beside its weights" in refusal(made, CheckpointError)
    described = folder / "open_clip_config.json"
    stated = json.loads(described.read_text())
    for change, says in (
        ({"hf_model_name": "roberta-base"}, "hf_model_name 'roberta-base' is not supported"),
        ({"pool_type": "first", "no_causal_mask": False}, "pools by 'first' is not supported"),
        ({"pool_type": "argmax", "no_causal_mask": True}, "'argmax' without a causal mask"),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer with {'strip_sep_token': True}"),
        ({"width": 20}, "48x16, must be 48x20" if name == "clip" else "40x16, must be 40x20"),
    ):
        text = stated["model_cfg"]["text_cfg"] | change
        described.write_text(json.dumps({**stated, "model_cfg": stated["model_cfg"] | {"text_cfg": text}}))
        assert says in refusal(made, CheckpointError)
    described.unlink()
    assert "needs the open_clip_config.json" in refusal(made, CheckpointError)


def test_a_head_takes_half_precision_weights_as_they_are(tmp_path: Path) -> None:
    model, processor = save_clip(tmp_path)
    edit_weights(tmp_path, lambda state: state.update({k: v.half() for k, v in state.items()}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    expected = model.logit_scale.double().exp() * text_embeddings(model, processor, LABELS)
    assert float((head(tmp_path, "clip").weight - expected).abs().max()) < 1e-12


# --- the tokenizer ----------------------------------------------------------------------------------------


TEXTS = (
    *LABELS,
    "",
    "  A\tphoto\n of   the CAT ",
    "it's we'll you've 12345 a-b_c 3.14 <|endoftext|> dog",
    "ÉCOLE École e\u0301cole 🙂‍↔️ Straße ǅ",
    "x" * 50,
)


def test_byte_pairs_of_clip_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = clip_tokenizer()
    save_byte_pairs(tmp_path)
    ours = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    for text in TEXTS:
        assert ours(text) == theirs(text)["input_ids"], text
    assert ours.files.keys() == {"vocab.json", "merges.txt"}


def test_tokenizer_json_goes_first_and_neither_pads_nor_cuts(tmp_path: Path) -> None:
    theirs = clip_tokenizer()
    theirs("a", padding="max_length", truncation=True, max_length=7)  # which the file then asks for
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    ours = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    for text in TEXTS:
        assert ours(text) == clip_tokenizer()(text)["input_ids"], text


def test_siglip_has_lower_case_without_punctuation() -> None:
    assert canonical(" A Photo,  of\ta\n'Cat'! ") == "a photo of a cat"
    assert canonical("Möwe № 7 – Straße") == "möwe № 7 – straße"


@pytest.mark.parametrize(
    "kind, same",
    [("SiglipTokenizer", "a cat"), ("GemmaTokenizerFast", "a, cat!"), ("Siglip2Tokenizer", "a, cat!")],
)
def test_the_class_of_a_tokenizer_says_how_texts_are_cleaned(tmp_path: Path, kind: str, same: str) -> None:
    clip_tokenizer().save_pretrained(tmp_path)  # which tells punctuation
    edit_settings(tmp_path, tokenizer_class=kind)
    ours = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    assert ours.clean("A, CAT!") == ours.clean(same) == same
    edit_settings(tmp_path, do_lower_case=False)
    assert read_tokenizer(tmp_path, "the model", "CLIPTokenizer").clean("A, CAT!") == "A, CAT!"


def test_texts_are_padded_with_the_stated_token_on_the_stated_side(tmp_path: Path) -> None:
    vocabulary, _ = byte_pairs()
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    edit_settings(tmp_path, pad_token={"content": "!", "special": True})
    ours = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    bare = ours("cat")
    assert ours.padded("cat", 6) == [*bare, *[vocabulary["!"]] * (6 - len(bare))]
    edit_settings(tmp_path, padding_side="left")
    assert read_tokenizer(tmp_path, "the model", "CLIPTokenizer").padded("cat", 6)[-len(bare) :] == bare
    edit_settings(tmp_path, pad_token=None)
    lacking = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    assert lacking.padded("cat", 2) == bare
    assert "pad_token" in refusal(lambda: lacking.padded("cat", 6), CheckpointError)


def test_a_tokenizer_that_fails_at_a_text(tmp_path: Path) -> None:
    described = {"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    ours = read_tokenizer(tmp_path, "the model", "CLIPTokenizer")
    assert ours("aa") == [0, 0]
    assert "the tokenizer fails at 'cat'" in refusal(lambda: ours("cat"), CheckpointError)


def test_the_files_of_a_tokenizer_are_fetched_from_the_hub(
    folders: dict[str, tuple[Path, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append(set(allow_patterns))
        return str(folders["clip"][0])

    hub = types.ModuleType("huggingface_hub")
    hub.__dict__["snapshot_download"] = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    opened = open_model("owner/name", zero_shot=ZeroShot(LABELS))
    assert opened.labels == LABELS
    open_model("owner/name")
    files = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert files <= asked[0]
    assert asked[1] == asked[0] - files


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what does not fit ------------------------------------------------------------------------------------


def test_what_is_said_of_labels_and_templates(tmp_path: Path) -> None:
    assert "no {}" in refusal(lambda: ZeroShot(["a"], ("a photo",)))
    assert "not with vectors" in refusal(lambda: ZeroShot("a.safetensors", ("{}",)))
    assert "no label" in refusal(lambda: ZeroShot([]))
    assert "'a' stands there 2 times" in refusal(lambda: ZeroShot(["a", "b", "a"]))
    assert "is empty" in refusal(lambda: ZeroShot(["a", " "]))
    twice = tmp_path / "labels.txt"
    twice.write_text("cat\n\ndog\ncat\n", encoding="utf-8")
    assert f"{twice}: the label 'cat'" in refusal(ZeroShot(twice).labels)
    assert "--zero-shot" in refusal(ZeroShot(tmp_path / "none.txt").labels)
    twice.write_text("  Möwe \n猫\n", encoding="utf-8")
    assert ZeroShot(twice).labels() == ("Möwe", "猫")


def test_models_that_take_no_such_head(tmp_path: Path) -> None:
    said = ZeroShot(["a"])
    assert "has a head of 10 classes" in refusal(
        lambda: zero_shot_head(said, CONFIGS["vit"], Foreign("it", {}))
    )
    assert "no text tower" in refusal(lambda: zero_shot_head(said, CLIP, Foreign("it", {})))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: edit_weights(f, lambda s: s.pop("text_projection.weight")),
            "has no text_projection.weight",
        ),
        (
            lambda f: edit_weights(f, lambda s: s.pop("text_model.final_layer_norm.bias")),
            "text_model.final_layer_norm.bias is missing",
        ),
        (
            lambda f: edit_weights(f, lambda s: s.update({"text_model.more": torch.zeros(2)})),
            "text_model.more is unexpected",
        ),
        (
            lambda f: edit_weights(f, lambda s: s.update({"logit_scale": torch.tensor(math.nan)})),
            "logit_scale is not one finite number",
        ),
        (
            lambda f: edit_weights(f, lambda s: s["text_projection.weight"].fill_(math.inf)),
            "not finite",
        ),
        (lambda f: edit_text(f, hidden_size=36), "is 48x32, must be 48x36"),
        (lambda f: edit_text(f, num_attention_heads=5), "not divisible by 5 heads"),
        (lambda f: edit_text(f, num_hidden_layers=10**9), "1000000000 blocks"),
        (lambda f: edit_text(f, hidden_act="snake"), "hidden_act 'snake'"),
        (lambda f: edit_text(f, eos_token_id=1), "no token 1 (eos_token_id)"),
        (lambda f: edit_text(f, eos_token_id=[1, 2]), "eos_token_id must be a whole number"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer beside its weights"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer can be made of tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "tokenizer.json").rename(f / "spiece.model"), "as spiece.model alone"),
    ],
)
def test_a_text_tower_or_tokenizer_that_is_spoilt(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    save_clip(tmp_path)
    spoil(tmp_path)
    assert says in refusal(lambda: head(tmp_path, "clip"), CheckpointError)


def edit_text(folder: Path, **changes: Any) -> None:
    stated = json.loads((folder / "config.json").read_text())["text_config"]
    edit_config(folder, text_config=stated | changes)


@pytest.mark.slow
def test_texts_that_are_too_long_or_of_another_tokenizer(
    tmp_path: Path, folders: dict[str, tuple[Path, Any, Any]]
) -> None:
    for family in SAVE:
        message = refusal(lambda family=family: head(folders[family][0], family, ["y" * 80]))
        assert "tokens, the text tower reads" in message
    save_clip(tmp_path)
    edit_weights(tmp_path, lambda state: state.pop("logit_scale"))
    assert "the model has no logit_scale" in refusal(lambda: head(tmp_path, "clip"))
    save_clip(tmp_path, vocab_size=300)
    assert "the text tower has 300" in refusal(lambda: head(tmp_path, "clip"), CheckpointError)


def test_images_and_texts_of_different_widths(folders: dict[str, tuple[Path, Any, Any]]) -> None:
    message = refusal(lambda: head(folders["clip"][0], "siglip"))
    assert "embeds images into 48 numbers, the text tower texts into 24" in message


def test_the_library_is_named_where_it_is_missing(
    folders: dict[str, tuple[Path, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(VitdeployError, match="needs the library 'tokenizers'") as error:
        head(folders["clip"][0], "clip")
    assert error.value.exit_code == 3
    assert error.value.hint == 'pip install "vitdeploy[zero-shot]"'


# --- ready-made vectors -----------------------------------------------------------------------------------


def vectors(folder: Path, rows: dict[str, Tensor], **metadata: str) -> Path:
    path = folder / "vectors.safetensors"
    save_file(rows, path, metadata=metadata or None)
    return path


ROWS = {"dog": torch.eye(24)[3] * 2, "cat": torch.eye(24)[1], "Möwe": torch.ones(24)}


def from_vectors(path: Path, **state: Tensor) -> Head:
    return zero_shot_head(ZeroShot(path), CLIP, Foreign("the model", state))


def test_vectors_stand_for_labels_in_alphabetic_order(tmp_path: Path) -> None:
    made = from_vectors(vectors(tmp_path, ROWS), logit_scale=torch.tensor(math.log(50.0)))
    assert made.labels == ("Möwe", "cat", "dog")
    unit = np.stack([np.ones(24) / math.sqrt(24), np.eye(24)[1], np.eye(24)[3]])
    assert np.abs(made.weight.numpy() - 50 * unit).max() < 1e-4  # the logarithm is of float32
    assert made.bias.tolist() == [0.0] * 3
    assert made.scores == "softmax"
    assert len(made.notes) == 2
    assert "lengths 1 to 4.9 are normalised" in made.notes[1]
    assert made.files.keys() == {"vectors.safetensors"}


def test_a_bias_makes_each_label_an_answer_of_its_own(tmp_path: Path) -> None:
    state = {"logit_scale": torch.tensor([2.0]), "logit_bias": torch.tensor([-3.0])}
    made = from_vectors(vectors(tmp_path, ROWS), **state)
    assert made.bias.tolist() == [-3.0] * 3
    assert made.scores == "sigmoid"
    # What the file states goes first, and is of one model.
    made = from_vectors(vectors(tmp_path, ROWS, logit_scale="0"), **state)
    assert float(made.weight[1].norm()) == pytest.approx(1.0)
    assert made.scores == "softmax"
    made = from_vectors(vectors(tmp_path, ROWS, logit_scale="0", logit_bias="-1.5"))
    assert made.bias.tolist() == [-1.5] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_precision_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    row = torch.randn(24, dtype=torch.float64)
    path = vectors(tmp_path, {"a": (row / row.norm()).to(dtype)}, logit_scale="0")
    made = from_vectors(path)
    assert float(made.weight.norm()) == pytest.approx(1.0, abs=1e-12)
    assert "the softmax of a single label is 1" in made.notes[-1]


@pytest.mark.parametrize(
    "rows, metadata, says",
    [
        ({}, {}, "holds no tensors"),
        ({"a": torch.ones(24), "b": torch.ones(23)}, {}, "'b' is 23 of float32"),
        ({"a": torch.ones(23)}, {"logit_scale": "1"}, "embeds images into 24 numbers"),
        ({"a": torch.ones(1, 24)}, {}, "'a' is 1x24"),
        ({"a": torch.ones(24, dtype=torch.int32)}, {}, "'a' is 24 of int32"),
        ({"a": torch.ones(())}, {}, "a scalar"),
        ({"a": torch.zeros(24)}, {"logit_scale": "1"}, "the vector of 'a' is all zeros"),
        ({"a": torch.full((24,), math.nan)}, {"logit_scale": "1"}, "the vector of 'a' is not finite"),
        ({" ": torch.ones(24)}, {}, "a label is empty"),
        ({"a": torch.ones(24)}, {}, "vectors.safetensors has a logit_scale"),
        ({"a": torch.ones(24)}, {"logit_bias": "1"}, "a logit_bias without a logit_scale"),
        ({"a": torch.ones(24)}, {"logit_scale": "much"}, "logit_scale in its metadata is 'much'"),
        ({"a": torch.ones(24)}, {"logit_scale": "inf"}, "no number"),
        ({"a": torch.ones(24)}, {"logit_scale": "100"}, "logit_scale 100 is the logarithm"),
    ],
)
def test_vectors_that_are_none(
    tmp_path: Path, rows: dict[str, Tensor], metadata: dict[str, str], says: str
) -> None:
    assert says in refusal(lambda: from_vectors(vectors(tmp_path, rows, **metadata)))


def test_a_file_that_holds_no_vectors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"cat\ndog\n")
    assert "truncated" in refusal(lambda: from_vectors(path))
    assert "No such file" in refusal(lambda: from_vectors(tmp_path / "b.safetensors"))
