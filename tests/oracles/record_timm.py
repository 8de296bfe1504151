"""Record tiny timm and torchvision models with what they compute, for tests/families.

    pip install timm torchvision && python tests/oracles/record_timm.py

Each folder under tests/oracles/timm, timm_beit and timm_eva is what timm itself saves for the hub, with
``answer.safetensors`` in it: inputs at the model's own resolution and at another one, and timm's outputs for
both in float64. tests/oracles/torchvision holds bare state dicts, as torchvision publishes them.
``architectures.json`` and ``look_alikes.json`` list what timm builds under its own names.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import (
    GluMlp,
    GroupNormAct,
    HybridEmbed,
    Mlp,
    PatchEmbed,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    StdConv2dSame,
    SwiGLU,
)
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import save_for_hf
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import Attention, Block, VisionTransformer
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
    "clip": ("vit_base_patch32_clip_quickgelu_224", {}),
    "siglip": ("vit_so400m_patch16_siglip_256", {}),
    "siglip_features": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
}
# The same of its BEiT.
BEIT: dict[str, tuple[str, dict[str, Any]]] = {
    "each": ("beit_base_patch16_224", {}),
    "not_square": ("beit_large_patch16_224", {"img_size": (12, 20)}),
    "shared": (
        "beit_base_patch16_384",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    ),
    "token": ("beitv2_base_patch16_224", {"global_pool": "token", "qkv_bias": False}),
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


def record_timm(case: str, seed: int, library: str, name: str, changes: dict[str, Any]) -> None:
    ratio = {"mlp_ratio": 4.0 if case == "swiglu" else 2.0}
    model = timm.create_model(name, **(TINY | ratio | changes))
    randomise(model, seed)
    folder = HERE / library / case
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


# Names of a plain ViT's tensors, with i for the number of the block.
TENSORS = re.compile(
    r"(cls_token|dist_token|reg_token|pos_embed|patch_embed\.proj\.\w+|(fc_)?norm\.\w+|head(_dist)?\.\w+"
    r"|norm_pre\.\w+|attn_pool\.(latent|(q|kv|proj|norm|mlp\.fc[12])\.\w+)"
    r"|blocks\.\d+\.(norm[12]\.\w+|attn\.(qkv|proj)\.\w+|ls[12]\.gamma|mlp\.fc[12]\.\w+))"
)


def is_plain(model: nn.Module) -> bool:
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return False
    block, names = model.blocks[0], list(model.state_dict())
    return (
        (type(block), type(block.attn), type(model.patch_embed)) == (Block, Attention, PatchEmbed)
        and isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.mlp, Mlp | GluMlp)
        and not model.pool_include_prefix
        and not (model.attn_pool is not None and model.num_prefix_tokens)
        and all(TENSORS.fullmatch(name) for name in names)
        and not {"norm.bias", "fc_norm.bias"}.isdisjoint(names)
    )


def facts(model: nn.Module) -> dict[str, Any]:
    block = model.blocks[0]
    return {
        "width": model.embed_dim,
        "heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__,
        "norm_eps": block.norm1.eps,
        "global_pool": model.global_pool,
        "image_size": list(model.patch_embed.img_size),
        "patch_size": model.patch_embed.patch_size[0],
    }


def is_rotary(model: nn.Module) -> bool:
    """Of timm's class Eva, those that turn queries and keys, and do nothing else that is new."""
    if type(model) is not Eva or type(model.rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        return False
    return (
        all((type(block), type(block.attn)) == (EvaBlock, EvaAttention) for block in model.blocks)
        and all(type(block.mlp) in (Mlp, GluMlp, SwiGLU) for block in model.blocks)
        and all(type(block.norm1) is type(model.blocks[0].norm1) for block in model.blocks)
        and isinstance(model.blocks[0].norm1, nn.LayerNorm)
        and isinstance(model.norm_pre, nn.Identity)
        and model.attn_pool is None
        and (model.rope.grid_offset, model.rope.grid_indexing) == (0, "ij")
        and not any(".attn.q_norm." in name or ".attn.norm." in name for name in model.state_dict())
        and not any(".attn.gate." in name for name in model.state_dict())
    )


def rotary_facts(model: nn.Module) -> dict[str, Any]:
    rope, block = model.rope, model.blocks[0]
    return {
        "width": model.embed_dim,
        "heads": block.attn.num_heads,
        "norm_eps": block.norm1.eps,
        "rope": type(rope).__name__,
        "temperature": rope.temperature,
        "grid": getattr(rope, "ref_feat_shape", None),
        "halves": rope.rotate_half,
        "gated": not isinstance(block.mlp, Mlp),
        "table": model.pos_embed is not None,
        "activation": type(block.mlp.act).__name__,
    }


def is_hybrid(model: nn.Module) -> bool:
    """Of plain blocks behind a ResNetV2 with standardised weights and GroupNorm, padded as SAME."""
    embed = model.patch_embed
    if type(model) is not VisionTransformer or type(embed) is not HybridEmbed:
        return False
    stem = getattr(embed.backbone, "stem", embed.backbone)
    convolutions = [layer for layer in embed.backbone.modules() if isinstance(layer, nn.Conv2d)]
    return (
        (type(model.blocks[0]), type(model.blocks[0].attn)) == (Block, Attention)
        and (type(embed.backbone) is ResNetV2 or stem is embed.backbone)
        and type(getattr(stem, "pool", None)) is MaxPool2dSame
        and all(type(layer) is StdConv2dSame for layer in convolutions)
        and any(type(layer) is GroupNormAct for layer in embed.backbone.modules())
    )


def hybrid_facts(model: nn.Module) -> dict[str, Any]:
    backbone = model.patch_embed.backbone
    stem = getattr(backbone, "stem", backbone)
    convolutions = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.GroupNorm)]
    (groups,), (group_eps,) = {norm.num_groups for norm in norms}, {norm.eps for norm in norms}
    (weight_eps,) = {layer.eps for layer in convolutions}
    return {
        **facts(model),
        "grid": list(model.patch_embed.grid_size),
        "stages": [len(stage.blocks) for stage in getattr(backbone, "stages", [])],
        "stem_width": stem.conv.out_channels,
        "groups": groups,
        "group_eps": group_eps,
        "weight_eps": weight_eps,
    }


