"""CLIP and SigLIP with random weights and a tokenizer of a few words, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

from tests.helpers.exact import Exact

LABELS = ("cat", "a dog", "Möwe", "猫", "Zug № 7, it's late!")
"""Words of the tokenizers, other words, and what is not ASCII."""
TEMPLATES = ("a photo of a {}", "{} in a painting: {}", "The {}.")
_WORDS = ("photo", "of", "cat", "dog", "the", "painting", "in")
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP_LENGTH, SIGLIP_LENGTH = 48, 40


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges like CLIP's: every byte, inside and at the end of a word, and some words."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                vocabulary.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"])
    return {token: number for number, token in enumerate(tokens)}, merges


def clip_tokenizer() -> Any:
    vocabulary, merges = byte_pairs()
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def save_byte_pairs(folder: Path) -> None:
    """The two files that CLIP's first checkpoints have, instead of ``tokenizer.json``."""
    vocabulary, merges = byte_pairs()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer.json").unlink(missing_ok=True)


def siglip_tokenizer() -> Any:
    """Words and letters; canonical, with an end, padded with the end: as SigLIP's ``tokenizer.json``."""
    pieces = ["<unk>", "</s>", *(f"▁{word}" for word in (*_WORDS, "a")), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    scores = [(piece, 0.0 if i < 2 else -1.0 - len(piece) ** 0.5 / 10) for i, piece in enumerate(pieces)]
    library = Tokenizer(models.Unigram(scores, unk_id=0))
    library.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=SIGLIP_LENGTH,
        model_input_names=["input_ids"],
    )


def _shaken(model: Any) -> Any:
    """No parameter zero or one, so that each shows in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


def save_clip(folder: Path, *, legacy: bool = False, **text: Any) -> tuple[Any, Any]:
    """A ``CLIPModel`` with its processor; both are returned.

    Args:
        legacy: the ``eos_token_id`` 2 of the first configurations.
    """
    tokenizer = clip_tokenizer()
    torch.manual_seed(5)
    config = transformers.CLIPConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CLIP_LENGTH,
            "eos_token_id": 2 if legacy else tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **text,
        },
        vision_config=VISION,
        projection_dim=24,
    )
    model = _shaken(transformers.CLIPModel(config))
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    return _saved(folder, model, transformers.CLIPProcessor(images, tokenizer))


def save_siglip(folder: Path, **text: Any) -> tuple[Any, Any]:
    """A ``SiglipModel`` with its processor; both are returned."""
    tokenizer = siglip_tokenizer()
    torch.manual_seed(6)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": SIGLIP_LENGTH, **text}
    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": VISION["hidden_size"], **text}, vision_config=VISION
    )
    model = transformers.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-1.7)
    images = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _saved(folder, _shaken(model), transformers.SiglipProcessor(images, tokenizer))


def _saved(folder: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # A processor of several parts writes one file for them; the published folders have one for images.
    processor.image_processor.save_pretrained(folder)
    return model, processor


def text_inputs(processor: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    padding = "max_length" if isinstance(processor, transformers.SiglipProcessor) else True
    inputs: dict[str, torch.Tensor] = dict(processor(text=list(texts), padding=padding, return_tensors="pt"))
    return inputs


def text_embeddings(model: Any, processor: Any, texts: Sequence[str]) -> torch.Tensor:
    """The original's embeddings of texts in float64, each of length 1, (N, E)."""
    with torch.inference_mode(), Exact():
        found = model.double().get_text_features(**text_inputs(processor, texts))
        rows: torch.Tensor = getattr(found, "pooler_output", found)
        return rows / rows.norm(dim=1, keepdim=True)


def logits_per_image(model: Any, processor: Any, pixels: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """The original's logits of images in float64, (images, texts)."""
    with torch.inference_mode(), Exact():
        inputs = text_inputs(processor, texts)
        found: torch.Tensor = model.double()(pixel_values=pixels.double(), **inputs).logits_per_image
        return found
