"""The text towers of open_clip's own files: below no prefix as OpenAI's, or below ``text.``."""

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
    merged_qkv,
)
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.checkpoint.texts.tokenizer import CLEANING, INSTEAD
from vitdeploy.checkpoint.texts.tower import TextNaming, TextReading
from vitdeploy.config import Activation
from vitdeploy.errors import CheckpointError
from vitdeploy.model.text import Reads, TextConfig

_POOLS: Mapping[object, Reads] = {"argmax": "highest", "eos": "end", "last": "last"}
_UNSUPPORTED = (
    *("hf_model_name", "embed_cls", "ls_init_value", "final_ln_after_pool", "tokenizer_mode"),
    *("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"),
    "scale_fc",
)
"""Settings that change what a text tower computes."""


def _prefix(foreign: Foreign) -> str:
    return "text." if any(name.startswith("text.") for name in foreign.state) else ""


def _claims(foreign: Foreign) -> bool:
    return _prefix(foreign) != "" or "token_embedding.weight" in foreign.state


def _layout(prefix: str) -> dict[str, Source]:
    block = f"{prefix}transformer.resblocks.{{i}}"
    return {
        "token_embed.weight": Source(f"{prefix}token_embedding.weight"),
        "pos_embed": Source(f"{prefix}positional_embedding"),
        **linear("blocks.{i}.norm1", f"{block}.ln_1"),
        **merged_qkv(f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"),
        **linear("blocks.{i}.attn.proj", f"{block}.attn.out_proj"),
        **linear("blocks.{i}.norm2", f"{block}.ln_2"),
        **linear("blocks.{i}.mlp.fc1", f"{block}.mlp.c_fc"),
        **linear("blocks.{i}.mlp.fc2", f"{block}.mlp.c_proj"),
        **linear("norm", f"{prefix}ln_final"),
    }


def _read(foreign: Foreign) -> TextReading:
    model, source = config_object(foreign.config, "model_cfg"), foreign.source
    text = config_object(model, "text_cfg")
    for name in _UNSUPPORTED:
        if text.get(name):
            raise CheckpointError(
                f"{source}: a text tower with {name} {shown(text[name])} is not supported",
                hint=INSTEAD,
            )
    pool, causal = text.get("pool_type", "argmax"), not text.get("no_causal_mask")
    if not isinstance(pool, str) or pool not in _POOLS or (pool != "last" and not causal):
        mask = "" if causal else " without a causal mask"
        raise CheckpointError(
            f"{source}: a text tower that pools by {shown(pool)}{mask} is not supported", hint=INSTEAD
        )
    prefix, bias = _prefix(foreign), bool(text.get("proj_bias"))
    layout: Layout = _layout(prefix) | (
        linear("projection", f"{prefix}text_projection")
        if bias
        # (D, E), where it is a parameter and no layer.
        else {"projection.weight": Source(f"{prefix}text_projection", lambda t: t.t() if t.ndim == 2 else t)}
    )
    width = config_integer(text, "width", 512)
    config = TextConfig(
        vocabulary=config_integer(text, "vocab_size", 49408),
        length=config_integer(text, "context_length", 77),
        width=width,
        depth=config_integer(text, "layers", 12),
        heads=config_integer(text, "heads", 8),
        mlp_width=int(width * config_number(text, "mlp_ratio", 4.0)),
        activation=_activation(model, text),
        norm_eps=config_number(config_object(text, "norm_kwargs"), "eps", 1e-5),
        embedding=config_integer(model, "embed_dim", 0),
        projection_bias=bias,
        causal=causal,
        reads=_POOLS[pool],
        end=config_integer(text, "eos_id", 2),
    )
    own = r"text\." if prefix else r"(transformer|token_embedding|ln_final)\."
    return TextReading(
        config=config,
        layout=layout,
        names=f"{own}.*",
        ignored=r"(text\.)?attn_mask",
        tokenizer="CLIPTokenizer",
        clean=CLEANING[_cleaning(text, source)],
    )


def _activation(model: Mapping[str, object], text: Mapping[str, object]) -> Activation:
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if config_object(text, "act_kwargs").get("approximate") == "tanh" else "gelu"


def _cleaning(text: Mapping[str, object], source: str) -> str:
    """What becomes of texts: CLIP's own tokenizer lowers their case, others leave it."""
    usual = "whitespace" if text.get("hf_tokenizer_name") else "lower"
    settings = config_object(text, "tokenizer_kwargs")
    name = settings.get("clean", usual)
    if settings.keys() - {"clean"} or not isinstance(name, str) or name not in CLEANING:
        raise CheckpointError(
            f"{source}: a tokenizer with {shown(dict(settings))} is not supported", hint=INSTEAD
        )
    return name


NAMING = TextNaming(_claims, "open_clip_config.json", "model_cfg", _read)
