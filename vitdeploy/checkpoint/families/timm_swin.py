"""timm's Swin Transformers: ``swin_*``, ``swin_s3_*`` and ``swinv2_*``, and the authors' own files.

Liu et al. 2021 (https://arxiv.org/abs/2103.14030), Liu et al. 2022 (https://arxiv.org/abs/2111.09883), and
for ``s3``, which are plain Swins with windows of several sizes, Chen et al. 2021
(https://arxiv.org/abs/2111.14725). Merging is at the beginning of a stage in timm of today; in the authors'
files and in elder ones of timm it is at the end of the stage before. Those files have windows and masks in
buffers.

Another image size keeps the windows, as timm's ``create_model(..., img_size=...)`` does; only a map that is
smaller than a window makes it smaller, and then the table of version 1 is resized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_number,
    config_object,
    count_stages,
    flat,
    height_and_width,
    linear,
    merged_qkv,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.huggingface import scores_of
from vitdeploy.checkpoint.families.infer import Shapes
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm import (
    activation_by_argument,
    architecture_of,
    called,
    is_wrapped,
    labels_of,
    own_sizes_of,
    preprocess_of,
    pretrained_of,
    refuse,
)
from vitdeploy.checkpoint.families.timm_beit import stretched
from vitdeploy.checkpoint.families.timm_names import is_swin, swin_windows, trained_windows
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.config import Size, SwinConfig, ViTConfig
from vitdeploy.errors import CheckpointError

_BLOCK = "layers.{i}.blocks.{j}"
_FIRST = "layers.0.blocks.0.attn"
_MERGE = "layers.{i}.downsample"
_BUFFERS = (
    r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.(relative_position_index|relative_coords_table|k_bias))"
)
_SETTINGS = {"crop_pct": 0.9}
"""timm's defaults for everything else are those of ImageNet."""


def _claims(foreign: Foreign) -> bool:
    if "patch_embed.proj.weight" not in foreign.state:
        return False
    names = {f"{_FIRST}.qkv.weight", "stages.0.blocks.0.attn.meta_mlp.fc1.weight"}
    return not names.isdisjoint(foreign.state)


def _layout(version: int) -> Layout:
    qkv = f"{_BLOCK}.attn.qkv"
    attention = merged_qkv(f"{qkv}.weight", f"{qkv}.bias", f"{_BLOCK}.attn")
    if version == 1:
        bias = {"table": Source(f"{_BLOCK}.attn.relative_position_bias_table")}
    else:
        attention |= {f"{_BLOCK}.attn.{name}.bias": Source(f"{_BLOCK}.attn.{name}_bias") for name in "qv"}
        attention[f"{_BLOCK}.attn.log_scale"] = Source(f"{_BLOCK}.attn.logit_scale", torch.flatten)
        mlp = f"{_BLOCK}.attn.cpb_mlp"
        bias = {**linear("fc1", f"{mlp}.0"), "fc2.weight": Source(f"{mlp}.2.weight")}
    return {
        **linear("patch_embed", "patch_embed.proj"),
        **linear("patch_norm", "patch_embed.norm"),
        "pos_embed": Source("absolute_pos_embed", flat(2)),
        **linear(f"{_BLOCK}.norm1", f"{_BLOCK}.norm1"),
        **attention,
        **{f"{_BLOCK}.attn.score_bias.{name}": source for name, source in bias.items()},
        **linear(f"{_BLOCK}.attn.proj", f"{_BLOCK}.attn.proj"),
        **linear(f"{_BLOCK}.norm2", f"{_BLOCK}.norm2"),
        **linear(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}.mlp.fc1"),
        **linear(f"{_BLOCK}.mlp.fc2", f"{_BLOCK}.mlp.fc2"),
        **linear("layers.{i}.merge.norm", f"{_MERGE}.norm"),
        "layers.{i}.merge.reduction.weight": Source(f"{_MERGE}.reduction.weight"),
        **linear("norm", "norm"),
        **linear("head", "head"),
    }


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    architecture, arguments = architecture_of(config), config_object(config, "model_args")
    pretrained = pretrained_of(config)
    refuse(foreign.source, _unsupported(architecture, config, arguments))
    head, late = sole_head(foreign.state, "head"), f"{_MERGE.format(i=0)}.reduction.weight" in foreign.state

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        return f"head.{leaf}" if layer == head else name if late else _moved(name, -1)

    state, originals = rename_tensors(foreign.state, rename)
    model, notes = _config(foreign, state, architecture, arguments, own_sizes_of(config))
    if head not in (None, "head", "head.fc"):
        notes = (*notes, f"the head is the linear layer {head!r}")
    default = "no config.json of timm: preprocessing is timm's default for Swin"
    return Reading(
        config=model,
        layout=_layout(model.version),
        state=state,
        preprocess=lambda size: preprocess_of(
            config, pretrained, model.channels, size or model.image_size, _SETTINGS
        ),
        ignored={_BUFFERS: None},
        labels=labels_of(config, pretrained, model.classes),
        scores=scores_of(config) if is_wrapped(config) else None,
        notes=notes,
        assumed={} if pretrained else {"preprocess": default},
        originals=originals,
        spell=str if late else lambda name: _moved(name, 1),
    )


