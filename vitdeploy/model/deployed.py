"""The deployed form of a model: the modules whose graph is the one a person would draw.

Every module computes in the dtype its parameters have and casts what reaches it; where dtypes agree,
no cast is traced. Linear weights lie as (in, out), so that a GEMM is one MatMul with a named weight.
Shapes that are known at export are constants, the batch is the -1 of a reshape: no Shape operator is
traced. What is here serves every architecture; ``DeployedX`` is the counterpart of a reference's ``X``.

Shapes in comments: N images, T tokens, D width, h heads, d columns of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Activation, Output, layer_of
from vitdeploy.model.reference import ACTIVATIONS


def constant(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)


class Site(nn.Module):
    """A module that computes something and has a dtype of its own in a precision plan."""

    always_fp32: ClassVar[bool] = False
    """An island of every reduced precision: its sums lose too much below fp32."""
    follows_input: ClassVar[bool] = False
    """Without a dtype of its own, unless it is an island."""
    dtype: torch.dtype | None = None
    """What a site without weights computes in; None is what reaches it."""


class Linear(Site):
    """``x @ weight + bias`` with weight (in, out); over rows (R, in) that is a single Gemm operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x, self.weight) if x.dim() == 2 else x @ self.weight + self.bias


class HeadLinear(Site):
    """One GEMM per head: ``x @ weight`` with weight (h, in, out) and x (N, h, rows, in)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class Norm(Site):
    """LayerNorm over the last axis."""

    always_fp32 = True

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RmsNorm(Site):
    """RMSNorm over the last axis (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Its weight is part of the linear layer behind it.
    """

    always_fp32 = True

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype or x.dtype)
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)


class Reorder(nn.Module):
    """Rows of the second axis in another order, a constant."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, self.order)


class Add(Site):
    """A residual addition, a module of its own so that it has a name and a dtype."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        dtype = self.dtype or x.dtype
        return x.to(dtype) + branch.to(dtype)


class Softmax(Site):
    """Softmax over the last axis, in its own dtype when it has one."""

    follows_input = True

    def forward(self, scores: Tensor) -> Tensor:
        return scores.to(self.dtype or scores.dtype).softmax(dim=-1)


class Rotate(Site):
    """Rotary positions: pairs of columns (c, c + d / 2) turned by the angle of their token."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        first, second = sin.chunk(2, dim=-1)
        self.cos = nn.Parameter(cos, requires_grad=False)  # (T, d), or what else broadcasts over heads
        self.sin = nn.Parameter(torch.cat([-first, second], dim=-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.cos.dtype)
        a, b = x.split(x.shape[-1] // 2, dim=-1)
        return x * self.cos + torch.cat([b, a], dim=-1) * self.sin


class ScoreBias(Site):
    """What relative positions add to the scores: one constant, of any shape that broadcasts over images."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.contiguous(), requires_grad=False)

    def forward(self, scores: Tensor) -> Tensor:
        return scores.to(self.value.dtype) + self.value


class Shift(Site):
    """One number added to everything, so that what follows lies around zero."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)  # ()

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.value.dtype) + self.value


class Scale(Site):
    """Every channel multiplied by a number of its own, so that one range suits them all."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)  # (channels)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.value.dtype) * self.value


class DeployedAttention(nn.Module):
    """Self-attention with one GEMM for queries, keys and values; ``qkv`` has columns (3, h, d)."""

    def __init__(
        self,
        qkv: Linear,
        proj: Linear,
        heads: int,
        scale: float,
        rotate: Rotate | None = None,
        score_bias: ScoreBias | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.rotate, self.score_bias, self.proj = qkv, rotate, score_bias, proj
        self.softmax = Softmax()
        self.heads, self.scale = heads, scale

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        x = self.qkv(x).reshape(-1, tokens, 3 * self.heads, width // self.heads)  # (N, T, 3h, d)
        x = x.transpose(1, 2)
        if self.rotate is None:
            q, k, v = x.split(self.heads, dim=1)  # (N, h, T, d) each
        else:
            both, v = x.split((2 * self.heads, self.heads), dim=1)
            q, k = self.rotate(both).split(self.heads, dim=1)
        scores = q @ k.transpose(2, 3)  # (N, h, T, T)
        if self.scale != 1:
            scores = scores * self.scale
        if self.score_bias is not None:
            scores = self.score_bias(scores)
        x = self.softmax(scores).to(v.dtype) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).reshape(-1, tokens, width))  # (N, T, D)


class DeployedMlp(nn.Module):
    """Two GEMMs with an activation between them.

    Args:
        gate: what is activated in place of ``fc1``'s columns, and multiplies them. A GEMM of its own, because
            CPU runtimes copy the halves of a common one, and fuse an activation with a whole one.
        before: ``fc2``, whose weight or bias takes it back.
    """

    def __init__(
        self,
        fc1: Linear,
        fc2: Linear,
        activation: Activation,
        *,
        gate: Linear | None = None,
        norm: Norm | None = None,
        before: Shift | Scale | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.fc1, self.norm, self.before, self.fc2 = gate, fc1, norm, before, fc2
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        x = activation(self.fc1(x)) if self.gate is None else activation(self.gate(x)) * self.fc1(x)
        x = x if self.norm is None else self.norm(x)
        return self.fc2(x if self.before is None else self.before(x))


class DeployedBlock(nn.Module):
    """Pre-norm block; layer scale is already part of ``attn.proj`` and ``mlp.fc2``."""

    def __init__(
        self, norm1: Norm | RmsNorm, attn: nn.Module, norm2: Norm | RmsNorm, mlp: DeployedMlp
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.add1 = norm1, attn, Add()
        self.norm2, self.mlp, self.add2 = norm2, mlp, Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(x, self.attn(self.norm1(x)))
        return self.add2(x, self.mlp(self.norm2(x)))


class Normalise(Site):
    """Vectors to length 1."""

    always_fp32 = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype or x.dtype)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class DeployedModel(nn.Module):
    """A model in its deployed form: pixels in, float32 out whatever runs inside.

    One output is a tensor, several are a tuple of them in the order of ``outputs``. The batch is every
    tensor's first axis, and no part computes with its size (see ``exporter.graph.trace``).

    Args:
        readout: returns a tuple, of a tensor for each of its own ``outputs``; layers are taken before it.
        taps: numbers of blocks behind which the readout is given the tokens, too, in their order.
    """

    def __init__(
        self,
        embedding: nn.Module,
        blocks: Iterable[nn.Module],
        readout: nn.Module,
        outputs: tuple[Output, ...],
        taps: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.embedding, self.blocks, self.readout = embedding, nn.ModuleList(blocks), readout
        self.outputs, self.taps = outputs, taps
        self.output_dtype = torch.float32

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        layers = {layer_of(output): output for output in self.outputs}
        results: dict[Output, Tensor] = {}
        tapped: list[Tensor] = []
        x = self.embedding(pixel_values)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                results[layers[i]] = self.layer(i, x)
            if i in self.taps:
                tapped.append(x)
        rest = [output for output in self.outputs if output not in results]
        if rest:
            results |= dict(zip(rest, self.readout(x, *tapped), strict=True))
        tensors = tuple(results[output].to(self.output_dtype) for output in self.outputs)
        return tensors[0] if len(tensors) == 1 else tensors

    def layer(self, block: int, x: Tensor) -> Tensor:
        """The output behind a block, of what the block hands on."""
        return x
