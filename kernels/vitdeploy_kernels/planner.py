"""Which kernel computes which part of a ViT's forward pass: the plan, as a list of steps over fixed buffers.

A step is a launch of a fused kernel, or a few torch calls where no fused kernel applies or where the
table of the GPU says that cuBLASLt is faster. Every step knows its site and, if it is not fused, why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from vitdeploy_kernels import (
    absorbed,
    add_layernorm,
    attention,
    layernorm_attention,
    layernorm_linear,
    linear_residual,
    patch_embed,
)
from vitdeploy_kernels.config import Entry, Table
from vitdeploy_kernels.fp8 import Fp8Linear
from vitdeploy_kernels.launch import Launch, tiles
from vitdeploy_kernels.layernorm_linear import Folded
from vitdeploy_kernels.support import Unsupported
from vitdeploy_kernels.vit import AbsorbedBlock, Block, Linear, VitShape, VitWeights

Readout: TypeAlias = Callable[[Tensor], Tensor]
"""From the last residual rows, (N, T, D) or the read tokens (N Q, D), to the output."""


@dataclass(frozen=True)
class Step:
    """One thing that is done: ``launch``, or ``call`` where it is left to torch.

    Attributes:
        site: the part of the model, ``blocks.3.attn.qkv``.
        operation: the kernel's name, or what torch does.
        reason: why it is not a fused kernel; None if it is one.
    """

    site: str
    operation: str
    launch: Launch | None = None
    call: Callable[[], object] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of one batch size, and the buffers they read and write."""

    batch: int
    steps: tuple[Step, ...]
    image: Tensor
    output: Tensor


def multiply(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, activation: str) -> None:
    """``activation(x @ weight + bias)`` by cuBLASLt; as its epilogue, where it has the activation."""
    if out.is_cuda and activation in ("gelu_tanh", "relu"):
        torch._addmm_activation(bias, x, weight, use_gelu=activation == "gelu_tanh", out=out)
        return
    torch.addmm(bias, x, weight, out=out)
    activate_in_place(out, activation)


def activate_in_place(x: Tensor, activation: str) -> None:
    """What a fused epilogue would have done."""
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_(x, approximate=approximate)
    elif activation == "relu":
        x.relu_()
    elif activation == "silu":
        F.silu(x, inplace=True)
    elif activation == "quick_gelu":
        x.mul_(torch.sigmoid(1.702 * x))


class Workspace:
    """Named memory that the plans of several batch sizes share; build the largest plan first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of this size in the memory of this name."""
        count = torch.Size(size).numel()
        held = self._storage.get((name, dtype))
        if held is None or held.numel() < count:
            held = torch.zeros(count, dtype=dtype, device=self.device)
            self._storage[name, dtype] = held
        return held[:count].view(*size)


