"""Small models of every architecture in their deployed form, to be quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.models import CONFIGS, pixels, random_state
from tests.helpers.qwens import CONFIGS as QWENS
from tests.helpers.swins import SWINS
from vitdeploy.config import ModelConfig, Preprocess
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.registry import architecture_of, build_reference

MODELS: dict[str, ModelConfig] = {
    **CONFIGS,
    **{f"swin {name}": config for name, config in SWINS.items()},
    **{name: QWENS[name] for name in ("qwen2", "qwen2_5", "qwen3")},
}


def deployed(name: str, plan: PrecisionPlan | None = None, outputs: tuple[str, ...] = ()) -> DeployedModel:
    """In float32 unless ``plan`` says otherwise, with its first output unless ``outputs`` does."""
    config = MODELS[name]
    # Weights of trained models: what a layer gives is about as large as what it reads.
    state = {
        key: tensor / max(1.0, 0.3 * tensor[0].numel() ** 0.5) if tensor.dim() > 1 else tensor
        for key, tensor in random_state(config).items()
    }
    return architecture_of(config).deploy(
        build_reference(config, state),
        plan or PrecisionPlan.of("fp32"),
        outputs=outputs or config.outputs[:1],
        input_kind="float",
        preprocess=Preprocess(size=config.image_size),
    )


def images_of(name: str, count: int = 6, seed: int = 1) -> Tensor:
    """Normalised images, which are not alike: each has a colour and some noise; (count, C, H, W) float32."""
    config = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn((count, config.channels, 1, 1), generator=generator)
    return colours + pixels(config, count, seed)
