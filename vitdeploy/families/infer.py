"""Read a configuration off the tensors themselves, for checkpoints whose files do not state one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitdeploy.config import Pool, Size, ViTConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.families.base import Layout, count_blocks, find


def infer_config(
    layout: Layout,
    state: Mapping[str, Tensor],
    source: str,
    *,
    heads: int,
    sizes: Sequence[Size],
    **known: Any,
) -> ViTConfig:
    """Return the configuration that the shapes in ``state`` describe.

    Args:
        heads: attention heads; no shape tells them.
        sizes: image sizes the position table may be for, likeliest first; otherwise its grid is square.
        known: fields of ``ViTConfig`` that shapes cannot tell, or that the caller knows better.

    Raises:
        CheckpointError: a tensor everything depends on is missing or has an impossible shape.
    """
    shapes = _Shapes(layout, state, source)
    width, channels, patch, across = shapes.of("patch_embed.weight", 4)
    if patch != across:
        raise CheckpointError(f"{source}: patches of {patch}x{across} pixels are not square")
    fc1, (_, mlp_width) = shapes.of("blocks.{i}.mlp.fc1.weight", 2), shapes.of("blocks.{i}.mlp.fc2.weight", 2)
    gated = fc1[0] == 2 * mlp_width
    registers = shapes.rows("registers")
    tokens = {name: shapes.have(name) for name in ("cls_token", "dist_token")}
    fields: dict[str, Any] = {
        "patch_size": patch,
        "channels": channels,
        "width": width,
        "depth": count_blocks(layout, state),
        "heads": heads,
        "mlp_width": mlp_width,
        "gated_mlp": gated,
        "classes": shapes.rows("head.weight"),
        "cls_token": tokens["cls_token"],
        "distillation_token": tokens["dist_token"],
        "registers": registers,
        "qkv_bias": shapes.have("blocks.{i}.attn.q.bias"),
        "layer_scale": shapes.have("blocks.{i}.scale1"),
        "pool": _pool(shapes, width),
        "representation_width": shapes.rows("representation.weight"),
    }
    if gated:
        fields["activation"] = "silu"
    if shapes.have("pos_embed"):
        prefix = sum(tokens.values()) + registers
        # Either every prefix token has a row, or none, or (DINOv2's own files) the CLS token alone.
        choices = (prefix, 0, int(tokens["cls_token"]))
        rows = shapes.of("pos_embed", 2)[0]
        fields["image_size"], fields["position_prefix"] = table_size(rows, choices, patch, sizes, source)
    else:
        fields |= {"position": "none", "position_prefix": 0, "image_size": sizes[0] if sizes else (224, 224)}
    return ViTConfig(**(fields | known))


def table_size(
    rows: int, prefixes: Sequence[int], patch: int, sizes: Sequence[Size], source: str
) -> tuple[Size, int]:
    """Return the image size a position table of ``rows`` rows is for, and how many rows are not patches.

    Raises:
        CheckpointError: neither one of ``sizes`` nor a square grid accounts for the rows.
    """
    for height, width in sizes:
        rest = rows - (height // patch) * (width // patch)
        if rest in prefixes and not (height % patch or width % patch):
            return (height, width), rest
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return (side * patch, side * patch), prefix
    raise CheckpointError(
        f"{source}: the position table has {rows} rows: no square grid, and not the configured image size's",
        hint="state the image size in config.json beside the weights",
    )


def default_heads(width: int, classic: Mapping[int, int]) -> tuple[int, str]:
    """Return the heads usual for a width (64 columns each unless ``classic`` says otherwise), and a note."""
    heads = classic.get(width) or max(1, width // 64)
    return heads, f"the file does not tell the number of heads: {heads}, as usual for width {width}"


class _Shapes:
    """Shapes of our parameters, as far as the foreign checkpoint has them; blocks are judged by the first."""

    def __init__(self, layout: Layout, state: Mapping[str, Tensor], source: str) -> None:
        self.layout, self.state, self.source = layout, state, source

    def have(self, ours: str) -> bool:
        return find(self.layout, self.state, ours.format(i=0)) is not None

    def rows(self, ours: str) -> int:
        """Rows of a matrix that not every model has."""
        return self.of(ours, 2)[0] if self.have(ours) else 0

    def of(self, ours: str, dimensions: int) -> tuple[int, ...]:
        tensor = find(self.layout, self.state, ours.format(i=0))
        name = self.layout[ours].name.format(i=0)
        if tensor is None:
            raise CheckpointError(f"{self.source}: the tensor {name} is missing")
        if tensor.ndim != dimensions or not tensor.numel():
            raise CheckpointError(f"{self.source}: {name} has the impossible shape {tuple(tensor.shape)}")
        return tuple(tensor.shape)


def _pool(shapes: _Shapes, width: int) -> Pool:
    if shapes.have("head_dist.weight"):
        return "both_heads"
    if shapes.have("head.weight") and shapes.of("head.weight", 2)[1] == 2 * width:
        return "cls_mean"
    return "cls" if shapes.have("cls_token") else "mean"
