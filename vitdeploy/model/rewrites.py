"""Exact rewrites of a ViT for deployment.

Each function takes one part of the model and returns another that computes the same function of real
numbers; nothing here rounds. All run in float64, one part at a time, so that the weights are rounded
once, when :func:`deploy` puts them into the dtypes of a precision plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import cast

import torch
from torch import nn

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import POOLED, InputKind, ModelConfig, Output, Preprocess, ViTConfig, layer_of
from vitdeploy.model.deployed import (
    DeployedAttention,
    DeployedBlock,
    DeployedModel,
    HeadLinear,
    Linear,
    Rotate,
    ScoreBias,
)
from vitdeploy.model.folds import (
    BLOCK_REWRITES,
    deployed_linear,
    deployed_mlp,
    deployed_norm,
    doubled,
    merged_linear,
    move_value_bias,
    normalisation,
)
from vitdeploy.model.positions import rotation
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.stem_deployed import DeployedStem, centre_pixels, standardising_flops, stem_flops
from vitdeploy.model.vit import Attention, Block, Embedding, ProbePool, Readout, ViT
from vitdeploy.model.vit_deployed import (
    AbsorbedAttention,
    AbsorbedBlock,
    DeployedEmbedding,
    DeployedProbePool,
    DeployedReadout,
    RotatedKey,
)


def forward_flops(config: ViTConfig) -> int:
    """FLOPs of the reference model's GEMMs and attention on the way to its first output, per image."""
    d, t, m = config.width, config.tokens, config.mlp_width
    block = 2 * t * d * (4 * d + m * (3 if config.gated_mlp else 2)) + 4 * t * t * d
    patches = 2 * config.patches * config.patch_channels * config.patch_size**2 * d + stem_flops(config)
    first, heads = config.outputs[0], 2 if config.pool == "both_heads" else 1
    if first == "codes":
        return config.depth * block + patches + 2 * config.patches * d * config.codes
    embeds = first == "embedding" or config.head_on == "embedding"
    reads = config.embedding if config.head_on == "embedding" else config.features
    projection = config.features * config.projection if embeds else 0
    probe = _probe_flops(config) if config.pool == "probe" else 0
    return config.depth * block + patches + probe + 2 * (projection + heads * reads * config.classes)


def _probe_flops(config: ViTConfig) -> int:
    """Pooling by a probe as it is written: keys and values of every token."""
    d, t = config.width, config.tokens
    return 4 * t * d * d + 4 * d * d + 4 * t * d + 4 * d * config.mlp_width


def _rotate(attn: Attention) -> Rotate | None:
    """The turns of every token, a constant: the sizes of grid and heads are known."""
    if attn.config.rotary is None:
        return None
    return Rotate(*(table.to(attn.q.weight) for table in rotation(attn.config)))


def score_bias_of(attn: Attention, queries: int | None = None) -> ScoreBias | None:
    """The table of relative positions read out once: (h, T, T), or (Q h, T) of the first Q queries."""
    bias = attn.bias()
    if bias is None:
        return None
    return ScoreBias(bias if queries is None else bias[:, :queries].transpose(0, 1).flatten(0, 1))


def merge_qkv(block: Block) -> DeployedBlock:
    """Three projections of the same rows are one GEMM with three times the columns."""
    attn = block.attn
    merged = DeployedAttention(
        merged_linear(attn.q, attn.k, attn.v),
        deployed_linear(attn.proj),
        attn.heads,
        attn.scale,
        _rotate(attn),
        score_bias_of(attn),
    )
    return DeployedBlock(
        deployed_norm(block.norm1), merged, deployed_norm(block.norm2), deployed_mlp(block.mlp)
    )


