"""Reference parts that architectures share."""

from __future__ import annotations

from torch import Tensor, nn

from vitdeploy.config import Activation
from vitdeploy.model.reference import ACTIVATIONS


class Mlp(nn.Module):
    """Two linear layers with an activation between them, (N, T, D) to (N, T, D).

    Args:
        hidden: columns between the two; behind the gate, where there is one.
        gated: SwiGLU (Shazeer 2020): ``fc1`` has twice the rows, the gate's half first.
        norm_eps: of a LayerNorm between activation and ``fc2``; None is no norm.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation,
        *,
        gated: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.activation: Activation = activation
        self.fc1 = nn.Linear(width, hidden * (2 if gated else 1))
        self.norm = None if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (N, T, D) -> (N, T, M), or 2M when gated
        if self.gated:
            gate, x = x.chunk(2, dim=-1)  # (N, T, M) each
            x = ACTIVATIONS[self.activation](gate) * x
        else:
            x = ACTIVATIONS[self.activation](x)
        return self.fc2(x if self.norm is None else self.norm(x))  # (N, T, D)