def _moved(name: str, by: int) -> str:
    """A name in a merging, with the number of another stage."""
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + by}.downsample", name)


def _unsupported(
    architecture: str, config: Mapping[str, object], arguments: Mapping[str, object]
) -> list[str]:
    found = [] if not architecture or is_swin(architecture) else [called(architecture)]
    usual = {"norm_layer": (None, "layernorm"), "global_pool": (None, "avg"), "head_dim": (None,)}
    stated = {"global_pool": config.get("global_pool"), **arguments}
    return found + [
        f"{key} {shown(stated[key])}"
        for key, values in usual.items()
        if key in stated and stated[key] not in values
    ]


def _config(
    foreign: Foreign,
    state: Mapping[str, Tensor],
    architecture: str,
    arguments: Mapping[str, object],
    sizes: list[Size],
) -> tuple[SwinConfig, tuple[str, ...]]:
    """What names, numbers and shapes tell, and a note where they leave the image size open."""
    version: Literal[1, 2] = 2 if f"{_FIRST}.logit_scale" in state else 1
    layout = _layout(version)
    shapes = Shapes(layout, state, foreign.source)
    width, channels, patch, _ = shapes.of("patch_embed.weight", 4)
    depths = count_stages(layout, state)
    stages = range(len(depths))
    if version == 1:
        heads = tuple(shapes.of(f"{_BLOCK}.attn.score_bias.table", 2, stage)[1] for stage in stages)
    else:
        heads = tuple(shapes.of(f"{_BLOCK}.attn.log_scale", 1, stage)[0] for stage in stages)
    windows = _windows(foreign, state, architecture, arguments, len(depths))
    known = sizes[:1] or _size_of_mask(state, windows[0], patch)
    rows, columns = (side * patch * 2 ** stages[-1] for side in windows[-1])
    config = SwinConfig(
        version=version,
        image_size=known[0] if known else (rows, columns),
        patch_size=patch,
        channels=channels,
        width=width,
        depths=depths,
        heads=heads,
        windows=windows,
        shifts=tuple((rows // 2, columns // 2) for rows, columns in windows),
        window_rule="fixed" if arguments.get("always_partition") else "sides",
        pad_first=False,
        pretrained_windows=_measures(state, architecture, arguments, len(depths)) if version == 2 else (),
        mlp_ratio=config_number(arguments, "mlp_ratio", shapes.of(f"{_BLOCK}.mlp.fc1.weight", 2)[0] / width),
        activation=activation_by_argument(arguments) or "gelu",
        qkv_bias=shapes.have(f"{_BLOCK}.attn.q.bias"),
        position=shapes.have("pos_embed"),
        classes=shapes.rows("head.weight"),
    )
    note = f"the file does not tell its image size: {rows}x{columns} is taken, and --image-size settles it"
    return config, () if known or foreign.wanted else (note,)


def _windows(
    foreign: Foreign,
    state: Mapping[str, Tensor],
    architecture: str,
    arguments: Mapping[str, object],
    stages: int,
) -> tuple[Size, ...]:
    """Rows and columns of each stage's windows: as stated, by name, or as tables have them.

    Raises:
        CheckpointError: nothing tells.
    """
    stated = arguments.get("window_size") or swin_windows(architecture)
    if stated is not None:
        return _per_stage(stated, "window_size", stages)
    windows = [_window_of_table(state, stage) for stage in range(stages)]
    if None in windows:
        raise CheckpointError(
            f"{foreign.source}: the file does not tell the size of its windows",
            hint="timm's config.json beside it tells, or -m timm:NAME --checkpoint FILE",
        )
    return tuple(window for window in windows if window is not None)


def _per_stage(stated: object, key: str, stages: int) -> tuple[Size, ...]:
    """timm's way to say it: one for all stages, a number or two, or a list with an entry for each."""
    listed = isinstance(stated, (list, tuple)) and not (len(stated) == 2 and isinstance(stated[0], int))
    entries = stated if isinstance(stated, (list, tuple)) and listed else [stated] * stages
    return tuple(height_and_width(entry, key) for entry in entries)


def _window_of_table(state: Mapping[str, Tensor], stage: int) -> Size | None:
    """What the first block of a stage has offsets for; None where no table of them is in the file."""
    first = f"layers.{stage}.blocks.0.attn"
    if (offsets := state.get(f"{first}.relative_coords_table")) is not None and offsets.ndim == 4:
        return (offsets.shape[1] + 1) // 2, (offsets.shape[2] + 1) // 2
    table = state.get(f"{first}.relative_position_bias_table")
    if table is None or not table.ndim:
        return None
    side = math.isqrt(len(table))
    return ((side + 1) // 2, (side + 1) // 2) if side % 2 and side * side == len(table) else None


def _size_of_mask(state: Mapping[str, Tensor], window: Size, patch: int) -> list[Size]:
    """The image size that the mask of shifted windows is for, where a file has one; it is a square."""
    mask = state.get("layers.0.blocks.1.attn_mask")
    if mask is None or mask.ndim != 3 or window[0] != window[1]:
        return []
    side = math.isqrt(len(mask)) * window[0] * patch
    return [(side, side)]


def _measures(
    state: Mapping[str, Tensor], architecture: str, arguments: Mapping[str, object], stages: int
) -> tuple[Size, ...]:
    """The windows that offsets are measured by, where the model was trained with others."""
    stated = arguments.get("pretrained_window_sizes") or trained_windows(architecture)
    if stated is not None:
        entries = stated if isinstance(stated, (list, tuple)) else [stated] * stages
        return tuple(height_and_width(entry, "pretrained_window_sizes") for entry in entries)
    found = [_measure_of_table(state, stage) for stage in range(stages)]
    return tuple(found) if any(map(any, found)) else ()


def _measure_of_table(state: Mapping[str, Tensor], stage: int) -> Size:
    """The window by which a table of log-spaced offsets was measured; (0, 0) where it is its own, or unknown.

    The largest offset, that of w - 1 places measured by m, is log2(8 (w - 1) / (m - 1) + 1) / 3.
    """
    table = state.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
    window = _window_of_table(state, stage)
    if table is None or table.ndim != 4 or window is None or min(window) < 2:
        return 0, 0
    largest = (2 ** (3 * table[0, -1, -1].double()) - 1).tolist()
    rows, columns = (1 + round(8 * (w - 1) / far) for w, far in zip(window, largest, strict=True))
    return (0, 0) if (rows, columns) == window else (rows, columns)


# The table is a float32 when timm resizes it, whatever it becomes.
FAMILY = Family("timm_swin", _claims, _read, PositionRule(dtype=torch.float32, offsets=stretched))
