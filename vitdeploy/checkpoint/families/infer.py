"""Read a configuration off the tensors themselves, for checkpoints whose files do not state one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitdeploy.checkpoint.families.base import Layout, count_blocks, count_stages, find_tensor
from vitdeploy.checkpoint.refusals import OTHER_MODEL, looks_like
from vitdeploy.config import Pool, Size, Stem, ViTConfig
from vitdeploy.errors import CheckpointError


def infer_config(
    layout: Layout,
    state: Mapping[str, Tensor],
    source: str,
    *,
    heads: Callable[[int], int],
    sizes: Sequence[Size],
    stem: Stem | None = None,
    **stated: Any,
) -> ViTConfig:
    """Return the configuration that the shapes in ``state`` describe.

    Args:
        heads: attention heads for a width; no shape tells them.
        sizes: image sizes the position table may be for, likeliest first; otherwise its grid is square.
        stem: what no shape tells of the ResNet before the patches, where there is one.
        stated: fields of ``ViTConfig`` that shapes cannot tell, or that the caller knows better.

    Raises:
        CheckpointError: a tensor everything depends on is missing or has an impossible shape.
    """
    shapes = Shapes(layout, state, source)
    width, channels, patch, across = shapes.of("patch_embed.weight", 4)
    if patch != across:
        raise CheckpointError(
            f"{source}: patches of {patch}x{across} pixels are not square", hint=OTHER_MODEL
        )
    step = patch
    if stem is not None:
        root, channels, *_ = shapes.of("stem.conv.weight", 4)
        stem = replace(stem, stages=count_stages(layout, state), width=root)
        step *= stem.stride
    inner, mlp_width = shapes.rows("blocks.{i}.mlp.fc1.weight"), shapes.of("blocks.{i}.mlp.fc2.weight", 2)[1]
    gated = inner == 2 * mlp_width
    fields: dict[str, Any] = {
        "patch_size": patch,
        "channels": channels,
        "width": width,
        "depth": count_blocks(layout, state),
        "heads": heads(width),
        "mlp_width": mlp_width,
        "gated_mlp": gated,
        "classes": shapes.rows("head.weight"),
        "cls_token": shapes.have("cls_token"),
        "distillation_token": shapes.have("dist_token"),
        "registers": shapes.rows("registers"),
        "patch_bias": shapes.have("patch_embed.bias"),
        "pre_norm": shapes.have("pre_norm.weight"),
        "qkv_bias": shapes.have("blocks.{i}.attn.q.bias"),
        "key_bias": shapes.have("blocks.{i}.attn.k.bias") or not shapes.have("blocks.{i}.attn.q.bias"),
        "score_bias": shapes.have("blocks.{i}.attn.score_bias"),
        "mlp_norm": shapes.have("blocks.{i}.mlp.norm.weight"),
        "layer_scale": shapes.have("blocks.{i}.scale1"),
        "pool": _pool(shapes, width),
        "projection": shapes.rows("projection.weight"),
        "codes": shapes.rows("code_head.weight"),
        "representation_width": shapes.rows("representation.weight"),
        "stem": stem,
    }
    if gated:
        fields["activation"] = "silu"
    if stated.get("position", "learned") == "learned":
        fields |= _table(shapes, step, sizes)
    else:
        fields |= {"position_prefix": 0, "image_size": sizes[0] if sizes else (224, 224)}
    return ViTConfig(**(fields | stated))


def _table(shapes: Shapes, step: int, sizes: Sequence[Size]) -> dict[str, Any]:
    """What the position table tells: the image size, and how many of its rows are not patches.

    Args:
        step: pixels along one side of a patch.

    Raises:
        CheckpointError: neither one of ``sizes`` nor a square grid accounts for the rows.
    """
    cls = int(shapes.have("cls_token"))
    # Either every prefix token has a row, or none, or (DINOv2's own files) the CLS token alone.
    prefixes = (cls + int(shapes.have("dist_token")) + shapes.rows("registers"), 0, cls)
    rows, _ = shapes.of("pos_embed", 2)
    for height, width in sizes:
        rest = rows - (height // step) * (width // step)
        if rest in prefixes and not (height % step or width % step):
            return {"image_size": (height, width), "position_prefix": rest}
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return {"image_size": (side * step, side * step), "position_prefix": prefix}
    raise CheckpointError(
        f"{shapes.source}: the position table has {rows} rows: no square grid, nor the configured size's",
        hint="state the image size in config.json beside the weights",
    )


def _instead(name: str, state: Mapping[str, Tensor]) -> str:
    """What a checkpoint may be that lacks this tensor."""
    if guess := looks_like(state):
        return guess
    positions = (
        "; without it, positions are rotary or relative, and a config.json beside it has to tell which"
    )
    return positions if "pos" in name else ""


def usual_heads(width: int) -> int:
    """Heads of 64 columns or a little more; 16 for the widths of H, g, G, e and of SoViT-400M."""
    if width in (1152, 1280, 1408, 1664, 1792):
        return 16
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def heads_of_64(width: int) -> int:
    """Heads of 64 columns; of 128 in DINOv3 of 7 billion parameters."""
    return max(1, width // (128 if width >= 4096 else 64))


def what_is_open(template: ViTConfig | None, wanted: Size | None) -> tuple[Callable[[int], int], list[Size]]:
    """``heads`` and ``sizes`` for ``infer_config``: of the variant and size the user named, or as usual."""
    sizes = [] if wanted is None else [wanted]
    if template is None:
        return usual_heads, sizes
    return lambda width: template.heads, [template.image_size, *sizes]


def shape_note(
    config: ViTConfig, template: ViTConfig | None, wanted: Size | None, stated: Sequence[Size] = ()
) -> tuple[str, ...]:
    """What to say of a position table whose shape neither a file nor a variant's name states."""
    (height, width), (rows, columns) = config.image_size, config.grid
    if template is not None or config.position != "learned" or config.image_size in stated:
        return ()
    grid = f"the file does not tell the shape of its {rows * columns} patches: {rows}x{columns}"
    if config.image_size == wanted:
        return (f"{grid}, of the {height}x{width} pixels asked for",) if rows != columns else ()
    return (f"{grid}, of {height}x{width} pixels, is taken, and --image-size settles it",)


