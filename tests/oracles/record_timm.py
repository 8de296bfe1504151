"""Record tiny timm and torchvision models with what they compute, for tests/families.

    pip install timm torchvision && python tests/oracles/record_timm.py

Each folder under tests/oracles/timm is what timm itself saves for the hub, with ``answer.safetensors`` in it:
inputs at the model's own resolution and at another one, and timm's outputs for both in float64.
tests/oracles/torchvision holds bare state dicts, as torchvision publishes them. ``architectures.json`` lists
what timm builds under its own names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

HERE = Path(__file__).parent
TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
OTHER_SIZE = (24, 12)

# What each adds to what the others prove.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "not_square": ("vit_tiny_patch16_224", {"img_size": (12, 20), "qkv_bias": False}),
    "mean_then_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "no_cls": ("vit_base_patch16_gap_224", {}),
    "registers_mean": ("vit_medium_patch16_reg4_gap_256", {}),
    "registers_with_positions": ("vit_so150m_patch16_reg4_gap_256", {}),
    "tanh_gelu": ("vit_base_patch32_siglip_gap_256", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
    "swiglu": ("vit_giant_patch14_dinov2", {}),
}
LABELS = [f"n{index:02d}" for index in range(5)]


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def images(height: int, width: int) -> Tensor:
    """Values that float16 holds exactly, to be small on disk."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * width)).half()


@torch.inference_mode()
def answer(model: nn.Module, pixels: Tensor) -> Tensor:
    output: Tensor = model.double().eval()(pixels.double()).contiguous()
    return output


def record_timm(case: str, seed: int) -> None:
    name, changes = TIMM[case]
    ratio = {"mlp_ratio": 4.0 if case == "swiglu" else 2.0}
    model = timm.create_model(name, **(TINY | ratio | changes))
    randomise(model, seed)
    folder = HERE / "timm" / case
    labels = {"label_names": LABELS} if model.num_classes else {}
    save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    own, other = images(*model.patch_embed.img_size), images(*OTHER_SIZE)
    # The table is interpolated in the checkpoint's float32, as when timm loads it for another size.
    output = answer(model, own)
    model.float().set_input_size(OTHER_SIZE)
    record = {"pixels": own, "output": output, "other.pixels": other, "other.output": answer(model, other)}
    save_file(record, folder / "answer.safetensors")


def record_torchvision(case: str, seed: int, **changes: Any) -> None:
    sizes = {
        "patch_size": 4,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
        "num_classes": 5,
    }
    build = torchvision.models.VisionTransformer
    model = build(image_size=16, **sizes, **changes)
    randomise(model, seed)
    folder = HERE / "torchvision"
    save_file(model.state_dict(), folder / f"{case}.safetensors")
    own, other = images(16, 16), images(24, 24)
    record = {"pixels": own, "output": answer(model, own), "other.pixels": other}
    larger = build(image_size=24, **sizes, **changes).double()
    larger.load_state_dict(interpolate_embeddings(24, 4, model.double().state_dict()))
    record["other.output"] = answer(larger, other)
    save_file(record, folder / f"{case}.answer.safetensors")


def record_architectures() -> None:
    """What shapes do not tell, of every timm architecture built from VisionTransformer's plain blocks."""
    table: dict[str, dict[str, Any]] = {}
    for name in timm.list_models(["vit_*", "deit*", "flexivit_*", "eva_large_*"]):
        with torch.device("meta"):
            model = timm.create_model(name)
        plain = type(model) in (VisionTransformer, VisionTransformerDistilled)
        if not plain or type(model.blocks[0]) is not Block or model.attn_pool is not None:
            continue
        if "norm_pre.weight" in model.state_dict() or type(model.patch_embed).__name__ != "PatchEmbed":
            continue
        block = model.blocks[0]
        table[name] = {
            "width": model.embed_dim,
            "heads": block.attn.num_heads,
            "activation": type(block.mlp.act).__name__,
            "norm_eps": block.norm1.eps,
            "global_pool": model.global_pool,
        }
    (HERE / "timm" / "architectures.json").write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    for folder in (HERE / "timm", HERE / "torchvision"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for seed, case in enumerate(TIMM):
        record_timm(case, seed)
    record_torchvision("vit", seed=100)
    record_torchvision("representation", seed=101, representation_size=8)
    record_architectures()
    versions = {module.__name__: module.__version__ for module in (timm, torch, torchvision)}
    (HERE / "timm" / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
