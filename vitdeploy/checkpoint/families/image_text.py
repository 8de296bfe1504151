"""What transformers' CLIP and SigLIP have in common: an image tower beside a text tower, named alike.

A file of the whole model names the image tower's tensors ``vision_model.*``, that of the tower alone has no
prefix (it had one before transformers 5.23); ``config.json`` has an object for each tower, or is the tower's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Foreign,
    Layout,
    Reading,
    Source,
    config_object,
    height_and_width,
    linear,
    refuse_indivisible,
)
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, shape_note, what_is_open
from vitdeploy.config import ViTConfig

PREFIX = "vision_model"
"""Of the image tower's names."""

TOWER: Layout = {
    "patch_embed.weight": Source("embeddings.patch_embedding.weight"),
    "pos_embed": Source("embeddings.position_embedding.weight"),
    **linear("blocks.{i}.norm1", "encoder.layers.{i}.layer_norm1"),
    **linear("blocks.{i}.attn.q", "encoder.layers.{i}.self_attn.q_proj"),
    **linear("blocks.{i}.attn.k", "encoder.layers.{i}.self_attn.k_proj"),
    **linear("blocks.{i}.attn.v", "encoder.layers.{i}.self_attn.v_proj"),
    **linear("blocks.{i}.attn.proj", "encoder.layers.{i}.self_attn.out_proj"),
    **linear("blocks.{i}.norm2", "encoder.layers.{i}.layer_norm2"),
    **linear("blocks.{i}.mlp.fc1", "encoder.layers.{i}.mlp.fc1"),
    **linear("blocks.{i}.mlp.fc2", "encoder.layers.{i}.mlp.fc2"),
    **linear("norm", "post_layernorm"),
    **linear("head", "classifier"),
}
"""The layers that both name alike."""

CLIP_ZERO_SHOT = "CLIPZeroShotForImageClassification"
SIGLIP_ZERO_SHOT = "SiglipZeroShotForImageClassification"
"""Classifiers whose head is one of texts' embeddings, on the image's embedding; transformers has no such
class, and hub folders carry their code."""

TEXT_LEFT_OUT = "the text model of the checkpoint is left out"
_BESIDE: Mapping[str, str | None] = {
    r"text_model\..*|text_projection\.weight|logit_(scale|bias)": TEXT_LEFT_OUT,
    r"embeddings\.position_ids": None,
}


def tower_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """What config.json says of the image tower; of the head, the whole model's word counts."""
    if config.get("vision_config") is None:
        return config
    of_model = ("architectures", "id2label", "problem_type")
    tower = {k: v for k, v in config_object(config, "vision_config").items() if k not in of_model}
    return tower | {key: config[key] for key in of_model if key in config}


def is_zero_shot(foreign: Foreign) -> bool:
    """Whether the file is of a zero-shot classifier: one of ``vitdeploy package --target hub``."""
    return (foreign.config or {}).get("architectures") in ([CLIP_ZERO_SHOT], [SIGLIP_ZERO_SHOT])


def has_classifier(foreign: Foreign) -> bool:
    """Whether the file is of a model that classifies images."""
    stated = "ForImageClassification" in str((foreign.config or {}).get("architectures"))
    return stated or any(name.startswith("classifier.") for name in foreign.state)


def read(
    foreign: Foreign,
    template: ViTConfig | None,
    *,
    model_type: str,
    layout: Layout,
    patch_size: int,
    hidden_act: str,
    ignored: Mapping[str, str | None],
    **fields: Any,
) -> Reading:
    """Read the image tower.

    Args:
        model_type: whose processor is meant where the files name none.
        patch_size: the default of the family's config.json, as ``hidden_act`` is.
        ignored: what else the file may hold that is not needed.
        fields: of ``ViTConfig``, what the family settles.
    """
    state, originals = huggingface.file_names(foreign, PREFIX, vit_mlp=False)
    assumed: dict[str, str | None] = {}
    notes: tuple[str, ...] = ()
    if foreign.config is None:
        heads, sizes = what_is_open(template, foreign.wanted)
        activation = huggingface.ACTIVATIONS[hidden_act]
        fields["activation"] = activation
        config = infer_config(layout, state, foreign.source, heads=heads, sizes=sizes, **fields)
        guess = f"{activation}, as published {model_type} models have, is taken, and --activation settles it"
        assumed["activation"] = f"the file does not tell the activation: {guess}"
        if template is None:
            assumed["heads"] = heads_note(config)
        notes = shape_note(config, template, foreign.wanted)
    else:
        foreign = replace(foreign, config=_whole_patches(foreign, patch_size, hidden_act))
        config = huggingface.config_of(foreign, template, layout, state, patch_size=patch_size, **fields)
    reading = huggingface.reading(
        foreign,
        config,
        model_type=model_type,
        layout=layout,
        state=state,
        originals=originals,
        headless=("classifier.", "visual_projection."),
        prefix=PREFIX,
        ignored={**_BESIDE, **ignored},
    )
    return replace(reading, notes=(*notes, *reading.notes), assumed={**reading.assumed, **assumed})


def _whole_patches(foreign: Foreign, patch_size: int, hidden_act: str) -> Mapping[str, object]:
    """The image tower's configuration, for the pixels that its patches use where the user asks for those.

    Raises:
        CheckpointError: the patch does not divide the size, and the user asks for none.
    """
    config = {"hidden_act": hidden_act, **tower_config(foreign.config or {})}
    size = height_and_width(config.get("image_size", 224), "image_size")
    patch = height_and_width(config.get("patch_size", patch_size), "patch_size")[0]
    if patch < 1:
        return config
    if foreign.wanted is None:
        refuse_indivisible("transformers", foreign.source, size, patch)
    return config | {"image_size": [side - side % patch for side in size]}
