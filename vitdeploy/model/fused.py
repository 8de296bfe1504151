"""A ViT's weights for the fused kernels: the exact rewrites of ``rewrites.py``, and four more.

LayerNorm's gain and shift move into the linear layer behind it; the residual stream, which only LayerNorm
reads, is centred, so that its rows' means are zero; a LayerNorm that writes this stream becomes a linear
layer behind a plain one; and uint8 pixels count from 128, which every reduced precision holds exactly.
Everything happens in float64, and each weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import BatchRange, InputKind, Output, Preprocess, ViTConfig
from vitdeploy.errors import PrecisionError, UsageError
from vitdeploy.model import deployed
from vitdeploy.model.folds import BLOCK_REWRITES, BlockT, bias_of, doubled, edited, parameter
from vitdeploy.model.positions import rotation
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.rewrites import (
    fold_normalisation,
    patches_to_gemm,
    queries_read,
    read_out,
    score_bias_of,
)
from vitdeploy.model.vit import Block, ViT
from vitdeploy.model.vit_deployed import DeployedEmbedding
from vitdeploy_kernels import planner
from vitdeploy_kernels import vit as kernels
from vitdeploy_kernels.layernorm_linear import Folded, fold_layernorm
from vitdeploy_kernels.plans import Shape, Weights
from vitdeploy_kernels.runner import buckets

PIXEL_SHIFT = 128
"""What the patch projection takes away from a uint8 pixel before it multiplies."""


@dataclass(frozen=True)
class FusedModel:
    """A model for ``vitdeploy_kernels.runner.VitRunner``.

    Attributes:
        readout: final LayerNorm, pooling and head in torch, where no fused head does it.
    """

    shape: Shape
    weights: Weights
    readout: planner.Readout | None


def fold_norms(block: BlockT) -> BlockT:
    """(n g + b) W = n (g W) + b W: LayerNorm's gain and shift become part of the linear layers behind it."""
    block = edited(block)
    this: Any = block
    attn, mlp = this.attn, this.mlp
    norms = [(this.norm1, (attn.q, attn.k, attn.v)), (this.norm2, (mlp.fc1,))]
    for norm, linears in norms if mlp.norm is None else [*norms, (mlp.norm, (mlp.fc2,))]:
        for linear in linears:
            offset, bias = linear.weight @ norm.bias, bias_of(linear)
            linear.bias = parameter(offset if bias is None else bias + offset)
            linear.weight = parameter(linear.weight * norm.weight)
        norm.weight = parameter(torch.ones_like(norm.weight))
        norm.bias = parameter(torch.zeros_like(norm.bias))
    return block


def centre_block(block: Block) -> Block:
    """LayerNorm takes the mean away, so what a block adds to the residual stream may have none."""
    block = edited(block)
    for linear in (block.attn.proj, block.mlp.fc2):
        linear.weight = parameter(linear.weight - linear.weight.mean(dim=0))
        linear.bias = parameter(linear.bias - linear.bias.mean())
    return block


def centre_embedding(embedding: DeployedEmbedding) -> DeployedEmbedding:
    """The same for what the embedding writes first."""
    weight, tokens = (
        value - value.mean(dim=1, keepdim=True)
        for value in (embedding.patch_embed.weight, embedding.tokens.value)
    )
    linear = deployed.Linear(weight, None)
    return DeployedEmbedding(linear, tokens, embedding.config, channels_last=embedding.channels_last)


def centre_norm(norm: deployed.Norm) -> deployed.Linear:
    """n g + b, which the stream begins with, less its mean over columns: linear in n as well."""
    gain = norm.weight.detach()
    return deployed.Linear(gain.diag() - gain[:, None] / len(gain), norm.bias - norm.bias.mean())