def heads_note(config: ViTConfig) -> str:
    guess = f"{config.heads}, as usual for width {config.width}, is taken, and --heads settles it"
    return f"the file does not tell the number of heads: {guess}"


class Shapes:
    """Shapes of our parameters, as far as the foreign checkpoint has them; blocks are judged by the first."""

    def __init__(self, layout: Layout, state: Mapping[str, Tensor], source: str) -> None:
        self.layout, self.state, self.source = layout, state, source

    def have(self, ours: str) -> bool:
        return find_tensor(self.layout, self.state, ours.format(i=0, j=0)) is not None

    def rows(self, ours: str) -> int:
        """Rows of a matrix that not every model has."""
        return self.of(ours, 2)[0] if self.have(ours) else 0

    def of(self, ours: str, dimensions: int, stage: int = 0) -> tuple[int, ...]:
        """The shape of a tensor that has so many dimensions.

        Raises:
            CheckpointError: it is missing, or has others.
        """
        tensor = find_tensor(self.layout, self.state, ours.format(i=stage, j=0))
        name = self.layout[ours].name.format(i=stage, j=0)
        if tensor is None:
            raise CheckpointError(
                f"{self.source}: the tensor {name} is missing{_instead(name, self.state)}", hint=OTHER_MODEL
            )
        if tensor.ndim != dimensions or not tensor.numel():
            raise CheckpointError(
                f"{self.source}: {name} has the impossible shape {tuple(tensor.shape)}", hint=OTHER_MODEL
            )
        return tuple(tensor.shape)


def _pool(shapes: Shapes, width: int) -> Pool:
    if shapes.have("head_dist.weight"):
        return "both_heads"
    if shapes.have("head.weight") and shapes.of("head.weight", 2)[1] == 2 * width:
        return "cls_mean"
    if shapes.have("probe_pool.probe"):
        return "probe"
    return "cls" if shapes.have("cls_token") else "mean"
