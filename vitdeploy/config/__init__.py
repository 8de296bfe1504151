"""What a model is: frozen configurations, one class for each kind of architecture.

Nothing here imports torch; a configuration travels in a bundle's manifest.
"""

from vitdeploy.config.common import (
    OUTPUTS,
    POOLED,
    Activation,
    BatchRange,
    InputKind,
    ModelConfig,
    Output,
    Precision,
    Scores,
    Size,
    is_output,
    layer_of,
    size_name,
)
from vitdeploy.config.kinds import CONFIGS, model_fields, model_type
from vitdeploy.config.preprocess import Preprocess, Resample
from vitdeploy.config.qwen import QwenVisionConfig
from vitdeploy.config.stem import Stem
from vitdeploy.config.swin import SwinConfig, WindowRule
from vitdeploy.config.vit import FinalNorm, Pool, Position, Rotary, ViTConfig

__all__ = [
    "CONFIGS",
    "OUTPUTS",
    "POOLED",
    "Activation",
    "BatchRange",
    "FinalNorm",
    "InputKind",
    "ModelConfig",
    "Output",
    "Pool",
    "Position",
    "Precision",
    "Preprocess",
    "QwenVisionConfig",
    "Resample",
    "Rotary",
    "Scores",
    "Size",
    "Stem",
    "SwinConfig",
    "ViTConfig",
    "WindowRule",
    "is_output",
    "layer_of",
    "model_fields",
    "model_type",
    "size_name",
]
