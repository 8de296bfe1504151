"""Plans of models some of whose GEMMs are 8 bits wide, which take another route than the others."""

from __future__ import annotations

import torch
from torch import Tensor

from vitdeploy_kernels.fp8 import E4M3, Fp8Linear, launch_norm_quantise, launch_quantise, scaled_mm
from vitdeploy_kernels.layernorm_linear import Folded
from vitdeploy_kernels.planner import Planner, activate_in_place
from vitdeploy_kernels.vit import AbsorbedBlock, Block, Linear

OPERATION = "fp8 product"
REASON = "cuBLASLt multiplies 8-bit floats"


class Fp8Planner(Planner):
    """Builds the plan of one batch size; takes what :class:`Planner` takes.

    What an 8-bit product adds to the residual stream waits until the next LayerNorm reads the stream: one
    kernel adds it, centres the sum, normalises and quantises. An activation waits until its rows are
    quantised.
    """

    _branch: Tensor | None = None
    """What is still to be added to the stream."""
    _activation: str = "none"
    """What is still to be applied to the MLP's hidden rows."""

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
        """LayerNorm and linear layer, in 8 bits where the layer is; the activation then waits."""
        if isinstance(folded, Folded):
            self._settle(site, stats)
            return super().norm_linear(site, x, stats, folded, out, activation, eps=eps)
        quantised = self.take("normed.fp8", x.shape, E4M3)
        self._norm_quantise(f"{site}.norm", folded, quantised)
        self._multiply(site, quantised, folded, out)
        if self.shape.gated or self.shape.mlp_norm:
            if activation != "none":
                call = lambda: activate_in_place(out, activation)  # noqa: E731
                self.leave(f"{site}.activation", "activation", call, "something else reads it first")
        else:
            self._activation = activation
        return None

    def _residual(
        self, site: str, x: Tensor, linear: Linear | Fp8Linear, residual: Tensor, out: Tensor
    ) -> Tensor:
        activation, self._activation = self._activation, "none"
        if isinstance(linear, Linear):
            if activation != "none":
                call = lambda: activate_in_place(x, activation)  # noqa: E731
                self.leave(f"{site}.activation", "activation", call, "its layer is not of 8 bits")
            return super()._residual(site, x, linear, residual, out)
        quantised = self.take("hidden.fp8", x.shape, E4M3)
        self.launch(f"{site}.quantise", launch_quantise(x, quantised, linear.inverse, activation))
        self._branch = self.take("branch", (len(x), self.shape.width))
        self._multiply(site, quantised, linear, self._branch)
        # Filled when the branch is added, if anything asks for them.
        return self.take("stats", (len(x), 1, 2), torch.float32)

    def _multiply(self, site: str, x: Tensor, linear: Fp8Linear, out: Tensor) -> None:
        self.leave(site, OPERATION, lambda: scaled_mm(x, linear, out), REASON)

    def _norm_quantise(self, site: str, linear: Fp8Linear | None, out: Tensor | None) -> None:
        branch, self._branch = self._branch, None
        config = self.entry("add_layernorm", *self.x.shape).config
        total = None if branch is None else self.x
        launch = launch_norm_quantise(self.x, branch, total, linear, out, eps=self.shape.eps, config=config)
        self.launch(site, launch)

    def _settle(self, site: str, stats: Tensor) -> None:
        """Add what waits, for a kernel that reads the stream and its statistics itself."""
        if self._branch is not None:
            self._norm_quantise(f"{site}.add", None, None)
            self.layernorm(f"{site}.stats", self.x, None, None, None, None, stats)

    def _attention(self, site: str, block: Block, stats: Tensor) -> Tensor:
        if isinstance(block.qkv, Folded):
            self._settle(f"{site}.first", stats)
        return super()._attention(site, block, stats)

    def _absorbed(self, site: str, block: AbsorbedBlock, stats: Tensor) -> tuple[Tensor, Tensor]:
        self._settle(f"{site}.first", stats)
        return super()._absorbed(site, block, stats)

    def _read_out(self, rows: Tensor, stats: Tensor) -> Tensor:
        self._settle("readout", stats)
        return super()._read_out(rows, stats)