@torch.no_grad()
def fuse(
    vit: ViT,
    dtype: torch.dtype,
    *,
    output: Output = "logits",
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
    device: torch.device | str = "cpu",
) -> FusedModel:
    """Rewrite, round and move a model's weights for the fused kernels; ``vit`` is not changed.

    Args:
        dtype: float16 or bfloat16.
        preprocess: needed for ``input_kind="uint8"``.

    Raises:
        PrecisionError: a weight does not fit into the dtype (each is named).
    """
    config = vit.config
    shape = kernel_shape(config, output, input_kind)
    embedding = patches_to_gemm(doubled(vit.embedding))
    if input_kind == "uint8":
        if preprocess is None:
            raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
        embedding = fold_normalisation(embedding, preprocess)
    centred, first = centre_embedding(embedding), None
    patches = projection(
        centred.patch_embed.weight,
        centred.tokens.value,
        centred.channels_last,
        dtype,
        config.prefix_tokens,
    )
    if embedding.pre_norm is not None:
        linear = centre_norm(embedding.pre_norm)
        ones, bias = torch.ones_like(embedding.pre_norm.weight), linear.bias
        first = moved(fold_layernorm(ones, torch.zeros_like(ones), linear.weight, bias, dtype), device)
    blocks: list[kernels.Block] = []
    last: kernels.AbsorbedBlock | None = None
    for index, part in enumerate(vit.blocks):
        block = rewrite(cast(Block, doubled(part)))
        if index < shape.full_blocks:
            blocks.append(moved(full_block(block, dtype), device))
        else:
            last = moved(_absorbed(block, shape.queries or 0, dtype), device)
    readout = doubled(vit.readout)
    head = None
    if shape.classes and readout.head is not None and readout.norm is not None:
        head = folded(readout.norm, readout.head, dtype)
    weights = kernels.VitWeights(
        embedding=moved(patches, device),
        blocks=tuple(blocks),
        last=last,
        head=head and moved(head, device),
        pre_norm=first,
        rotation=moved(_rotation(config), device) if config.rotary is not None else None,
    )
    check_range(weights, dtype)
    last_part = None
    if head is None:
        part = read_out(readout, (output,), absorbed=shape.queries is not None)
        last_part = readout_of(part, dtype, device)
    return FusedModel(shape, weights, last_part)


def kernel_shape(config: ViTConfig, output: Output, input_kind: InputKind) -> kernels.VitShape:
    """The kernels' view of a configuration.

    A head is fused over a CLS token without a layer in between. Where keys are rotated, the last block is a
    block like the others: absorbed, it would have to project and turn the keys of every token all the same.
    """
    if beyond := config.beyond_kernels(output):
        raise UsageError(f"there are no fused kernels for {', '.join(beyond)}")
    plain = output == "logits" and config.pool == "cls" and not config.representation_width
    plain = plain and config.head_on == "features" and config.final_norm in ("tokens", "pooled", "read")
    plain = plain and config.rotary is None
    return kernels.VitShape(
        image_size=config.image_size,
        patch=config.patch_size,
        channels=config.channels,
        prefix=config.prefix_tokens,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_width=config.mlp_width,
        activation=config.activation,
        pre_norm=config.pre_norm,
        rotary=config.rotary is not None,
        score_bias=config.score_bias,
        gated=config.gated_mlp,
        mlp_norm=config.mlp_norm,
        eps=config.norm_eps,
        queries=queries_read(config, (output,)) if config.rotary is None else None,
        classes=config.classes if plain else 0,
        uint8=input_kind == "uint8",
    )


def buckets_of(batch: BatchRange) -> tuple[int, ...]:
    """The batch sizes that get a plan of their own."""
    return tuple(size for size in buckets(batch.max) if size >= batch.min)


def rewrite(block: Block) -> Block:
    """Every rewrite of a block's weights, in float64."""
    steps: tuple[Callable[[Block], Block], ...] = (fold_norms, *BLOCK_REWRITES, centre_block)
    for step in steps:
        block = step(block)
    return block


def folded(norm: nn.LayerNorm, linear: nn.Linear, dtype: torch.dtype) -> Folded:
    """A linear layer behind a LayerNorm, in one."""
    return fold_layernorm(norm.weight, norm.bias, linear.weight.t(), linear.bias, dtype)