def record_architectures() -> None:
    """What timm builds with a ViT's tensor names: what shapes do not tell of those read; the others."""
    plain: dict[str, dict[str, Any]] = {}
    beit: dict[str, dict[str, Any]] = {}
    rotary: dict[str, dict[str, Any]] = {}
    hybrid: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        names = model.state_dict().keys()
        queries = ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_proj.weight")
        if "patch_embed.proj.weight" not in names or names.isdisjoint(queries):
            continue
        if is_rotary(model):
            rotary[name] = rotary_facts(model)
        elif type(model) is Beit:
            beit[name] = facts(model)
        elif is_hybrid(model):
            hybrid[name] = hybrid_facts(model)
        elif is_plain(model):
            plain[name] = facts(model)
        else:
            others.append(name)
    for library, found in (
        ("timm", plain),
        ("timm_beit", beit),
        ("timm_eva", rotary),
        ("timm_hybrid", hybrid),
    ):
        (HERE / library / "architectures.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "timm" / "look_alikes.json").write_text(json.dumps(others, indent=1) + "\n")


def main() -> None:
    for folder in (HERE / "timm", HERE / "timm_beit", HERE / "torchvision"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for library, cases in (("timm", TIMM), ("timm_beit", BEIT)):
        for seed, (case, (name, changes)) in enumerate(cases.items()):
            record_timm(case, seed, library, name, changes)
    record_torchvision("vit", seed=100)
    record_torchvision("representation", seed=101, representation_size=8)
    record_architectures()
    versions = {module.__name__: module.__version__ for module in (timm, torch, torchvision)}
    for library in ("timm", "timm_beit"):
        (HERE / library / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
