"""Record tiny models of timm's Swin and Swin v2 with what they compute, for tests/checkpoint/families.

    pip install timm && python tests/oracles/record_timm_swin.py

Each folder under tests/oracles/timm_swin is what timm itself saves for the hub, with ``answer.safetensors``
in it: for images of several sizes, ``HxW.pixels``, timm's logits for them in float64, ``HxW.output``. A size
that is not the model's own is what ``create_model(..., img_size=HxW)`` makes of the checkpoint, whose tables
of relative positions are resized in float32. ``architectures.json`` is what timm builds of the two classes,
``look_alikes.json`` what it builds with their tensor names and other code.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import timm
import torch
from record_timm import HERE, LABELS, answer, images, randomise
from safetensors.torch import save_file
from timm.models import save_for_hf, swin_transformer, swin_transformer_v2
from torch import nn

FOLDER = HERE / "timm_swin"
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 2),
    "window_size": 4,
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
SQUARE, NOT_SQUARE, PADDED, SMALL = (32, 32), (32, 64), (40, 52), (8, 8)
SIZES = (SQUARE, NOT_SQUARE, PADDED, SMALL, (8, 40))

# What each adds to what the others prove: its architecture, its arguments, its sizes.
CASES: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "v1": (V1, {"depths": (2, 2), "num_heads": (1, 2)}, SIZES),
    "v1_small": (V1, {"img_size": SMALL}, (SMALL, SQUARE)),
    "v1_narrow": (V1, {"img_size": (8, 40)}, ((8, 40),)),
    "v1_bare": (V1, {"num_classes": 0, "qkv_bias": False}, (SQUARE,)),
    "s3": ("swin_s3_tiny_224", {"window_size": (2, 4, 2)}, (SQUARE, PADDED)),
    "v2": (V2, {"depths": (2, 2), "num_heads": (1, 2)}, SIZES),
    "v2_fine_tuned": (
        "swinv2_base_window12to16_192to256",
        {"depths": (2, 2), "num_heads": (1, 2), "pretrained_window_sizes": (3, 2)},
        (SQUARE, PADDED),
    ),
}
MODULES: dict[type, Any] = {
    swin_transformer.SwinTransformer: swin_transformer,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2,
}


def spread(model: nn.Module) -> None:
    """Scores that tell neighbours apart, beyond what version 2 allows in one head."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter += torch.linspace(0, 3, parameter.numel()).reshape(parameter.shape)
            if name.endswith("relative_position_bias_table"):
                parameter *= 4


def at_size(model: nn.Module, name: str, arguments: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """The model as timm loads its checkpoint for another size."""
    other = timm.create_model(name, **(arguments | {"img_size": size}))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other.load_state_dict(MODULES[type(model)].checkpoint_filter_fn(state, other))
    return other


def record(case: str, seed: int) -> None:
    name, changes, sizes = CASES[case]
    arguments = TINY | changes
    model = timm.create_model(name, **arguments)
    randomise(model, seed)
    spread(model)
    folder = FOLDER / case
    labels = {"label_names": LABELS} if model.num_classes else {}
    save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    made = {}
    for size in sizes:
        pixels, key = images(*size), f"{size[0]}x{size[1]}"
        sized = at_size(model, name, arguments, size)
        made[f"{key}.pixels"] = pixels
        made[f"{key}.output"] = answer(sized, pixels)
    save_file(made, folder / "answer.safetensors")


def windows(model: nn.Module) -> list[list[int]]:
    return [list(window) for window in model._ref_window_sizes]


def record_architectures() -> None:
    known: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        names = model.state_dict().keys()
        if type(model) in MODULES:
            attention = model.layers[0].blocks[0].attn
            known[name] = {
                "version": 2 if hasattr(attention, "logit_scale") else 1,
                "width": model.embed_dim,
                "depths": [len(stage.blocks) for stage in model.layers],
                "heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
                "windows": windows(model),
                "pretrained_windows": [
                    list(getattr(stage.blocks[0].attn, "pretrained_window_size", (0, 0)))
                    for stage in model.layers
                ],
                "image_size": list(model.patch_embed.img_size),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        elif (
            "patch_embed.proj.weight" in names and any(n.startswith("layers.0.blocks.0.attn.") for n in names)
        ) or any(key.startswith("stages.0.blocks.0.attn.logit_scale") for key in names):
            others.append(name)
    (FOLDER / "architectures.json").write_text(json.dumps(known, indent=1) + "\n")
    (FOLDER / "look_alikes.json").write_text(json.dumps(others, indent=1) + "\n")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for seed, case in enumerate(CASES):
        record(case, seed)
    record_architectures()
    versions = {module.__name__: module.__version__ for module in (timm, torch)}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