def _linear(linear: nn.Linear, dtype: torch.dtype) -> kernels.Linear:
    return kernels.Linear(linear.weight.t().to(dtype).contiguous(), linear.bias.float())


def full_block(block: Any, dtype: torch.dtype) -> kernels.Block:
    """A block that computes every token, of any architecture; its bias may differ from window to window."""
    attn, mlp = block.attn, block.mlp
    parts = (attn.q, attn.k, attn.v)
    weight = torch.cat([part.weight for part in parts]).t()
    zeros = torch.zeros_like(attn.proj.bias)
    bias, added = torch.cat([zeros if b is None else b for b in map(bias_of, parts)]), attn.bias()
    if added is not None:
        each = added if added.dim() == 4 else added[None]  # (1, h, T, T), or of each window
        added = F.pad(each, (0, -each.shape[-1] % 8)).to(dtype).contiguous()
    return kernels.Block(
        qkv=fold_layernorm(block.norm1.weight, block.norm1.bias, weight, bias, dtype),
        proj=_linear(attn.proj, dtype),
        fc1=folded(block.norm2, mlp.fc1, dtype),
        fc2=_linear(mlp.fc2, dtype),
        score_bias=added,
    )


def _absorbed(block: Block, queries: int, dtype: torch.dtype) -> kernels.AbsorbedBlock:
    """See :func:`vitdeploy.model.rewrites.absorb_last_block`."""
    attn, mlp = block.attn, block.mlp
    heads, added = (attn.heads, attn.head_width, -1), score_bias_of(attn, queries)
    return kernels.AbsorbedBlock(
        q=folded(block.norm1, attn.q, dtype),
        key=attn.k.weight.reshape(heads).to(dtype).contiguous(),  # (h, d, D)
        value=attn.v.weight.reshape(heads).transpose(1, 2).to(dtype).contiguous(),  # (h, D, d)
        proj=_linear(attn.proj, dtype),
        fc1=folded(block.norm2, mlp.fc1, dtype),
        fc2=_linear(mlp.fc2, dtype),
        score_bias=None if added is None else added.value.float(),
    )


def _rotation(config: ViTConfig) -> Tensor:
    turns = deployed.Rotate(*rotation(config))
    return torch.stack([turns.cos, turns.sin]).float()


def projection(
    weight: Tensor, tokens: Tensor, channels_last: bool, dtype: torch.dtype, prefix: int = 0
) -> kernels.Embedding:
    """The patch projection, rounded, and what is added to its rows (T, D).

    Pixels in steps of 1/255 have weights that fp16 would hold as subnormals: a power of two goes apart.
    """
    weight, tokens, scale = weight.detach(), tokens.detach().clone(), 1.0
    if channels_last:
        tokens[prefix:] += PIXEL_SHIFT * weight.sum(dim=0)
        _, exponent = torch.frexp(weight.abs().max())
        scale = 2.0 ** int(exponent)
    return kernels.Embedding((weight / scale).to(dtype).contiguous(), tokens.float(), scale)


def readout_of(readout: nn.Module, dtype: torch.dtype, device: torch.device | str) -> planner.Readout:
    """What computes the one output of a deployed readout, in torch."""
    part = assign_dtypes(readout, "readout", PrecisionPlan(dtype)).to(device)

    def compute(x: Tensor) -> Tensor:
        result: Tensor = part(x)[0]
        return result.float()

    return compute


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dataclasses and tuples, with the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from _tensors(item, f"{name}.{key}")


def moved(value: Any, device: torch.device | str) -> Any:
    """The same dataclass with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, Folded):
        return Folded(*(moved(item, device) for item in value))
    return value


def check_range(weights: Weights, dtype: torch.dtype) -> None:
    """Raise a PrecisionError for what has overflowed."""
    overflowing = [name for name, tensor in _tensors(weights, "") if not torch.isfinite(tensor).all()]
    if overflowing:
        kind = str(dtype).removeprefix("torch.")
        raise PrecisionError(
            f"weights do not fit into {kind} once LayerNorm is folded in: {', '.join(overflowing)}",
            hint="bfloat16 has the range: export with --bf16",
        )
