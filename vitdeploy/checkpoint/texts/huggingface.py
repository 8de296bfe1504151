"""The text towers of transformers' CLIP and SigLIP, which lie beside the image towers."""

from __future__ import annotations

from collections.abc import Mapping

from vitdeploy.checkpoint.families.base import (
    Foreign,
    Layout,
    Source,
    config_integer,
    config_number,
    config_object,
    linear,
)
from vitdeploy.checkpoint.families.huggingface import activation_of
from vitdeploy.checkpoint.refusals import CORRECT
from vitdeploy.checkpoint.texts.tower import TextNaming, TextReading
from vitdeploy.errors import CheckpointError
from vitdeploy.model.text import TextConfig

_TOWER = "text_model."
_SIGLIP_HEAD = f"{_TOWER}head"
_BLOCK = f"{_TOWER}encoder.layers.{{i}}"
_LAYOUT: Layout = {
    "token_embed.weight": Source(f"{_TOWER}embeddings.token_embedding.weight"),
    "pos_embed": Source(f"{_TOWER}embeddings.position_embedding.weight"),
    **linear("blocks.{i}.norm1", f"{_BLOCK}.layer_norm1"),
    **linear("blocks.{i}.attn.q", f"{_BLOCK}.self_attn.q_proj"),
    **linear("blocks.{i}.attn.k", f"{_BLOCK}.self_attn.k_proj"),
    **linear("blocks.{i}.attn.v", f"{_BLOCK}.self_attn.v_proj"),
    **linear("blocks.{i}.attn.proj", f"{_BLOCK}.self_attn.out_proj"),
    **linear("blocks.{i}.norm2", f"{_BLOCK}.layer_norm2"),
    **linear("blocks.{i}.mlp.fc1", f"{_BLOCK}.mlp.fc1"),
    **linear("blocks.{i}.mlp.fc2", f"{_BLOCK}.mlp.fc2"),
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
_LEGACY_END = 2
"""The ``eos_token_id`` of CLIP's first configurations, which is not their tokenizers': the highest token of a
text is its end then, as in CLIP's own code."""


def _claims(foreign: Foreign) -> bool:
    return any(name.startswith(_TOWER) for name in foreign.state)


def _read(foreign: Foreign) -> TextReading:
    siglip = f"{_SIGLIP_HEAD}.weight" in foreign.state
    projection = _SIGLIP_HEAD if siglip else "text_projection"
    matrix = foreign.state.get(f"{projection}.weight")
    if matrix is None or matrix.ndim != 2:
        raise CheckpointError(f"{foreign.source}: its text tower has no {projection}.weight", hint=CORRECT)
    # text_config_dict of elder files is all of it, as transformers takes it.
    stated = config_object(foreign.config, "text_config_dict") or config_object(foreign.config, "text_config")
    return TextReading(
        config=_config(stated, siglip, matrix.shape[0]),
        layout={**_LAYOUT, **linear("projection", projection)},
        names=r"text_model\..*",
        ignored=r"text_model\.embeddings\.position_ids",
        tokenizer="SiglipTokenizer" if siglip else "CLIPTokenizer",
    )


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


NAMING = TextNaming(_claims, "config.json", "model_type", _read)