def absorb_last_block(block: Block, queries: int) -> AbsorbedBlock:
    """When only ``queries`` tokens are read at the end, the last block needs no keys and no values.

    q k' = (q Wk) x' per head, and p (x Wv) = (p x) Wv: the projections move from T rows to ``queries`` rows.
    The key bias cancels in the softmax; a value bias is moved first (:func:`move_value_bias`). Keys that are
    rotated stay what they are, since each token turns them by its own angle; prefix tokens, whose queries
    these are, stand still.
    """
    block = move_value_bias(block)
    attn = block.attn
    heads = (attn.heads, attn.head_width, -1)
    rotate = _rotate(attn)
    key: HeadLinear | RotatedKey = (
        HeadLinear(attn.k.weight.reshape(heads))  # (h, d, D)
        if rotate is None
        else RotatedKey(deployed_linear(attn.k), rotate, attn.heads)
    )
    value = HeadLinear(attn.v.weight.reshape(heads).transpose(1, 2))  # (h, D, d)
    absorbed = AbsorbedAttention(
        deployed_linear(attn.q),
        key,
        value,
        deployed_linear(attn.proj),
        attn.scale,
        queries,
        score_bias_of(attn, queries),
    )
    return AbsorbedBlock(
        deployed_norm(block.norm1), absorbed, deployed_norm(block.norm2), deployed_mlp(block.mlp)
    )


def patches_to_gemm(embedding: Embedding) -> DeployedEmbedding:
    """A convolution whose stride is its kernel is a GEMM over patches; all that is added is one constant."""
    config, weight = embedding.config, embedding.patch_embed.weight
    patches = weight.new_zeros(config.patches, config.width)
    for added in (embedding.patch_embed.bias, embedding.positions()):
        patches = patches if added is None else patches + added
    tokens = torch.cat([embedding.prefix(), patches])  # (T, D)
    projection = Linear(weight.flatten(1).t(), None)  # (D, C, P, P) -> (C P P, D)
    norm = None if embedding.pre_norm is None else deployed_norm(embedding.pre_norm)
    stem = None if embedding.stem is None else DeployedStem(embedding.stem)
    return DeployedEmbedding(projection, tokens, config, channels_last=False, pre_norm=norm, stem=stem)


def fold_normalisation(embedding: DeployedEmbedding, preprocess: Preprocess) -> DeployedEmbedding:
    """((r u) - mean) / std is linear in the pixel u, so it moves into the projection: uint8 HWC goes in.

    A stem reads the pixels where there is one: :func:`centre_pixels`.
    """
    config = embedding.config
    if embedding.stem is not None:
        return DeployedEmbedding(
            embedding.patch_embed,
            embedding.tokens.value,
            config,
            channels_last=False,
            pre_norm=embedding.pre_norm,
            stem=centre_pixels(embedding.stem, preprocess),
        )
    scale, shift = normalisation(preprocess)
    weight = embedding.patch_embed.weight.reshape(config.channels, -1, config.width)  # (C, P P, D)
    offset = torch.einsum("cpd,c->d", weight, shift)
    weight = (weight * scale[:, None, None]).transpose(0, 1).flatten(0, 1)  # (P P C, D)
    tokens = embedding.tokens.value.clone()
    tokens[config.prefix_tokens :] += offset
    norm = embedding.pre_norm
    return DeployedEmbedding(Linear(weight, None), tokens, config, channels_last=True, pre_norm=norm)


