"""What the families of transformers have in common: config.json, labels, names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    find_tensor,
    flat,
    height_and_width,
    linear,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.infer import infer_config, what_is_open
from vitdeploy.checkpoint.refusals import CORRECT, shown
from vitdeploy.config import Activation, ModelConfig, Preprocess, Scores, Size, ViTConfig
from vitdeploy.errors import CheckpointError, did_you_mean
from vitdeploy.images.preprocess import at_size, from_huggingface, published

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""By ``hidden_act``."""

_SCORES: Mapping[str, Scores | None] = {
    "single_label_classification": None,  # as usual
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
"""By ``problem_type``."""

EMBEDDINGS: Layout = {
    **linear("patch_embed", "embeddings.patch_embeddings.projection"),
    "cls_token": Source("embeddings.cls_token", flat(1)),
    "pos_embed": Source("embeddings.position_embeddings", flat(2)),
    **linear("blocks.{i}.attn.q", "encoder.layer.{i}.attention.attention.query"),
    **linear("blocks.{i}.attn.k", "encoder.layer.{i}.attention.attention.key"),
    **linear("blocks.{i}.attn.v", "encoder.layer.{i}.attention.attention.value"),
    **linear("blocks.{i}.attn.proj", "encoder.layer.{i}.attention.output.dense"),
    **linear("norm", "layernorm"),
}
"""The layers that all of them name alike."""

VIT_BLOCK: Layout = {
    **linear("blocks.{i}.norm1", "encoder.layer.{i}.layernorm_before"),
    **linear("blocks.{i}.norm2", "encoder.layer.{i}.layernorm_after"),
    **linear("blocks.{i}.mlp.fc1", "encoder.layer.{i}.intermediate.dense"),
    **linear("blocks.{i}.mlp.fc2", "encoder.layer.{i}.output.dense"),
}
"""A block of ViT, of its kin and of DeiT."""

IGNORED = {
    r"embeddings\.mask_token": None,
    r".*\.relative_position_index": None,
    r"pooler\.dense\.(weight|bias)": "the pooler of the checkpoint is left out; features are the CLS token",
    r"decoder\..*": "the image decoder of the checkpoint (masked image modelling) is left out",
}

# Files hold the names of transformers 4, which version 5 still writes; a pickled state dict of version 5 has
# the names its modules have in memory.
_IN_MEMORY = (
    (re.compile(r"^layers\.(\d+)\."), r"encoder.layer.\1."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (
        re.compile(r"^(encoder\.layer\.\d+)\.relative_position_bias\."),
        r"\1.attention.attention.relative_position_bias.",
    ),
    (re.compile(r"^shared_position_bias\."), "encoder.relative_position_bias."),
)
_VIT_MLP = (
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)


def claims(foreign: Foreign, model_type: str, by_name: bool) -> bool:
    """By the ``model_type`` of config.json, by names where there is none."""
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] == model_type
    projection = "embeddings.patch_embeddings.projection.weight"
    return by_name and not foreign.state.keys().isdisjoint((projection, f"{model_type}.{projection}"))


def file_name(name: str, prefix: str, *, vit_mlp: bool) -> str:
    """The name a tensor has in a file, without the prefix of a model that has a head."""
    name = name.removeprefix(f"{prefix}.")
    for pattern, replacement in (*_IN_MEMORY, *(_VIT_MLP if vit_mlp else ())):
        name = pattern.sub(replacement, name)
    return name


def file_names(foreign: Foreign, prefix: str, *, vit_mlp: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the names that files have, and those names' originals."""
    head = sole_head(foreign.state, "classifier")

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        return f"classifier.{leaf}" if layer == head else file_name(name, prefix, vit_mlp=vit_mlp)

    return rename_tensors(foreign.state, rename)


def config_of(
    foreign: Foreign,
    template: ViTConfig | None,
    layout: Layout,
    state: Mapping[str, Tensor],
    *,
    patch_size: int = 16,
    **fields: Any,
) -> ViTConfig:
    """Return the configuration of config.json; without one, of the named variant and the tensors' shapes.

    Args:
        patch_size: the default of the family's config.json.
        fields: what the family derives itself; ``norm_eps`` among them is the default for config.json.

    Raises:
        CheckpointError: config.json has a wrong or unsupported value, or is missing and no variant was named.
    """
    config = foreign.config
    if config is None:
        if template is None:
            raise CheckpointError(
                f"{foreign.source}: there is no config.json beside the weights",
                hint="keep it in its folder, or name the variant: -m vit_base_patch16_224 --checkpoint FILE",
            )
        heads, sizes = what_is_open(template, foreign.wanted)
        return infer_config(layout, state, foreign.source, heads=heads, sizes=sizes, **fields)
    patch = height_and_width(config.get("patch_size", patch_size), "patch_size")
    if patch[0] != patch[1]:
        raise CheckpointError(f"config.json: patch_size {list(patch)} is not square", hint=CORRECT)
    return ViTConfig(
        image_size=height_and_width(config.get("image_size", 224), "image_size"),
        patch_size=patch[0],
        channels=config_integer(config, "num_channels", 3),
        width=config_integer(config, "hidden_size", 768),
        depth=config_integer(config, "num_hidden_layers", 12),
        heads=_heads(config),
        **{
            "qkv_bias": bool(config.get("qkv_bias", True)),
            "mlp_width": config_integer(config, "intermediate_size", 3072),
            "activation": activation_of(config, "gelu"),
            "classes": classes_of(config, find_tensor(layout, state, "head.weight")),
            **fields,
            "norm_eps": config_number(config, "layer_norm_eps", fields["norm_eps"]),
        },
    )


def _heads(config: Mapping[str, object]) -> int:
    width, heads = (
        config_integer(config, "hidden_size", 768),
        config_integer(config, "num_attention_heads", 12),
    )
    if heads < 1 or config_integer(config, "head_dim", width // heads) * heads != width:
        raise CheckpointError(f"config.json: {heads} heads do not make up hidden_size {width}", hint=CORRECT)
    return heads


def classes_of(config: Mapping[str, object], head: Tensor | None) -> int:
    """Rows of the head; where it is missing but should be there, as many as the labels, 2 by default."""
    if head is not None and head.ndim:
        return head.shape[0]
    if "ForImageClassification" not in str(config.get("architectures")):
        return 0
    labels = config.get("id2label", (0, 1))
    return len(labels) if isinstance(labels, (Mapping, tuple)) else 0


def activation_of(config: Mapping[str, object], default: str) -> Activation:
    """The activation by its name in transformers.

    Raises:
        CheckpointError: it is none that is known.
    """
    name = config.get("hidden_act", default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        guess = did_you_mean(str(name), ACTIVATIONS)
        raise CheckpointError(
            f"config.json: hidden_act {shown(name)} is not supported{guess}",
            hint=f"supported: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]


def labels_of(config: Mapping[str, object] | None, classes: int) -> tuple[str, ...] | None:
    """Return ``id2label`` in the order of the head's rows, or None where there is none.

    Raises:
        CheckpointError: the labels do not number the head's rows from 0.
    """
    table = (config or {}).get("id2label")
    if not table or not classes:
        return None
    if not isinstance(table, Mapping) or not all(str(key).isdecimal() for key in table):
        raise CheckpointError("config.json: id2label must map class numbers to labels", hint=CORRECT)
    labels = {int(key): str(label) for key, label in table.items()}
    if len(labels) != classes or sorted(labels) != list(range(classes)):
        raise CheckpointError(
            f"config.json: id2label has {len(labels)} labels, numbered {min(labels)} to {max(labels)}, "
            f"but the head has {classes} classes",
            hint="correct id2label in config.json, one label for each row, or say them: --labels FILE",
        )
    return tuple(labels[index] for index in range(classes))


def scores_of(config: Mapping[str, object] | None) -> Scores | None:
    """What ``problem_type`` says, as transformers' image classification pipeline takes it.

    Raises:
        CheckpointError: it is none of transformers'.
    """
    problem = (config or {}).get("problem_type")
    if problem is None:
        return None
    if not isinstance(problem, str) or problem not in _SCORES:
        guess = did_you_mean(str(problem), _SCORES)
        raise CheckpointError(
            f"config.json: problem_type {shown(problem)} is not supported{guess}",
            hint=f"known: {', '.join(_SCORES)}",
        )
    return _SCORES[problem]


def reading(
    foreign: Foreign,
    config: ModelConfig,
    *,
    model_type: str,
    layout: Layout,
    state: Mapping[str, Tensor],
    originals: Mapping[str, str],
    headless: Sequence[str],
    follows_processor: bool = False,
    prefix: str | None = None,
    ignored: Mapping[str, str | None] = IGNORED,
) -> Reading:
    """Put a reading together.

    Args:
        headless: prefixes of names that a model with a head does not put under its base model.
        prefix: of the names under the base model; ``model_type`` where None.
        ignored: as a ``Reading`` has it.
        follows_processor: the family interpolates by itself; the resolution is what its processor feeds.
    """
    if foreign.processor is None:
        base = published(model_type)
    else:
        base = from_huggingface(foreign.processor, model_type, config.channels)
    prefix = prefix or model_type
    prefix = prefix if any(name.startswith(f"{prefix}.") for name in foreign.state) else ""
    notes = []
    assumed: dict[str, str | None] = {} if foreign.config is not None else {"heads": None, "activation": None}
    head = originals.get("classifier.weight", "classifier.weight").removesuffix(".weight")
    if head != "classifier":
        notes.append(f"the head is the linear layer {head!r}")
    if foreign.processor is None:
        note = f"no preprocessor_config.json: preprocessing is that of published {model_type} models"
        assumed["preprocess"] = note
    elif foreign.wanted is None and base.size != config.image_size:
        feeds, states = ("x".join(map(str, size)) for size in (base.size, config.image_size))
        notes.append(f"preprocessor_config.json feeds {feeds} pixels, config.json says {states}")

    def preprocess(size: Size | None) -> Preprocess:
        return base if size in (None, base.size) else at_size(base, size)

    def spell(name: str) -> str:
        return name if not prefix or name.startswith(tuple(headless)) else f"{prefix}.{name}"

    return Reading(
        config=config,
        layout=layout,
        state=state,
        preprocess=preprocess,
        ignored=ignored,
        labels=labels_of(foreign.config, config.classes),
        scores=scores_of(foreign.config),
        notes=tuple(notes),
        assumed=assumed,
        default_size=base.size if follows_processor and foreign.processor is not None else None,
        originals=originals,
        spell=spell,
    )
