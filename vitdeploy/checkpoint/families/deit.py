"""transformers' ``deit``: a distillation token, and with the teacher a second head on it.

Touvron et al. 2021 (https://arxiv.org/abs/2012.12877). DeiTForImageClassification reads the CLS token alone;
DeiTForImageClassificationWithTeacher averages both heads' logits at inference.
"""

from __future__ import annotations

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    flat,
    linear,
)
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

_BODY: Layout = {
    **huggingface.EMBEDDINGS,
    **huggingface.VIT_BLOCK,
    "dist_token": Source("embeddings.distillation_token", flat(1)),
}
_PLAIN: Layout = {**_BODY, **linear("head", "classifier")}
_TEACHER: Layout = {
    **_BODY,
    **linear("head", "cls_classifier"),
    **linear("head_dist", "distillation_classifier"),
}


def _claims(foreign: Foreign) -> bool:
    return huggingface.claims(foreign, "deit", any(n.endswith("distillation_token") for n in foreign.state))


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    state, originals = huggingface.file_names(foreign, "deit", vit_mlp=True)
    teacher = any(name.startswith(("cls_classifier.", "distillation_classifier.")) for name in state)
    layout = _TEACHER if teacher else _PLAIN
    config = huggingface.config_of(
        foreign,
        template,
        layout,
        state,
        norm_eps=1e-12,
        distillation_token=True,
        position_prefix=2,
        pool="both_heads" if teacher else "cls",
    )
    return huggingface.reading(
        foreign,
        config,
        model_type="deit",
        layout=layout,
        state=state,
        originals=originals,
        headless=("classifier.", "cls_classifier.", "distillation_classifier.", "decoder."),
    )


FAMILY = Family("deit", _claims, _read, PositionRule(square_source=True))
