"""Record tiny open_clip models with their logits of images and labels, for zero-shot heads.

    pip install open_clip_torch transformers && python -m tests.oracles.record_open_clip_texts

Each folder under tests/oracles/open_clip_texts is a folder of open_clip's without a tokenizer, with
``answer.safetensors`` in it: pixels, the tokens of the labels (by the tokenizers of a few words in
tests/helpers), and open_clip's logits of each image in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file

from tests.helpers.text_checkpoints import (
    CLIP_LENGTH,
    LABELS,
    SIGLIP_LENGTH,
    clip_tokenizer,
    siglip_tokenizer,
)

HERE = Path(__file__).parent / "open_clip_texts"
VISION = {"image_size": 16, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.0}
TEXT = {"width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.0}

MODELS: dict[str, dict[str, Any]] = {
    "clip": {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"context_length": CLIP_LENGTH},
    },
    "siglip": {
        "embed_dim": 12,
        "init_logit_bias": -3,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT
        | {
            "context_length": SIGLIP_LENGTH,
            "hf_tokenizer_name": "a/tokenizer",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    },
}


def record(name: str, seed: int) -> None:
    settings = MODELS[name]
    tokenizer = clip_tokenizer() if name == "clip" else siglip_tokenizer()
    settings["text_cfg"]["vocab_size"] = len(tokenizer)
    clean = get_clean_fn(settings["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "lower"))
    length = settings["text_cfg"]["context_length"]
    rows = [tokenizer(clean(label))["input_ids"] for label in LABELS]
    # CLIP's own tokenizer fills up with token 0, which is behind the end.
    filling = 0 if name == "clip" else tokenizer.pad_token_id
    tokens = torch.tensor([row + [filling] * (length - len(row)) for row in rows])

    generator = torch.Generator().manual_seed(seed)
    build = {key: value for key, value in settings.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if settings.get("custom_text") else open_clip.CLIP
    model = kind(**build).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    described = {
        "model_cfg": settings,
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    pixels = torch.randn(2, 3, 16, 16, generator=generator).half()
    with torch.inference_mode():
        logits = model.double().get_logits(pixels.double(), tokens)[0]
    save_file(
        {"pixels": pixels, "tokens": tokens, "logits": logits.contiguous()}, folder / "answer.safetensors"
    )


if __name__ == "__main__":
    for number, model_name in enumerate(MODELS):
        record(model_name, number)
    versions = {"open_clip": open_clip.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
