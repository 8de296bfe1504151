"""What vitdeploy has to know of an architecture, behind one interface.

Whoever exports, runs or measures a model of any kind asks ``registry.architecture_of(config)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import InputKind, ModelConfig, Output, Preprocess
from vitdeploy.errors import UsageError
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vitdeploy.model.fused import FusedModel
    from vitdeploy.model.view import ModelView
    from vitdeploy_kernels.plans import Shape

ConfigT = TypeVar("ConfigT", bound=ModelConfig)
ReferenceT = TypeVar("ReferenceT", bound=Reference)


class Architecture(ABC, Generic[ConfigT, ReferenceT]):
    """One architecture: its reference model, its deployed form, and what its rewrites are."""

    @abstractmethod
    def reference(self, config: ConfigT, *, fused_attention: bool = False) -> ReferenceT:
        """The reference model, its parameters still without values.

        Args:
            fused_attention: by PyTorch's fused kernels, where the architecture has attention.
        """

    @abstractmethod
    def forward_flops(self, config: ConfigT) -> int:
        """FLOPs of the reference model's GEMMs and attention, per image."""

    @abstractmethod
    def applied_rewrites(
        self, config: ConfigT, outputs: tuple[Output, ...], input_kind: InputKind
    ) -> tuple[Rewrite, ...]:
        """The rewrites that :meth:`deploy` applies, with the FLOPs each saves per image."""

    @abstractmethod
    def deploy(
        self,
        reference: ReferenceT,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess,
    ) -> DeployedModel:
        """The deployed form in the dtypes of ``plan``; ``reference`` is not changed.

        Args:
            preprocess: whose mean and std to fold where ``input_kind`` is ``"uint8"``.

        Raises:
            PrecisionError: a weight does not fit into its dtype (each is named).
        """

    def redeploy(
        self,
        reference: ReferenceT,
        like: DeployedModel,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess,
    ) -> DeployedModel:
        """As :meth:`deploy`, for another image size; what does not depend on it may be taken from ``like``.

        Args:
            like: made of the same weights, at another size, with the same arguments.
        """
        return self.deploy(reference, plan, outputs=outputs, input_kind=input_kind, preprocess=preprocess)

    def patches(self, config: ConfigT, pixel_values: Tensor) -> Tensor:
        """Pixels (N, C, H, W) as the patches that the model reads where its input is ``"patches"``.

        Raises:
            UsageError: no image processor of its family makes patches; ``config.inputs`` says so before.
        """
        raise UsageError(f"a model of the kind {config.kind!r} reads images, not patches")

    def view(self, reference: ReferenceT) -> ModelView | None:
        """Where its tokens lie in an image, and its attention; None of an architecture without attention."""
        return None

    def kernel_shape(self, config: ConfigT, output: Output, input_kind: InputKind) -> Shape:
        """What the fused kernels have to compute.

        Raises:
            UsageError: they do not compute this architecture; ``config.beyond_kernels`` says so before.
        """
        raise UsageError(f"there are no fused kernels for a model of the kind {config.kind!r}")

    def fuse(
        self,
        reference: ReferenceT,
        dtype: torch.dtype,
        *,
        output: Output,
        input_kind: InputKind,
        preprocess: Preprocess | None,
        device: torch.device | str,
    ) -> FusedModel:
        """The weights for the fused kernels, in float16 or bfloat16; ``reference`` is not changed.

        Raises:
            UsageError: as :meth:`kernel_shape`.
            PrecisionError: a weight does not fit into the dtype (each is named).
        """
        raise UsageError(f"there are no fused kernels for a model of the kind {reference.config.kind!r}")
