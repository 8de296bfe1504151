"""The vision towers of Qwen's vision-language models: one configuration with switches for all generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitdeploy.config.common import Activation, InputKind, ModelConfig, Output, Size
from vitdeploy.errors import ConfigError


@dataclass(frozen=True)
class QwenVisionConfig(ModelConfig):
    """The tower of Qwen2-VL (https://arxiv.org/abs/2409.12191), Qwen2.5-VL (https://arxiv.org/abs/2502.13923)
    or Qwen3-VL (https://arxiv.org/abs/2511.21631), for stills of one size.

    Patches stand in the order of Qwen's image processor: blocks of ``merge`` x ``merge`` patches row by row,
    and the patches of a block row by row. At the end the patches of a block are merged into one feature.

    Raises:
        ConfigError: the numbers do not describe a model that can be built.
    """

    kind = "qwen_vl"
    classes = 0

    image_size: Size = (448, 448)
    patch_size: int = 14
    temporal_patch: int = 2
    """Frames of a patch; a still is repeated."""
    merge: int = 2
    """Patches along each side of the block that becomes one feature."""
    channels: int = 3
    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp_width: int = 5120
    """Columns between the two MLP layers (after the gate, for a gated MLP)."""
    activation: Activation = "quick_gelu"
    gated_mlp: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    patch_bias: bool = False
    positions: int = 0
    """Rows, and columns, of a learned table of positions, beside the rotation; 0 is none."""
    rotary_base: float = 10_000.0
    window: int = 0
    """Pixels along each side of the windows that patches attend within; 0 is the whole image."""
    full_attention: tuple[int, ...] = ()
    """The blocks that attend over the whole image where the others have windows."""
    taps: tuple[int, ...] = ()
    """The blocks behind which deepstack features are read."""
    out_width: int = 3584
    """Columns of a feature: the width of the language model."""

    def __post_init__(self) -> None:
        counts = ("patch_size", "temporal_patch", "merge", "channels", "width", "depth", "heads", "mlp_width")
        for name in (*counts, "out_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        height, width = self.image_size
        if min(self.image_size) < 1 or height % self.step or width % self.step:
            raise ConfigError(
                f"image size {height}x{width} is not divisible by {self.step}, {self.merge} patches of "
                f"{self.patch_size}",
                hint=f"nearest that is: {self.nearest(height)}x{self.nearest(width)}",
            )
        if self.width % self.heads or self.head_width % 4:
            raise ConfigError(f"width {self.width} does not make {self.heads} heads of 4n columns")
        if self.rotary_base <= 1:
            raise ConfigError(f"a rotation by base {self.rotary_base} is none")
        if self.positions < 0 or (self.window and self.window < self.step):
            raise ConfigError(
                f"windows of {self.window} pixels and a table of side {self.positions} are none"
            )
        if self.full_attention and not self.window:
            raise ConfigError("blocks that attend over the whole image go with windows in the others")
        for name in ("full_attention", "taps"):
            blocks = getattr(self, name)
            if list(blocks) != sorted(set(blocks)) or not all(0 <= block < self.depth for block in blocks):
                raise ConfigError(
                    f"{name} {list(blocks)} must be rising numbers of blocks, of which there are {self.depth}"
                )

    @property
    def step(self) -> int:
        """Pixels along each side of what becomes one feature."""
        return self.patch_size * self.merge

    @property
    def grid(self) -> Size:
        """Patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return (1, *self.grid)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def merged(self) -> int:
        """Patches of a block."""
        return self.merge**2

    @property
    def feature_rows(self) -> int:
        """Features that an image becomes."""
        return self.patches // self.merged

    @property
    def head_width(self) -> int:
        """Columns of one attention head."""
        return self.width // self.heads

    @property
    def patch_columns(self) -> int:
        """Numbers of a patch, in the order channels, frames, rows, columns."""
        return self.channels * self.temporal_patch * self.patch_size**2

    @property
    def window_blocks(self) -> int:
        """Blocks along each side of a window."""
        return self.window // self.step

    def windowed(self, block: int) -> bool:
        """Whether patches attend within windows in this block."""
        return self.window > 0 and block not in self.full_attention

    @property
    def inputs(self) -> Mapping[InputKind, tuple[int, ...]]:
        return {**super().inputs, "patches": (self.patches, self.patch_columns)}

    @property
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        shapes: dict[Output, tuple[int, ...]] = {"image_features": (self.feature_rows, self.out_width)}
        if self.taps:
            shapes["deepstack_features"] = (len(self.taps), self.feature_rows, self.out_width)
        return shapes

    @property
    def usual_outputs(self) -> tuple[Output, ...]:
        # The language model was trained with all of them.
        return self.outputs

    @property
    def reference_bytes(self) -> int:
        # Attention holds the scores of all pairs of patches twice: before the softmax and behind it.
        return 8 * (2 * self.heads * self.patches**2 + 2 * self.patches * self.width)

    @property
    def summary(self) -> str:
        height, width = self.image_size
        shape = f"width {self.width}, depth {self.depth}, heads {self.heads}, patch {self.patch_size}"
        return f"{shape}, {height}x{width} pixels, {self.patches} patches, {self.feature_rows} features"
