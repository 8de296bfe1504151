"""What the suites share: models, the peers they are compared with, and a record without a host's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def vit_b16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-B/16 of transformers with random weights, saved as its users save theirs."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit-b16")
    labels = {i: f"class {i}" for i in range(1000)}
    ViTForImageClassification(ViTConfig(id2label=labels)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2,'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 0.00392156862745098,'
        ' "do_resize": true, "do_rescale": true, "do_normalize": true}'
    )
    return folder
