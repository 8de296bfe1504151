"""transformers' ``vit``, and what is a ViT under another name: ``vit_msn`` and ``vit_mae``.

ViTForImageClassification, ViTModel without a head; Masked Siamese Networks (Assran et al. 2022,
https://arxiv.org/abs/2204.07141); the encoder of Masked Autoencoders (He et al. 2021,
https://arxiv.org/abs/2111.06377), which is given every patch here. Their files are read alike.
"""

from __future__ import annotations

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import Family, Foreign, Layout, Reading, linear
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

_LAYOUT: Layout = {**huggingface.EMBEDDINGS, **huggingface.VIT_BLOCK, **linear("head", "classifier")}


def _claims(foreign: Foreign, model_type: str) -> bool:
    other = ("distillation_token", "layer_scale1.lambda1")
    by_name = model_type == "vit" and not any(name.endswith(other) for name in foreign.state)
    return huggingface.claims(foreign, model_type, by_name)


def _read(foreign: Foreign, template: ViTConfig | None, model_type: str, norm_eps: float) -> Reading:
    state, originals = huggingface.file_names(foreign, "vit", vit_mlp=True)
    config = huggingface.config_of(foreign, template, _LAYOUT, state, norm_eps=norm_eps)
    headless: tuple[str, ...] = ("classifier.", "decoder.")
    if not any(name.startswith("vit.encoder.") for name in foreign.state):
        headless = (*headless, "encoder.")  # ViTMSNForImageClassification
    return huggingface.reading(
        foreign,
        config,
        model_type=model_type,
        prefix="vit",
        layout=_LAYOUT,
        state=state,
        originals=originals,
        headless=headless,
    )


def _family(model_type: str, norm_eps: float) -> Family:
    return Family(
        model_type,
        lambda foreign: _claims(foreign, model_type),
        lambda foreign, template: _read(foreign, template, model_type, norm_eps),
        PositionRule(square_source=True),
    )


FAMILY = _family("vit", 1e-12)
MSN = _family("vit_msn", 1e-6)
MAE = _family("vit_mae", 1e-12)
