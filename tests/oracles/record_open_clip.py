"""Record tiny models of open_clip with what they compute, for tests/checkpoint/families/test_open_clip.py.

    pip install open_clip_torch timm && python tests/oracles/record_open_clip.py

Each folder under tests/oracles/open_clip is what open_clip itself saves for the hub, without a tokenizer, and
``answer.safetensors`` in it: inputs at the model's own resolution and at others, and in float64 what it
returns for them, loaded for each by open_clip itself. ``preprocess.safetensors`` has a picture, and what its
transform makes of it in every way to resize.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.timm_model import TimmModel
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent / "open_clip"
TEXT: dict[str, Any] = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
TOWER: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
TRUNK: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
SIZES = [(16, 16), (24, 12), (8, 32)]
"""The own one; another; and one of as many patches."""

# What each adds to what the others prove.
CASES: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": TOWER},
    "quick_gelu": {"vision_cfg": TOWER | {"mlp_ratio": 3.0}, "quick_gelu": True, "custom_text": True},
    "clipa": {
        "vision_cfg": TOWER
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.3}
        | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    },
    "siglip": {
        "vision_cfg": {
            "timm_model_name": "vit_so400m_patch16_siglip_256",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 16,
        },
        "init_logit_bias": -10,
        "custom_text": True,
    },
    "projected_trunk": {
        "vision_cfg": {
            "timm_model_name": "vit_medium_patch16_gap_256",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 16,
        }
    },
    "trunk_with_head": {
        "vision_cfg": {
            "timm_model_name": "vit_large_patch14_clip_224",
            "timm_pool": "token",
            "timm_proj": None,
            "image_size": 16,
        }
    },
}


@contextmanager
def tiny_trunks() -> Iterator[None]:
    """timm builds whatever it is asked for with two narrow blocks, for 16 pixels."""
    create = timm.create_model
    timm.create_model = functools.partial(create, img_size=16, **TRUNK)
    try:
        yield
    finally:
        timm.create_model = create


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "visual.trunk.head.bias":  # as in published models
                parameter.zero_()
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.inference_mode()
def answers(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    model, pixels = model.double().eval(), pixels.double()
    visual = model.visual
    if isinstance(visual, TimmModel):
        tokens = visual.trunk.forward_features(pixels)
        features = visual.trunk.forward_head(tokens, pre_logits=True)
    else:  # its tokens are the patches alone
        features, tokens = visual._pool(visual.transformer(visual._embeds(pixels)))
    found = {"embedding": model.encode_image(pixels, normalize=True), "features": features, "tokens": tokens}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def record(case: str, seed: int) -> None:
    config = {"embed_dim": 16 if case == "siglip" else 12, **CASES[case], "text_cfg": TEXT}
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    folder = HERE / case
    with tiny_trunks():
        model = kind(**config)
        randomise(model, seed)
        open_clip.model.set_model_preprocess_cfg(model, open_clip.transform.PreprocessCfg(size=16).__dict__)
        stored = {**config, "custom_text": True} if kind is CustomTextCLIP else config
        nothing = SimpleNamespace(save_pretrained=lambda folder: None)
        save_for_hf(model, nothing, stored, str(folder), safe_serialization=True)
        record: dict[str, Tensor] = {}
        for size in SIZES:
            generator = torch.Generator().manual_seed(size[0])
            pixels = torch.randn(2, 3, *size, generator=generator).half()
            loaded = open_clip.create_model(f"local-dir:{folder}", force_image_size=size)
            found = {"pixels": pixels, **answers(loaded, pixels)}
            record |= {f"{size[0]}x{size[1]}.{name}": tensor for name, tensor in found.items()}
    save_file(record, folder / "answer.safetensors")


def record_preprocess() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (9, 7, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(small.numpy()).resize((37, 53), Image.Resampling.BICUBIC)
    record = {"picture": torch.tensor(list(picture.tobytes()), dtype=torch.uint8).reshape(53, 37, 3)}
    for mode in ("shortest", "longest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            transform = image_transform(16, False, resize_mode=mode, interpolation=interpolation)
            record[f"{mode}.{interpolation}"] = transform(picture).contiguous()
    save_file(record, HERE / "preprocess.safetensors")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    for seed, case in enumerate(CASES):
        record(case, seed)
    record_preprocess()
    versions = {module.__name__: module.__version__ for module in (open_clip, timm, torch)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
