"""timm's hybrids, a ResNetV2 before the blocks: ``vit_*_r26_*``, ``vit_*_r50_*``, ``vit_tiny_r_s16_p8_*``.

They are VisionTransformers of timm in all but their stem: the names behind ``patch_embed.backbone.``. Where
the ResNet has no stages, its root lies there without a name of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_object,
    linear,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.infer import what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm import (
    architecture_of,
    called,
    known_heads,
    layout_of,
    modern_name,
    own_sizes_of,
    reading_of,
    refuse,
    stated_fields,
    unsupported_arguments,
)
from vitdeploy.checkpoint.families.timm_names import is_hybrid
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.config import Size, Stem, ViTConfig
from vitdeploy.errors import CheckpointError

_BACKBONE = "patch_embed.backbone"
_ROOT = re.compile(rf"^{re.escape(_BACKBONE)}\.(?=(conv|norm)\.)")
_BLOCK = f"{_BACKBONE}.stages.{{i}}.blocks.{{j}}"
STEM = Stem()
"""What no shape tells of timm's stems."""


def _layout(norm: str) -> Layout:
    ours = "stem.stages.{i}.{j}"
    convolutions = {
        "stem.conv": f"{_BACKBONE}.stem.conv",
        f"{ours}.downsample": f"{_BLOCK}.downsample.conv",
        **{f"{ours}.conv{n}": f"{_BLOCK}.conv{n}" for n in (1, 2, 3)},
    }
    norms = {
        "stem.norm": f"{_BACKBONE}.stem.norm",
        f"{ours}.downsample_norm": f"{_BLOCK}.downsample.norm",
        **{f"{ours}.norm{n}": f"{_BLOCK}.norm{n}" for n in (1, 2, 3)},
    }
    layout = dict(layout_of(norm))
    layout |= {f"{name}.weight": Source(f"{theirs}.weight") for name, theirs in convolutions.items()}
    for name, theirs in norms.items():
        layout |= linear(name, theirs)
    return layout


def _claims(foreign: Foreign) -> bool:
    roots = (f"{_BACKBONE}.stem.conv.weight", f"{_BACKBONE}.conv.weight")
    return "blocks.0.attn.qkv.weight" in foreign.state and not foreign.state.keys().isdisjoint(roots)


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    architecture, arguments = architecture_of(config), config_object(config, "model_args")
    unsupported = [] if not architecture or is_hybrid(architecture) else [called(architecture)]
    unsupported += unsupported_arguments(arguments)
    if arguments.get("padding_same") is False:
        unsupported.append(f"padding_same {shown(False)}")
    refuse(foreign.source, unsupported)
    head = sole_head(foreign.state, "head")
    state, originals = rename_tensors(
        foreign.state, lambda name: _ROOT.sub(f"{_BACKBONE}.stem.", modern_name(name, head))
    )
    norm = "fc_norm" if "fc_norm.weight" in state else "norm"
    heads = known_heads(architecture, arguments) or what_is_open(template, foreign.wanted)[0]
    stated = stated_fields(foreign.source, architecture, config, state)
    reading = reading_of(foreign, template, _layout(norm), state, originals, heads=heads, stem=STEM, **stated)
    if foreign.wanted is None:
        assert isinstance(reading.config, ViTConfig)
        _refuse_padded(foreign.source, own_sizes_of(config)[:1], reading.config)
    return reading


def _refuse_padded(source: str, sizes: Sequence[Size], config: ViTConfig) -> None:
    """Refuse a size that timm's stem rounds up to whole cells: ours is built for whole ones."""
    step = config.step
    for height, width in sizes:
        if height % step or width % step:
            whole = "x".join(str(-(-side // step) * step) for side in (height, width))
            raise CheckpointError(
                f"{source}: timm feeds {height}x{width} pixels, which the ResNet's stride times the patch, "
                f"{step}, does not divide",
                hint=f"--image-size {whole} resizes images to what it does; the scores change a little",
            )


FAMILY = Family("timm_hybrid", _claims, _read, PositionRule(antialias=True, dtype=torch.float32))
