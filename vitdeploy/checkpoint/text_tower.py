"""The text tower that lies beside an image tower, in transformers' CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Foreign,
    Layout,
    Source,
    check_values,
    config_integer,
    config_number,
    config_object,
    filled,
    find_tensor,
    linear,
    shape_text,
    template_of,
)
from vitdeploy.checkpoint.families.huggingface import activation_of
from vitdeploy.checkpoint.refusals import CORRECT, some
from vitdeploy.errors import CheckpointError, ConfigError
from vitdeploy.model.text import TextConfig, TextTower, build_text_tower, text_shapes

_TOWER = "text_model."
_SIGLIP_HEAD = f"{_TOWER}head"
_LAYERS = f"{_TOWER}encoder.layers.{{i}}"
_LAYOUT: Layout = {
    "token_embed.weight": Source(f"{_TOWER}embeddings.token_embedding.weight"),
    "pos_embed": Source(f"{_TOWER}embeddings.position_embedding.weight"),
    **linear("blocks.{i}.norm1", f"{_LAYERS}.layer_norm1"),
    **linear("blocks.{i}.attn.q", f"{_LAYERS}.self_attn.q_proj"),
    **linear("blocks.{i}.attn.k", f"{_LAYERS}.self_attn.k_proj"),
    **linear("blocks.{i}.attn.v", f"{_LAYERS}.self_attn.v_proj"),
    **linear("blocks.{i}.attn.proj", f"{_LAYERS}.self_attn.out_proj"),
    **linear("blocks.{i}.norm2", f"{_LAYERS}.layer_norm2"),
    **linear("blocks.{i}.mlp.fc1", f"{_LAYERS}.mlp.fc1"),
    **linear("blocks.{i}.mlp.fc2", f"{_LAYERS}.mlp.fc2"),
    **linear("norm", f"{_TOWER}final_layer_norm"),
}
_CLIP: Mapping[str, object] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_SIGLIP: Mapping[str, object] = {
    "vocab_size": 32000,
    "max_position_embeddings": 64,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""What transformers takes where ``text_config`` leaves it out."""
_IGNORED = (f"{_TOWER}embeddings.position_ids",)
_LEGACY_END = 2
"""The ``eos_token_id`` of CLIP's first configurations, which is not their tokenizers': the highest token of a
text is its end then, as in CLIP's own code."""


def has_text_tower(foreign: Foreign) -> bool:
    return any(name.startswith(_TOWER) for name in foreign.state)


def is_siglip(foreign: Foreign) -> bool:
    """Whether a text tower is SigLIP's; CLIP's, if not."""
    return f"{_SIGLIP_HEAD}.weight" in foreign.state


def read_text_tower(foreign: Foreign) -> TextTower:
    """The tower with its weights, as the file has them.

    Raises:
        CheckpointError: it is not as config.json says, or there is none.
    """
    source = foreign.source
    if foreign.config is None:
        raise CheckpointError(
            f"{source}: its text tower needs the config.json that belongs beside the weights",
            hint="keep it in its folder",
        )
    siglip = is_siglip(foreign)
    projection = _SIGLIP_HEAD if siglip else "text_projection"
    layout = {**_LAYOUT, **linear("projection", projection)}
    matrix = foreign.state.get(f"{projection}.weight")
    if matrix is None or matrix.ndim != 2:
        raise CheckpointError(f"{source}: its text tower has no {projection}.weight", hint=CORRECT)
    try:
        config = _config(_settings(foreign.config), siglip, matrix.shape[0])
    except ConfigError as error:  # the checkpoint's own numbers, not the user's
        raise CheckpointError(
            f"{source}: text_config: {error.message}", hint=error.hint or CORRECT
        ) from error
    return build_text_tower(config, _tensors(foreign, config, layout))


def logit_scale_and_bias(state: Mapping[str, Tensor], source: str) -> tuple[float | None, float | None]:
    """The logarithm of what similarities are multiplied by, and what is added; None where there is none.

    Raises:
        CheckpointError: one of them is no number.
    """
    found: list[float | None] = []
    for name in ("logit_scale", "logit_bias"):
        tensor = state.get(name)
        if tensor is not None and (tensor.numel() != 1 or not tensor.isfinite().all()):
            raise CheckpointError(f"{source}: {name} is not one finite number", hint=CORRECT)
        found.append(None if tensor is None else float(tensor.double()))
    return found[0], found[1]


def _settings(config: Mapping[str, object]) -> Mapping[str, object]:
    """What config.json says of the tower; ``text_config_dict`` of elder files is all of it, as transformers
    takes it."""
    return config_object(config, "text_config_dict") or config_object(config, "text_config")


def _config(stated: Mapping[str, object], siglip: bool, embedding: int) -> TextConfig:
    settings = {**(_SIGLIP if siglip else _CLIP), **stated}
    vocabulary, length, width, depth, heads, mlp_width = (
        config_integer(settings, name, 0)
        for name in (
            *("vocab_size", "max_position_embeddings", "hidden_size"),
            *("num_hidden_layers", "num_attention_heads", "intermediate_size"),
        )
    )
    end = 0 if siglip else config_integer(settings, "eos_token_id", 0)
    return TextConfig(
        vocabulary=vocabulary,
        length=length,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        activation=activation_of(settings, ""),
        norm_eps=config_number(settings, "layer_norm_eps", 0.0),
        embedding=embedding,
        projection_bias=siglip,
        causal=not siglip,
        reads="last" if siglip else "highest" if end == _LEGACY_END else "end",
        end=end,
    )


def _tensors(foreign: Foreign, config: TextConfig, layout: Layout) -> dict[str, Tensor]:
    """Every parameter of the tower.

    Raises:
        CheckpointError: some are missing, of another shape, left over, or no usable weights.
    """
    what = f"{foreign.source}: its text tower is not as config.json says"
    if config.depth > len(foreign.state):  # seen before it costs memory
        raise CheckpointError(f"{what}: {config.depth} blocks of {len(foreign.state)} tensors", hint=CORRECT)
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    used: dict[str, Any] = {}
    for ours, shape in text_shapes(config).items():
        template, numbers = template_of(ours)
        theirs = filled(layout[template].name, numbers)
        tensor = find_tensor(layout, foreign.state, ours)
        if tensor is None:
            problems.append(f"{theirs} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{theirs} is {shape_text(tensor.shape)}, must be {shape_text(shape)}")
        else:
            state[ours], used[theirs] = tensor, foreign.state[theirs]
    rest = [n for n in foreign.state if n.startswith(_TOWER) and n not in used and n not in _IGNORED]
    problems += [] if problems else [f"{name} is unexpected" for name in rest]
    if problems:
        raise CheckpointError(f"{what}: {some(problems, 2)}", hint=CORRECT)
    check_values(used, foreign.source)
    return state
