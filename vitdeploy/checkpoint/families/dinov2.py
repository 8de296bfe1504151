"""transformers' ``dinov2`` and ``dinov2_with_registers``.

Oquab et al. 2023 (https://arxiv.org/abs/2304.07193), Darcet et al. 2023 (https://arxiv.org/abs/2309.16588):
layer scale, SwiGLU in the largest model, register tokens without positions. The classifier reads the CLS
token beside the mean of the patches. Both interpolate positions in float32 on every call, from a square grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    flat,
    join_halves,
    linear,
)
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

_BODY: Layout = {
    **huggingface.EMBEDDINGS,
    "registers": Source("embeddings.register_tokens", flat(2)),
    **linear("blocks.{i}.norm1", "encoder.layer.{i}.norm1"),
    "blocks.{i}.scale1": Source("encoder.layer.{i}.layer_scale1.lambda1"),
    **linear("blocks.{i}.norm2", "encoder.layer.{i}.norm2"),
    "blocks.{i}.scale2": Source("encoder.layer.{i}.layer_scale2.lambda1"),
    **linear("head", "classifier"),
}
_MLP: Layout = {
    **_BODY,
    **linear("blocks.{i}.mlp.fc1", "encoder.layer.{i}.mlp.fc1"),
    **linear("blocks.{i}.mlp.fc2", "encoder.layer.{i}.mlp.fc2"),
}
_SWIGLU: Layout = {
    **_BODY,
    **linear("blocks.{i}.mlp.fc1", "encoder.layer.{i}.mlp.weights_in"),
    **linear("blocks.{i}.mlp.fc2", "encoder.layer.{i}.mlp.weights_out"),
}


def _mlp_width(config: Mapping[str, object], gated: bool) -> int:
    width = int(config_integer(config, "hidden_size", 768) * config_number(config, "mlp_ratio", 4))
    # SwiGLU keeps two thirds, so that three matrices cost what two did, rounded up to a multiple of 8.
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _read(foreign: Foreign, template: ViTConfig | None, model_type: str) -> Reading:
    renamed, originals = huggingface.file_names(foreign, model_type, vit_mlp=False)
    # A state dict in memory has SwiGLU in halves.
    joined = join_halves(renamed, (".gate_proj.", ".up_proj."), ".weights_in.")
    state = {name.replace(".down_proj.", ".weights_out."): tensor for name, tensor in joined.items()}
    given = foreign.config
    fields: dict[str, object] = {"layer_scale": True, "norm_eps": 1e-6}
    if given is None:
        gated = any(".mlp.weights_in." in name for name in state)
    else:
        gated = bool(given.get("use_swiglu_ffn", False))
        registers = (
            config_integer(given, "num_register_tokens", 4) if model_type == "dinov2_with_registers" else 0
        )
        fields |= {"mlp_width": _mlp_width(given, gated), "gated_mlp": gated, "registers": registers}
        fields["pool"] = "cls_mean" if "classifier.weight" in state else "cls"
    if gated:
        fields["activation"] = "silu"
    layout = _SWIGLU if gated else _MLP
    patch = 16 if model_type == "dinov2_with_registers" else 14
    config = huggingface.config_of(foreign, template, layout, state, patch_size=patch, **fields)
    return huggingface.reading(
        foreign,
        config,
        model_type=model_type,
        layout=layout,
        state=state,
        originals=originals,
        headless=("classifier.",),
        follows_processor=True,
    )


def _names(foreign: Foreign, registers: bool) -> bool:
    scaled = any(name.endswith("layer_scale1.lambda1") for name in foreign.state)
    return scaled and any(name.endswith("register_tokens") for name in foreign.state) == registers


def _family(model_type: str, *, registers: bool) -> Family:
    return Family(
        model_type,
        lambda foreign: huggingface.claims(foreign, model_type, _names(foreign, registers)),
        lambda foreign, template: _read(foreign, template, model_type),
        # Only the model with registers was trained with antialiased interpolation.
        PositionRule(dtype=torch.float32, antialias=registers, square_source=True, even_at_own_size=True),
    )


PLAIN = _family("dinov2", registers=False)
WITH_REGISTERS = _family("dinov2_with_registers", registers=True)
