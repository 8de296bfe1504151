from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from tests.helpers.exact import Exact
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import BatchRange
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.images.preprocess import apply
from vitdeploy.model.reference import forward_float64, outputs_float64
from vitdeploy.model.registry import build_reference

# Two float64 implementations add up in different orders; that is all they may differ by.
EXACT = 1e-10
# What transformers calls it.
ANSWERS = {
    "logits": "logits",
    "codes": "logits",
    "features": "pooler_output",
    "tokens": "last_hidden_state",
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Give every parameter of a transformers model a random value, and save it; return the folder."""

    def save(model: Any, spread: float = 0.2) -> Path:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(spread * torch.randn(parameter.shape))
        model.eval().save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


@pytest.fixture
def agree() -> Callable[..., Checkpoint]:
    """Assert that a transformers model and what we read of its folder compute the same, in float64."""

    def agree(
        model: Any, folder: Path, size: tuple[int, int] | None = None, output: str = "logits", **keywords: Any
    ) -> Checkpoint:
        opened = open_model(str(folder), image_size=size)
        assert isinstance(opened, Checkpoint)
        pixels = torch.randn(2, opened.config.channels, *opened.config.image_size, dtype=torch.float64)
        # SDPA: transformers' eager attention computes its softmax in float32 whatever the model's dtype.
        model = model.double().eval()
        if model._supports_sdpa:
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            theirs = getattr(model(pixels, **keywords), ANSWERS[output])
        ours = forward_float64(build_reference(opened.config, opened.state), pixels, output)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= EXACT
        # Nothing is proven by outputs that do not depend on the image.
        assert (theirs[0] - theirs[1]).abs().max() > 1e-2
        return opened

    return agree


@pytest.fixture
def agree_in_all() -> Callable[..., Checkpoint]:
    """Assert that what we read of a folder returns, output for output, what the original does, in float64."""

    def agree(
        theirs: Callable[[Tensor], Mapping[str, Tensor]],
        folder: Path,
        size: tuple[int, int] | None = None,
        **keywords: Any,
    ) -> Checkpoint:
        """``theirs`` computes outputs for pixels, in a model that is already of float64."""
        opened = open_model(str(folder), image_size=size, **keywords)
        assert isinstance(opened, Checkpoint)
        config = opened.config
        pixels = torch.randn(2, config.channels, *config.image_size, dtype=torch.float64)
        with torch.inference_mode(), Exact():
            expected = theirs(pixels)
        found = outputs_float64(build_reference(config, opened.state), pixels, tuple(expected))
        for name, answer in expected.items():
            assert found[name].shape == answer.shape == (2, *(config.output_shape(name) or ())), name
            assert (found[name] - answer).abs().max() <= EXACT, name
            # Nothing is proven by outputs that do not depend on the image.
            assert (answer[0] - answer[1]).abs().max() > 1e-2, name
        return opened

    return agree


@pytest.fixture
def seen_alike() -> Callable[..., None]:
    """Assert that photographs become the same features or logits as through a processor and its model."""

    def seen_alike(model: Any, processor: Any, folder: Path, output: str, **keywords: Any) -> None:
        processor.save_pretrained(folder)
        opened = open_model(str(folder))
        assert isinstance(opened, Checkpoint)
        photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        ours_seen = np.stack([apply(photograph, opened.preprocess) for photograph in photographs])
        ours = forward_float64(
            build_reference(opened.config, opened.state), torch.from_numpy(ours_seen), output
        )
        seen = processor(photographs, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            answer = model.float().eval()(seen, **keywords)
        pooled = hasattr(answer, ANSWERS[output])
        theirs = getattr(answer, ANSWERS[output]) if pooled else answer.last_hidden_state[:, 0]
        if output == "logits":
            ours, theirs = ours.softmax(-1), theirs.softmax(-1)
            assert ours.topk(5).indices.tolist() == theirs.topk(5).indices.tolist()
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-3)
        assert (theirs[0] - theirs[1]).abs().max() > 1e-2

    return seen_alike


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[Path, Tensor], Tensor]:
    """Export a checkpoint in fp32 and fp16, by the usual gate; return what the fp32 ONNX gives."""

    def exported(folder: Path, pixels: Tensor) -> Tensor:
        request = ExportRequest(
            model=folder, formats=("onnx",), precisions=("fp32", "fp16"), batch=BatchRange(1, 2, 2)
        )
        bundle = run_export(request, tmp_path / "out.bundle")
        assert all(record.passed for record in bundle.manifest.parity)
        with get_backend("onnxruntime").load(bundle, bundle.artifact("fp32"), Options()) as session:
            (answer,) = session.run({"pixel_values": pixels.float().numpy()}).values()
        return torch.from_numpy(answer)

    return exported