def absorb_probe(pool: ProbePool) -> DeployedProbePool:
    """The probe's query is a constant, and so is what it looks for: u = q Wk' for every head.

    q k' = x u' up to what the softmax does not see (the key bias), and values are pooled before they are
    projected, as in :func:`absorb_last_block`.
    """
    heads = (pool.heads, pool.probe.shape[0] // pool.heads, -1)
    query = pool.q(pool.probe).reshape(pool.heads, 1, -1) * pool.scale  # (h, 1, d)
    key = (query @ pool.k.weight.reshape(heads)).flatten(1)  # (h, D)
    value = pool.v.weight.reshape(heads).transpose(1, 2)  # (h, D, d)
    proj = Linear(pool.proj.weight.t(), pool.proj.bias + pool.proj.weight @ pool.v.bias)
    return DeployedProbePool(
        Linear(key.t(), None), HeadLinear(value), proj, deployed_norm(pool.norm), deployed_mlp(pool.mlp)
    )


def read_out(readout: Readout, outputs: tuple[Output, ...], *, absorbed: bool) -> DeployedReadout:
    """Two averaged heads are one GEMM over both tokens; a head that is not asked for is left away.

    Args:
        absorbed: rows come in, the pooled tokens alone, instead of all tokens.
    """
    config, head = readout.config, None
    wanted = set(outputs)
    if "logits" in wanted and readout.head is not None:
        head = deployed_linear(readout.head)
        if readout.head_dist is not None:
            weight = (
                torch.cat([readout.head.weight, readout.head_dist.weight], dim=1).t() / 2
            )  # (2 D, classes)
            head = Linear(weight, (readout.head.bias + readout.head_dist.bias) / 2)
    pools = not POOLED.isdisjoint(wanted)
    embeds = "embedding" in wanted or (head is not None and config.head_on == "embedding")

    def linear(layer: nn.Linear | None, needed: bool) -> Linear | None:
        return deployed_linear(layer) if needed and layer is not None else None

    return DeployedReadout(
        config,
        outputs,
        absorbed=absorbed,
        norm=deployed_norm(readout.norm)
        if readout.norm is not None and _reads_norm(config, wanted)
        else None,
        probe_pool=absorb_probe(readout.probe_pool) if pools and readout.probe_pool is not None else None,
        projection=linear(readout.projection, embeds),
        representation=linear(readout.representation, head is not None),
        head=head,
        code_head=linear(readout.code_head, "codes" in wanted),
    )


def _reads_norm(config: ViTConfig, wanted: Set[Output]) -> bool:
    """Whether the final LayerNorm is computed: tokens alone have none where it is the pooled vector's."""
    return not POOLED.isdisjoint(wanted) or (bool(wanted) and config.final_norm != "pooled")


def queries_read(config: ViTConfig, outputs: Iterable[Output]) -> int | None:
    """How many leading tokens of the last block the outputs depend on; None where they read every token."""
    every = {"tokens", "codes", f"layer_{config.depth - 1}"}
    if POOLED.isdisjoint(outputs) or not every.isdisjoint(outputs):
        return None
    if config.pool in ("mean", "cls_mean", "probe"):
        return None
    return 2 if config.pool == "both_heads" else 1


def blocks_read(config: ModelConfig, outputs: Iterable[Output]) -> int:
    """How many blocks the outputs depend on: all of them, unless each is a layer before the last."""
    layers = [layer_of(output) for output in outputs]
    return max(config.depth if layer is None else layer + 1 for layer in layers)


def applied_rewrites(
    config: ViTConfig, outputs: tuple[Output, ...], input_kind: InputKind
) -> tuple[Rewrite, ...]:
    """The rewrites :func:`deploy` applies to this configuration, with the FLOPs each saves per image."""
    d, t, depth = config.width, config.tokens, blocks_read(config, outputs)
    queries = queries_read(config, outputs)
    pools = not POOLED.isdisjoint(outputs)
    key_bias = config.qkv_bias and config.key_bias and config.rotary is None
    scores = depth * config.heads * t * t
    merged = depth - bool(queries)
    stem = config.stem is not None
    rows = [
        (
            "standardise_weights",
            "mean 0 and deviation 1 of every filter of the ResNet, once",
            standardising_flops(config),
            stem,
        ),
        (
            "patches_to_gemm",
            "patch convolution, CLS row, bias and positions: one GEMM, one constant",
            d * t,
            True,
        ),
        ("merge_qkv", f"{3 * merged} projections in {merged} GEMMs", 0, merged > 0),
        ("fold_attention_scale", "attention scale in the query weights", scores, True),
        ("drop_key_bias", "cancels in the softmax", depth * t * d, key_bias),
        ("move_value_bias", "in the projection's bias", depth * t * d, config.qkv_bias),
        ("fold_layer_scale", "in the projections before it", 2 * depth * t * d, config.layer_scale),
        ("fix_rotation", "sines and cosines of every token are constants", 0, config.rotary is not None),
        ("fix_relative_positions", f"read out of {depth} tables once", 0, config.score_bias),
        (
            "absorb_last_block",
            f"{queries} of {t} tokens are read",
            _absorbed_flops(config, queries or t),
            bool(queries),
        ),
        (
            "absorb_probe",
            "the probe's query in the key weights, values pooled before they are projected",
            _probe_flops(config) - 4 * t * config.heads * d - 4 * d * (d + config.mlp_width),
            config.pool == "probe" and pools,
        ),
        (
            "merge_heads",
            "two heads and their mean in one GEMM",
            2 * config.classes,
            _two_heads(config, outputs),
        ),
        (
            "fold_normalisation",
            "std in the first convolution, behind zeros for the mean"
            if stem
            else "mean and std in the projection",
            2 * config.channels * math.prod(config.image_size) if stem else 6 * config.patches * d,
            input_kind == "uint8",
        ),
    ]
    return tuple(
        Rewrite(name=name, detail=text, flops_saved=saved) for name, text, saved, applies in rows if applies
    )


def _two_heads(config: ViTConfig, outputs: Iterable[Output]) -> bool:
    return config.pool == "both_heads" and "logits" in outputs and config.classes > 0


def _absorbed_flops(config: ViTConfig, queries: int) -> int:
    d, t, m = config.width, config.tokens, config.mlp_width
    mlp = m * (3 if config.gated_mlp else 2)
    full = 2 * t * d * (4 * d + mlp) + 4 * t * t * d
    absorbed = 2 * queries * d * (4 * d + mlp) + 4 * queries * config.heads * t * d
    if config.rotary is not None:  # keys are projected, and the scores are of their columns
        absorbed += 2 * t * d * d - 2 * queries * d * d - 2 * queries * (config.heads - 1) * t * d
    return full - absorbed


@torch.no_grad()
def deploy(
    vit: ViT,
    plan: PrecisionPlan,
    *,
    outputs: tuple[Output, ...] = ("logits",),
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
) -> DeployedModel:
    """Return the deployed form of ``vit`` in the dtypes of ``plan``; ``vit`` is not changed.

    Args:
        preprocess: needed for ``input_kind="uint8"``, whose pixels arrive unnormalised, (N, H, W, C).

    Raises:
        PrecisionError: a weight does not fit into its dtype (each is named).
    """
    config = vit.config
    queries = queries_read(config, outputs)
    embedding = _embedding(vit, plan, input_kind, preprocess)
    blocks = []
    for i, part in enumerate(vit.blocks[: blocks_read(config, outputs)]):
        block = cast(Block, doubled(part))
        for rewrite in BLOCK_REWRITES:
            block = rewrite(block)
        last = i == config.depth - 1
        deployed = absorb_last_block(block, queries) if last and queries else merge_qkv(block)
        blocks.append(assign_dtypes(deployed, f"blocks.{i}", plan))
    read = tuple(output for output in outputs if layer_of(output) is None)
    part = read_out(doubled(vit.readout), read, absorbed=queries is not None)
    result = DeployedModel(embedding, blocks, assign_dtypes(part, "readout", plan), outputs)
    result.output_dtype = plan.output_dtype
    return result.eval()


@torch.no_grad()
def redeploy(
    vit: ViT,
    like: DeployedModel,
    plan: PrecisionPlan,
    *,
    outputs: tuple[Output, ...] = ("logits",),
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
) -> DeployedModel:
    """As :func:`deploy`, for another image size than ``like`` is for: it shares blocks and readout with that.

    Only the embedding depends on the size, unless blocks turn by positions or have tables of them.
    """
    if vit.config.rotary is not None or vit.config.score_bias:
        return deploy(vit, plan, outputs=outputs, input_kind=input_kind, preprocess=preprocess)
    embedding = _embedding(vit, plan, input_kind, preprocess)
    result = DeployedModel(embedding, list(like.blocks), like.readout, outputs)
    result.output_dtype = plan.output_dtype
    return result.eval()


def _embedding(
    vit: ViT, plan: PrecisionPlan, input_kind: InputKind, preprocess: Preprocess | None
) -> DeployedEmbedding:
    """The deployed embedding in the dtypes of the plan."""
    embedding = patches_to_gemm(doubled(vit.embedding))
    if input_kind == "uint8":
        if preprocess is None:
            raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
        embedding = fold_normalisation(embedding, preprocess)
    return assign_dtypes(embedding, "embedding", plan)
