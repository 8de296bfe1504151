"""Swin Transformers of both versions: attention in windows of a map that gets smaller from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitdeploy.config.common import Activation, ModelConfig, Output, Size, layer_of
from vitdeploy.errors import ConfigError

WindowRule = Literal["fixed", "square", "sides"]


@dataclass(frozen=True)
class SwinConfig(ModelConfig):
    """A Swin Transformer (Liu et al. 2021, https://arxiv.org/abs/2103.14030) or version 2 of it.

    Version 2 (Liu et al. 2022, https://arxiv.org/abs/2111.09883) scores by the cosine of query and key, takes
    its score bias from an MLP of log-spaced offsets, and normalises what a branch returns instead of what it
    reads; its keys have no bias.

    A stage works on a map of tokens; between two stages four neighbours become one token of twice the columns
    (an odd side is padded with zeros). Tuples have an entry for each stage; the first of every two blocks has
    plain windows, the second shifted ones.

    Raises:
        ConfigError: the numbers do not describe a model that can be built.
    """

    kind = "swin"

    version: Literal[1, 2] = 1
    image_size: Size = (224, 224)
    patch_size: int = 4
    channels: int = 3
    width: int = 96
    """Columns in the first stage."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[Size, ...] = ((7, 7),) * 4
    """Rows and columns of a window, where the map has room for it."""
    shifts: tuple[Size, ...] = ((3, 3),) * 4
    """Rows and columns by which the windows of every second block lie further down and to the right."""
    window_rule: WindowRule = "square"
    """What becomes of windows on small maps. ``square``: where one side has no room for more than one window,
    windows are as large as that side, and none is shifted (transformers' version 1). ``sides``: each side by
    itself (timm). ``fixed``: nothing, the map is padded (transformers' version 2, and timm's
    ``always_partition``)."""
    pad_first: bool = True
    """Whether a map that the windows do not divide is padded before it is shifted (transformers), or after it
    (timm). Padding is zeros, which no mask hides."""
    mask: float = -100.0
    """What is added to the scores of tokens that are neighbours only by the shift."""
    pretrained_windows: tuple[Size, ...] = ()
    """Of version 2: the windows that offsets are measured by; none or (0, 0) are its own."""
    mlp_ratio: float = 4.0
    """Columns between the two MLP layers, as a multiple of the stage's."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    position: bool = False
    """Whether patches have learned positions."""
    norm_eps: float = 1e-5
    """Of the norms of the blocks and the last one; those of patches and of merging have 1e-5."""
    classes: int = 1000
    """Columns of the logits; 0 is a model without a head."""

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("heads", "windows", "shifts", "pretrained_windows"):
            entries = getattr(self, name)
            if len(entries) != stages and not (name == "pretrained_windows" and not entries):
                raise ConfigError(f"{name} has {len(entries)} entries for {stages} stages")
        numbers = (self.patch_size, self.channels, self.width, *self.depths, *self.heads)
        if not stages or min(*numbers, *(side for window in self.windows for side in window)) < 1:
            raise ConfigError("a Swin's sizes, depths, heads and windows must be at least 1")
        for (height, width), shift in zip(self.windows, self.shifts, strict=True):
            if not (0 <= shift[0] < height and 0 <= shift[1] < width):
                raise ConfigError(f"windows of {height}x{width} cannot be shifted by {shift[0]}x{shift[1]}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ConfigError(f"width {width} is not divisible by {heads} heads")
        if any(mlp < 1 for mlp in self.mlp_widths):
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves no columns")
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image size {height}x{width} is not divisible by the patch size {self.patch_size}",
                hint=f"nearest that is: {self.nearest(height)}x{self.nearest(width)}",
            )
        if self.version == 1 and self.window_rule == "square":
            self._refuse_small_maps()

    def _refuse_small_maps(self) -> None:
        """The original shrinks such windows, but not their tables of biases, and fails."""
        for stage, ((height, width), (rows, columns)) in enumerate(zip(self.maps, self.windows, strict=True)):
            if self.window(stage) != (rows, columns):
                least = max(map(self._least, range(len(self.depths))))
                raise ConfigError(
                    f"stage {stage} has windows of {rows}x{columns}, but a map of {height}x{width}",
                    hint=f"no side of an image may be less than {least} pixels",
                )

    def _least(self, stage: int) -> int:
        """Pixels of a side that leave the map of a stage a whole window."""
        patches: int = 2**stage * (max(self.windows[stage]) - 1) + 1
        return patches * self.patch_size

    @property
    def step(self) -> int:
        return self.patch_size

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of a token, for each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        return tuple(int(self.mlp_ratio * width) for width in self.widths)

    @property
    def grid(self) -> Size:
        """Patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def maps(self) -> tuple[Size, ...]:
        """Rows and columns of each stage's tokens."""
        maps = [self.grid]
        for _ in self.depths[1:]:
            rows, columns = maps[-1]
            maps.append(((rows + 1) // 2, (columns + 1) // 2))
        return tuple(maps)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """For each block, its stage and its number in it."""
        return tuple((stage, block) for stage, depth in enumerate(self.depths) for block in range(depth))

    def window(self, stage: int) -> Size:
        """Rows and columns of a stage's windows, on its map."""
        (rows, columns), (height, width) = self.windows[stage], self.maps[stage]
        if self.window_rule == "sides":
            return min(rows, height), min(columns, width)
        if self.window_rule == "square" and min(height, width) <= rows:
            return min(height, width), min(height, width)
        return rows, columns

    def shift(self, stage: int, block: int) -> Size:
        """Rows and columns by which the windows of a block are shifted, on its map."""
        if block % 2 == 0:
            return 0, 0
        (rows, columns), (height, width) = self.windows[stage], self.maps[stage]
        down, right = self.shifts[stage]
        if self.window_rule == "sides":
            return down if height > rows else 0, right if width > columns else 0
        if self.window_rule == "square" and min(height, width) <= rows:
            return 0, 0
        return down, right

    def padded(self, stage: int) -> Size:
        """Rows and columns of a stage's map, padded to whole windows."""
        (rows, columns), (height, width) = self.window(stage), self.maps[stage]
        return -(-height // rows) * rows, -(-width // columns) * columns

    def beyond_kernels(self, output: Output) -> tuple[str, ...]:
        padded = any(self.padded(stage) != size for stage, size in enumerate(self.maps))
        odd = any(rows % 2 or columns % 2 for rows, columns in self.maps[:-1])
        beyond = {
            "the cosine attention of Swin v2": self.version == 2,
            "windows that do not divide their map, which is padded": padded,
            "merging of a map with an odd side": odd,
            "the tokens behind single blocks": layer_of(output) is not None,
        }
        return tuple(what for what, applies in beyond.items() if applies)

    @property
    def features(self) -> int:
        """Columns of the pooled vector."""
        return self.widths[-1]

    @property
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        rows, columns = self.maps[-1]
        logits: dict[Output, tuple[int, ...]] = {"logits": (self.classes,)} if self.classes else {}
        pooled = (self.features,)
        tokens = (rows * columns, self.features)
        return {**logits, "features": pooled, "embedding": pooled, "tokens": tokens}

    def output_shape(self, output: Output) -> tuple[int, ...] | None:
        layer = layer_of(output)
        if layer is None:
            return self.output_shapes.get(output)
        if layer >= self.depth:
            return None
        stage, _ = self.blocks[layer]
        rows, columns = self.maps[stage]
        return rows * columns, self.widths[stage]

    @property
    def reference_bytes(self) -> int:
        # Attention holds the scores of every window twice: before the softmax and behind it.
        most = 0
        for stage, heads in enumerate(self.heads):
            (height, width), (rows, columns) = self.padded(stage), self.window(stage)
            per_token = max(2 * heads * rows * columns, self.mlp_widths[stage]) + 4 * self.widths[stage]
            most = max(most, 8 * height * width * per_token)
        return most

    @property
    def summary(self) -> str:
        height, width = self.image_size
        depths, heads = ("-".join(map(str, numbers)) for numbers in (self.depths, self.heads))
        windows = "-".join(
            str(rows) if rows == columns else f"{rows}x{columns}"
            for rows, columns in dict.fromkeys(map(self.window, range(len(self.depths))))
        )
        measures = f"width {self.width}, depths {depths}, heads {heads}, windows {windows}"
        return f"version {self.version}, {measures}, patch {self.patch_size}, {height}x{width} pixels"
