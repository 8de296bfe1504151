"""Record tiny models of timm's class Eva with what they compute, for tests/checkpoint/families.

    pip install timm torchvision scikit-learn && python tests/oracles/record_timm_eva.py

Each folder under tests/oracles/timm_eva is what timm itself saves for the hub, with ``answer.safetensors`` in
it: at the model's own resolution and at another one (``other.``) inputs, timm's outputs and tokens in
float64, and its table of sines and cosines; and what timm makes of a photograph with its own transform, in
float32.
"""

from __future__ import annotations

import shutil
from typing import Any

import timm
import torch
from PIL import Image
from record_timm import HERE, OTHER_SIZE, TINY, answer, images, randomise
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

# What each adds to what the others prove.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02_apart": ("eva02_base_patch14_224", {"img_size": (12, 20)}),
    "dinov3": ("vit_small_patch16_dinov3", {"num_classes": 0}),
    "dinov3_gated": ("vit_small_plus_patch16_dinov3_qkvb", {"global_pool": "token"}),
    "registers_alone": ("vit_betwixt_patch16_rope_reg4_gap_256", {}),
}


@torch.inference_mode()
def described(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    output = answer(model, pixels)
    tokens: Tensor = model.forward_features(pixels.double())
    table: Tensor = model.rope.get_embed(shape=model.patch_embed.dynamic_feat_size(pixels.shape[2:]))
    return {"pixels": pixels, "output": output, "tokens": tokens.contiguous(), "rope": table.contiguous()}


@torch.inference_mode()
def photograph(model: nn.Module) -> Tensor:
    size = {"input_size": (3, *model.patch_embed.img_size)}
    transform = create_transform(**resolve_data_config(size, model=model), is_training=False)
    image = Image.fromarray(load_sample_images().images[0])
    output: Tensor = model.float().eval()(transform(image)[None])[0].contiguous()
    return output


def record(case: str, seed: int) -> None:
    name, changes = CASES[case]
    model = timm.create_model(name, **{**TINY, "num_classes": 12, **changes})
    randomise(model, seed)
    folder = HERE / "timm_eva" / case
    save_for_hf(model, folder, safe_serialization=True)
    made = {"photograph": photograph(model), **described(model, images(*model.patch_embed.img_size))}
    # The table is interpolated in the checkpoint's float32, as when timm loads it for another size.
    model.float().set_input_size(OTHER_SIZE)
    other = described(model, images(*OTHER_SIZE))
    save_file(made | {f"other.{key}": value for key, value in other.items()}, folder / "answer.safetensors")


def main() -> None:
    for seed, case in enumerate(CASES):
        shutil.rmtree(HERE / "timm_eva" / case, ignore_errors=True)
        record(case, seed)


if __name__ == "__main__":
    main()
