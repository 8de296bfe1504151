"""Small towers of transformers' vision-language models, with weights that leave nothing zero."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.helpers.exact import Exact

PATCH = 4
COMMON: dict[str, Any] = {"depth": 3, "num_heads": 4, "patch_size": PATCH}
_LATER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 40}
_QWEN3: dict[str, Any] = {**_LATER, "num_position_embeddings": 36}
TAPS: dict[str, Any] = {"deepstack_visual_indexes": [0, 2]}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 40, "mlp_ratio": 2},
    "qwen2_5_vl": {**_LATER, "window_size": 32, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**_QWEN3, **TAPS},
    "qwen3_vl_moe": {**_QWEN3, **TAPS},
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
}
"""``vision_config`` by the model type of the whole."""
_CLASSES = {
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
}
_PREFIX = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
_TEXT: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "head_dim": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 4, 4], "rope_theta": 10000.0},
}


def shaken(model: Any, seed: int = 0) -> Any:
    """Every parameter at random, gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if gain else noise)
    return model.eval()


def tower(kind: str, **changes: Any) -> Any:
    """The tower alone."""
    modelling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    cls = getattr(modelling, _CLASSES[kind])
    return shaken(cls(cls.config_class(**COMMON, **(TOWERS[kind] | changes))))


def whole(kind: str, **changes: Any) -> Any:
    """The tower and a language model."""
    config = getattr(transformers, f"{_PREFIX[kind]}Config")(
        vision_config={**COMMON, **(TOWERS[kind] | changes)}, text_config=_TEXT, vision_start_token_id=60
    )
    return shaken(getattr(transformers, f"{_PREFIX[kind]}ForConditionalGeneration")(config))


def processor(patch: int = PATCH, **settings: Any) -> Any:
    """Their image processor, by Pillow."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=64, max_pixels=2**24, **settings)


def patches(pixels: np.ndarray[Any, Any] | Tensor, patch: int = PATCH) -> Tensor:
    """Pixels (N, C, H, W) float32 as the processor lays them out, (N, T, C 2 P P)."""
    own = processor(patch)
    made = [own.patchify(np.asarray(image), patch, 2, 2)[0] for image in pixels]
    return torch.from_numpy(np.stack(made))


def answers(model: Any, pixel_values: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What a tower gives in float64 for the patches (N, T, columns) of images, each by itself."""
    model = model.double().eval()
    given: list[dict[str, Tensor]] = []
    for image in pixel_values.double():
        with torch.inference_mode(), Exact():
            result = model(image, grid_thw=torch.tensor([[1, *grid]]))
        one = {"image_features": result.pooler_output}
        if getattr(result, "deepstack_features", None):
            one["deepstack_features"] = torch.stack(list(result.deepstack_features))
        given.append(one)
    return {name: torch.stack([one[name] for one in given]) for name in given[0]}


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture of another size than any bucket."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return small.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """A folder as transformers writes it, with a processor's settings."""
    model.float().save_pretrained(folder, **settings)
    processor().save_pretrained(folder)
    return folder