class BlockPlanner:
    """Plans blocks of one shape: what a whole model's planner is made of.

    Args:
        shape: of the blocks, and of the sequences within which they attend.
        count: sequences.
        steps: to these it adds its own.
        rotation: as of :class:`VitWeights`.
    """

    def __init__(
        self,
        shape: VitShape,
        count: int,
        dtype: torch.dtype,
        table: Table,
        workspace: Workspace,
        steps: list[Step],
        rotation: Tensor | None = None,
    ) -> None:
        self.shape, self.batch, self.table = shape, count, table
        self.workspace, self.steps, self.rotation = workspace, steps, rotation
        self.dtype = dtype
        self.rows = count * shape.tokens
        # Statistics of rows, and these rows normalised, which the same pass has written.
        self._normalised: tuple[Tensor, Tensor] | None = None
        self.x = self.take("x", (self.rows, shape.width))

    def take(self, name: str, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return self.workspace.take(name, size, dtype or self.dtype)

    def entry(self, kernel: str, *shape: int) -> Entry:
        return self.table.entry(kernel, shape)

    def launch(self, site: str, launch: Launch) -> None:
        self.steps.append(Step(site, launch.name.removesuffix("_kernel"), launch=launch))

    def leave(self, site: str, operation: str, call: Callable[[], object], reason: str) -> None:
        self.steps.append(Step(site, operation, call=call, reason=reason))

    def norm_linear(
        self,
        site: str,
        x: Tensor,
        stats: Tensor,
        folded: Folded | Fp8Linear,
        out: Tensor,
        activation: str = "none",
        *,
        eps: float | None = None,
    ) -> None:
        """LayerNorm, linear layer, activation; ``eps`` is the shape's when omitted."""
        assert isinstance(folded, Folded)
        eps = self.shape.eps if eps is None else eps
        rows, columns = out.shape
        entry = self.entry("layernorm_linear", rows, columns, x.shape[1])
        if entry.route == "fused" or out.dtype != self.dtype:
            launch = layernorm_linear.launch(
                x, stats, *folded, out,
                eps=eps, activation=activation, config=entry.config,
            )  # fmt: skip
            return self.launch(site, launch)
        normed, bias = self.take("normed", x.shape), folded.bias.to(self.dtype)
        held = self._normalised
        if held is None or held[0] is not stats or eps != self.shape.eps:
            self.layernorm(f"{site}.norm", x, None, None, None, normed, None, eps=eps)
        call = lambda: multiply(normed, folded.weight, bias, out, activation)  # noqa: E731
        return self.leave(site, "cublas", call, "cuBLASLt and a separate LayerNorm were measured faster")

    def layernorm(
        self,
        site: str,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        total: Tensor | None,
        normed: Tensor | None,
        stats: Tensor | None,
        *,
        eps: float | None = None,
    ) -> None:
        """Normalised rows, statistics or a sum, as :func:`add_layernorm.launch` writes them."""
        config = self.entry("add_layernorm", *x.shape).config
        eps = self.shape.eps if eps is None else eps
        launch = add_layernorm.launch(x, branch, bias, total, normed, stats, eps=eps, config=config)
        self.launch(site, launch)

    def _residual(
        self, site: str, x: Tensor, linear: Linear | Fp8Linear, residual: Tensor, out: Tensor
    ) -> Tensor:
        """Linear layer, added to the residual stream; returns the new rows' statistics."""
        assert isinstance(linear, Linear)
        rows, depth = x.shape
        entry = self.entry("linear_residual", rows, self.shape.width, depth)
        if entry.route == "fused":
            parts = tiles(self.shape.width, entry.config.block_n)
            stats = self.take("stats", (rows, parts, 2), torch.float32)
            launch = linear_residual.launch(
                x, linear.weight, linear.bias, residual, out, stats, config=entry.config
            )
            self.launch(site, launch)
            return stats
        stats = self.take("stats", (rows, 1, 2), torch.float32)
        reason = "cuBLASLt, which adds to the stream, and a separate bias were measured faster"
        if residual is out:
            self.leave(site, "cublas", lambda: out.addmm_(x, linear.weight), reason)
        else:
            self.leave(site, "cublas", lambda: torch.addmm(residual, x, linear.weight, out=out), reason)
        # The pass that adds the bias normalises at once where cuBLASLt reads the rows next.
        behind = self.shape.hidden if site.endswith("proj") else 3 * self.shape.width
        normed = None
        if self.entry("layernorm_linear", rows, behind, self.shape.width).route != "fused":
            normed = self.take("normed", out.shape)
            self._normalised = stats, normed
        self.layernorm(f"{site}.add", out, None, linear.bias, out, normed, stats)
        return stats

    def block(self, site: str, block: Block, stats: Tensor) -> Tensor:
        mixed = self._attention(f"{site}.attn", block, stats)
        stats = self._residual(f"{site}.attn.proj", mixed, block.proj, self.x, self.x)
        hidden = self._hidden(f"{site}.mlp", "hidden", self.x, stats, block.fc1)
        return self._residual(f"{site}.mlp.fc2", hidden, block.fc2, self.x, self.x)

    def _attention(self, site: str, block: Block, stats: Tensor) -> Tensor:
        """Queries, keys and values, and what attention makes of them: (rows, width)."""
        shape, batch, rotation = self.shape, self.batch, self.rotation
        tokens = self.x.view(batch, shape.tokens, shape.width)
        mixed = self.take("mixed", tokens.shape)
        bias = None if block.score_bias is None else block.score_bias[..., : shape.tokens]
        fits = layernorm_attention.supports(tokens, block.qkv.weight, block.qkv.bias, shape.heads, bias)
        whole = rotation is None and not isinstance(fits, Unsupported)
        if whole and self.table.kernels.get("layernorm_attention"):
            entry = self.entry("layernorm_attention", batch * shape.heads, shape.tokens, shape.width)
            if entry.route == "fused":
                launch = layernorm_attention.launch(
                    tokens, block.qkv.weight, block.qkv.bias, mixed,
                    heads=shape.heads, scale=shape.scale, eps=shape.eps, mask=bias, config=entry.config,
                )  # fmt: skip
                self.launch(site, launch)
                return mixed.view(self.rows, shape.width)
        qkv = self.take("qkv", (batch, shape.tokens, 3 * shape.width))
        self.norm_linear(f"{site}.qkv", self.x, stats, block.qkv, qkv.view(self.rows, -1))
        if rotation is not None:
            turn = lambda: _rotate(qkv, rotation, shape.heads)  # noqa: E731
            self.leave(f"{site}.rotate", "rotation", turn, "no fused kernel turns queries and keys")
        support = attention.supports(qkv, shape.heads, shape.scale, bias)
        if isinstance(support, Unsupported):
            call = lambda: mixed.copy_(_sdpa(qkv, shape.heads, shape.scale, bias))  # noqa: E731
            self.leave(site, "scaled_dot_product_attention", call, support.reason)
        else:
            entry = self.entry("attention", batch * shape.heads, shape.tokens, shape.head_width)
            launch = attention.launch(
                qkv, mixed, heads=shape.heads, scale=shape.scale, bias=bias, config=entry.config
            )
            self.launch(site, launch)
        return mixed.view(self.rows, shape.width)

    def _hidden(self, site: str, name: str, x: Tensor, stats: Tensor, fc1: Folded | Fp8Linear) -> Tensor:
        """What the MLP's second layer reads: (rows, MLP width)."""
        shape = self.shape
        hidden = self._activated(site, name, x, stats, fc1)
        if not shape.mlp_norm:
            return hidden
        normed = self.take(f"{name}.normed", hidden.shape)
        self.layernorm(f"{site}.norm", hidden, None, None, None, normed, None)
        return normed

    def _activated(self, site: str, name: str, x: Tensor, stats: Tensor, fc1: Folded | Fp8Linear) -> Tensor:
        """The MLP's first layer with its activation, or gate: (rows, MLP width)."""
        shape = self.shape
        hidden = self.take(name, (len(x), shape.hidden))
        activation = "none" if shape.gated else shape.activation
        self.norm_linear(f"{site}.fc1", x, stats, fc1, hidden, activation)
        if not shape.gated:
            return hidden
        gated = self.take(f"{name}.gated", (len(x), shape.mlp_width))

        def gate() -> None:
            left, right = hidden.chunk(2, dim=1)
            gated.copy_(left)
            activate_in_place(gated, shape.activation)
            gated.mul_(right)

        self.leave(f"{site}.gate", "gate", gate, "no fused kernel for gated MLPs")
        return gated


class Planner(BlockPlanner):
    """Builds the plan of one batch size.

    Args:
        shape: the model.
        weights: on the device the plan is for; on the meta device for a plan that is only compiled.
        table: configurations of the GPU.
        workspace: memory for everything between the layers.
        readout: computes the output where the shape has no fused head.
    """

    def __init__(
        self,
        shape: VitShape,
        weights: VitWeights,
        batch: int,
        table: Table,
        workspace: Workspace,
        readout: Readout | None = None,
    ) -> None:
        super().__init__(shape, batch, weights.dtype, table, workspace, [], weights.rotation)
        self.weights, self.readout = weights, readout
        dtype = torch.uint8 if shape.uint8 else torch.float32
        self.image = self.take("image", shape.image_shape(batch), dtype)

    def build(self) -> Plan:
        """The whole forward pass."""
        stats = self._embed()
        for index, block in enumerate(self.weights.blocks):
            stats = self.block(f"blocks.{index}", block, stats)
        rows: Tensor = self.x
        if self.weights.last is not None:
            rows, stats = self._absorbed(f"blocks.{self.shape.depth - 1}", self.weights.last, stats)
        output = self._read_out(rows, stats)
        return Plan(self.batch, tuple(self.steps), self.image, output)

    def _embed(self) -> Tensor:
        shape, embedding = self.shape, self.weights.embedding
        config = self.entry("patch_embed", self.rows, shape.width, len(embedding.weight)).config
        stats = self.take("stats", (self.rows, tiles(shape.width, config.block_n), 2), torch.float32)
        first = self.weights.pre_norm
        out = self.x if first is None else self.take("embedded", self.x.shape)
        launch = patch_embed.launch(
            self.image, embedding.weight, embedding.tokens, out, stats,
            patch=shape.patch, prefix=shape.prefix, scale=embedding.scale, config=config,
        )  # fmt: skip
        self.launch("embedding", launch)
        if first is None:
            return stats
        self.norm_linear("embedding.pre_norm", out, stats, first, self.x)
        stats = self.take("stats", (self.rows, 1, 2), torch.float32)
        self.layernorm("embedding.pre_norm.stats", self.x, None, None, None, None, stats)
        return stats

    def _absorbed(self, site: str, block: AbsorbedBlock, stats: Tensor) -> tuple[Tensor, Tensor]:
        """The last block for the tokens that are read; returns their rows (N Q, D) and statistics."""
        shape, batch = self.shape, self.batch
        assert shape.queries is not None
        count, width, heads = batch * shape.queries, shape.width, shape.heads
        tokens = self.x.view(batch, shape.tokens, width)
        rows, row_stats = self._first_tokens(site, tokens, stats)
        q = self.take("read.q", (count, width))
        self.norm_linear(f"{site}.attn.q", rows, row_stats, block.q, q)
        queries = self.take("read.queries", (batch, shape.queries * heads, width))
        self._head_linear(
            f"{site}.attn.key", q.view(count, heads, -1), block.key, queries.view(count, heads, width)
        )
        pooled = self.take("read.pooled", queries.shape)
        self._absorbed_attention(f"{site}.attn", queries, tokens, stats, block.score_bias, pooled)
        mixed = self.take("read.mixed", (count, width))
        self._head_linear(
            f"{site}.attn.value", pooled.view(count, heads, width), block.value, mixed.view(count, heads, -1)
        )
        read = self.take("read.x", (count, width))
        stats = self._residual(f"{site}.attn.proj", mixed, block.proj, rows, read)
        hidden = self._hidden(f"{site}.mlp", "read.hidden", read, stats, block.fc1)
        return read, self._residual(f"{site}.mlp.fc2", hidden, block.fc2, read, read)

    def _first_tokens(self, site: str, tokens: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and statistics of the tokens that are read: views of one token, copies of several."""
        count = self.shape.queries
        per_image = stats.view(self.batch, self.shape.tokens, -1, 2)
        if count == 1:
            return tokens[:, 0], per_image[:, 0]
        rows = self.take("first", (self.batch, count or 0, self.shape.width))
        row_stats = self.take("first.stats", (self.batch, count or 0, *per_image.shape[2:]), torch.float32)

        def gather() -> None:
            rows.copy_(tokens[:, :count])
            row_stats.copy_(per_image[:, :count])

        self.leave(f"{site}.first", "copy", gather, f"{count} tokens are read")
        return rows.flatten(0, 1), row_stats.flatten(0, 1)

    def _head_linear(self, site: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        config = self.entry("head_linear", len(x), out.shape[2], x.shape[2]).config
        self.launch(site, absorbed.launch_head_linear(x, weight, out, config=config))

    def _absorbed_attention(
        self, site: str, queries: Tensor, tokens: Tensor, stats: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        shape = self.shape
        support = absorbed.supports_absorbed_attention(queries, tokens, stats)
        if bias is not None:
            support = Unsupported("the fused kernel adds nothing to the scores")
        if isinstance(support, Unsupported):
            call = lambda: out.copy_(_absorbed(queries, tokens, shape.scale, shape.eps, bias))  # noqa: E731
            return self.leave(site, "absorbed attention", call, support.reason)
        config = self.entry("absorbed_attention", self.batch, shape.tokens, shape.width).config
        launch = absorbed.launch_absorbed_attention(
            queries, tokens, stats, out, scale=shape.scale, eps=shape.eps, config=config
        )
        return self.launch(site, launch)

    def _read_out(self, rows: Tensor, stats: Tensor) -> Tensor:
        if self.weights.head is not None:
            logits = self.take("logits", (self.batch, self.shape.classes), torch.float32)
            self.norm_linear("head", rows, stats, self.weights.head, logits)
            return logits
        if self.readout is None:
            return rows
        whole = self.shape.queries is None
        step, output = readout_step(
            self.readout, rows.view(self.batch, self.shape.tokens, -1) if whole else rows
        )
        self.steps.append(step)
        return output


def readout_step(readout: Readout, x: Tensor) -> tuple[Step, Tensor]:
    """What computes the output where no fused head does, and the output."""
    output = torch.empty_like(readout(x))
    reason = f"fused only over one token and a plain head ({output.shape[-1]} columns)"
    call = lambda: output.copy_(readout(x))  # noqa: E731
    return Step("readout", "LayerNorm, pooling and head", call=call, reason=reason), output


def _rotate(qkv: Tensor, rotation: Tensor, heads: int) -> None:
    """Turn queries and keys in place, in float32: pairs of columns (c, c + d / 2)."""
    both = qkv.unflatten(2, (3, heads, -1))[:, :, :2]  # (N, T, 2, h, d)
    cos, sin = rotation[:, :, None, None]  # (T, 1, 1, d) each
    x = both.float()
    a, b = x.chunk(2, dim=-1)
    both.copy_(x * cos + torch.cat([b, a], dim=-1) * sin)


def _sdpa(qkv: Tensor, heads: int, scale: float, bias: Tensor | None) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def _absorbed(queries: Tensor, tokens: Tensor, scale: float, eps: float, bias: Tensor | None) -> Tensor:
    normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps).to(queries.dtype)
    scores = (queries @ normed.transpose(1, 2)).float() * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(normed.dtype) @ normed
