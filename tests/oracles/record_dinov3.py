"""Record what transformers' DINOv3 and its processor make of photographs, for tests/checkpoint/families.

    PYTHONPATH=. python tests/oracles/record_dinov3.py  # with transformers, torchvision and scikit-learn

The processor needs torchvision, which the test environment does not have. tests/oracles/dinov3 is what
``save_pretrained`` of a tiny random model and of the processor write, with ``answer.safetensors`` in it:
``pixels`` (2, 3, H, W) and ``features`` (2, D) of two photographs, in float32.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn

FOLDER = Path(__file__).with_name("dinov3")


def tiny() -> nn.Module:
    config = transformers.DINOv3ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
    )
    model = transformers.DINOv3ViTModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    model, processor = tiny(), transformers.DINOv3ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pixels = processor(photographs, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = model(pixels).pooler_output
    record = {"pixels": pixels.contiguous(), "features": features.contiguous()}
    save_file(record, FOLDER / "answer.safetensors")


if __name__ == "__main__":
    main()
