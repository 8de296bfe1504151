"""The architectures that vitdeploy knows, by the kind of their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import (
    InputKind,
    ModelConfig,
    Output,
    Preprocess,
    QwenVisionConfig,
    SwinConfig,
    ViTConfig,
)
from vitdeploy.model import rewrites, swin, swin_rewrites
from vitdeploy.model.architecture import Architecture
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.qwen_deployed import QwenArchitecture
from vitdeploy.model.reference import Reference, public_name
from vitdeploy.model.view import ModelView, swin_view, vit_view
from vitdeploy.model.vit import Attention, FusedAttention, ViT

if TYPE_CHECKING:
    from vitdeploy.model.fused import FusedModel
    from vitdeploy_kernels.swin import SwinShape
    from vitdeploy_kernels.vit import VitShape


class ViTArchitecture(Architecture[ViTConfig, ViT]):
    """The plain Vision Transformer and its kin. The fused kernels are imported when they are asked for."""

    def reference(self, config: ViTConfig, *, fused_attention: bool = False) -> ViT:
        return ViT(config, FusedAttention if fused_attention else Attention)

    def forward_flops(self, config: ViTConfig) -> int:
        return rewrites.forward_flops(config)

    def applied_rewrites(
        self, config: ViTConfig, outputs: tuple[Output, ...], input_kind: InputKind
    ) -> tuple[Rewrite, ...]:
        return rewrites.applied_rewrites(config, outputs, input_kind)

    def deploy(
        self,
        reference: ViT,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess,
    ) -> DeployedModel:
        return rewrites.deploy(reference, plan, outputs=outputs, input_kind=input_kind, preprocess=preprocess)

    def redeploy(
        self,
        reference: ViT,
        like: DeployedModel,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess,
    ) -> DeployedModel:
        return rewrites.redeploy(
            reference, like, plan, outputs=outputs, input_kind=input_kind, preprocess=preprocess
        )

    def view(self, reference: ViT) -> ModelView:
        return vit_view(reference)

    def kernel_shape(self, config: ViTConfig, output: Output, input_kind: InputKind) -> VitShape:
        from vitdeploy.model import fused

        return fused.kernel_shape(config, output, input_kind)

    def fuse(
        self,
        reference: ViT,
        dtype: torch.dtype,
        *,
        output: Output,
        input_kind: InputKind,
        preprocess: Preprocess | None,
        device: torch.device | str,
    ) -> FusedModel:
        from vitdeploy.model import fused

        return fused.fuse(
            reference, dtype, output=output, input_kind=input_kind, preprocess=preprocess, device=device
        )


class SwinArchitecture(Architecture[SwinConfig, swin.Swin]):
    """Swin Transformers of both versions."""

    def reference(self, config: SwinConfig, *, fused_attention: bool = False) -> swin.Swin:
        return swin.Swin(config, swin.FusedAttention if fused_attention else swin.Attention)

    def forward_flops(self, config: SwinConfig) -> int:
        return swin_rewrites.forward_flops(config)

    def applied_rewrites(
        self, config: SwinConfig, outputs: tuple[Output, ...], input_kind: InputKind
    ) -> tuple[Rewrite, ...]:
        return swin_rewrites.applied_rewrites(config, outputs, input_kind)

    def deploy(
        self,
        reference: swin.Swin,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess,
    ) -> DeployedModel:
        return swin_rewrites.deploy(
            reference, plan, outputs=outputs, input_kind=input_kind, preprocess=preprocess
        )

    def view(self, reference: swin.Swin) -> ModelView:
        return swin_view(reference)

    def kernel_shape(self, config: SwinConfig, output: Output, input_kind: InputKind) -> SwinShape:
        from vitdeploy.model import swin_fused

        return swin_fused.kernel_shape(config, output, input_kind)

    def fuse(
        self,
        reference: swin.Swin,
        dtype: torch.dtype,
        *,
        output: Output,
        input_kind: InputKind,
        preprocess: Preprocess | None,
        device: torch.device | str,
    ) -> FusedModel:
        from vitdeploy.model import swin_fused

        return swin_fused.fuse(
            reference, dtype, output=output, input_kind=input_kind, preprocess=preprocess, device=device
        )


ARCHITECTURES: Mapping[str, Architecture[Any, Any]] = {
    ViTConfig.kind: ViTArchitecture(),
    SwinConfig.kind: SwinArchitecture(),
    QwenVisionConfig.kind: QwenArchitecture(),
}
"""For every kind in ``vitdeploy.config.CONFIGS``."""


def architecture_of(config: ModelConfig) -> Architecture[Any, Any]:
    """The architecture of a configuration."""
    return ARCHITECTURES[config.kind]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Public names and shapes of every parameter of this configuration, without allocating them."""
    with torch.device("meta"):
        model: Reference = architecture_of(config).reference(config)
    return {public_name(name): tuple(p.shape) for name, p in model.named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def build_reference(
    config: ModelConfig, state: Mapping[str, Tensor], *, fused_attention: bool = False
) -> Reference:
    """Return the reference model holding ``state``'s tensors as they are: no copy, no conversion.

    Args:
        state: exactly the names of :func:`expected_shapes`, each with that shape.
        fused_attention: by PyTorch's fused kernels; the plain way is the reference.

    Raises:
        KeyError: a parameter is missing.
    """
    with torch.device("meta"):
        model: Reference = architecture_of(config).reference(config, fused_attention=fused_attention)
    tensors = {name: state[public_name(name)] for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, assign=True)
    model.fix_positions()
    return model.eval().requires_grad_(False)
