"""timm's model with the same weights, exported by timm's own function, on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.common import OPSET, exported, loaded, on_onnxruntime, size_of
from vitdeploy.benchmark.loop import LoadedModel, run_process

if TYPE_CHECKING:
    from torch import Tensor, nn

_NAMES: Mapping[str, str] = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""Of a layer's modules: transformers' and timm's."""


def load(job: dict[str, Any]) -> LoadedModel:
    """Export the checkpoint, unless that is done, and open the file."""

    def write(folder: Path) -> None:
        model = timm_model(job)
        from timm.utils.onnx import onnx_export

        onnx_export(model, str(folder / "model.onnx"), batch_size=2, opset=OPSET, use_dynamo=True)

    folder = exported(job, "timm", ("timm", "torch"), write)
    callers = on_onnxruntime(job, folder / "model.onnx")
    return loaded(job, callers, ("timm", "torch", "onnxruntime"), size_of(folder))


def timm_model(job: Mapping[str, Any]) -> nn.Module:
    """timm's model of the job's checkpoint, ready to export."""
    import json
    from functools import partial

    import torch

    _import_torchvision()
    import timm
    from safetensors.torch import load_file

    folder = Path(job["checkpoint"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = timm.create_model(
        job["model"],
        exportable=True,
        num_classes=len(config["id2label"]),
        norm_layer=partial(torch.nn.LayerNorm, eps=config["layer_norm_eps"]),
    )
    model.load_state_dict(timm_weights(load_file(folder / "model.safetensors"), config["num_hidden_layers"]))
    module: nn.Module = model.eval()
    return module


def timm_weights(saved: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A checkpoint of transformers under timm's names."""
    import torch

    found = {
        "cls_token": saved["vit.embeddings.cls_token"],
        "pos_embed": saved["vit.embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = saved[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = saved[f"vit.layernorm.{kind}"]
        found[f"head.{kind}"] = saved[f"classifier.{kind}"]
        for i in range(depth):
            layer = f"vit.encoder.layer.{i}"
            qkv = [saved[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            for theirs, name in _NAMES.items():
                found[f"blocks.{i}.{name}.{kind}"] = saved[f"{layer}.{theirs}.{kind}"]
    return found


def _import_torchvision() -> None:
    """Import torchvision, which timm needs for its data sets, beside a CPU build of PyTorch too.

    There the wheel's binary does not load, and what refers to its operators fails, unless they are declared.
    None of them is in a ViT.
    """
    import torch

    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


if __name__ == "__main__":
    run_process(load)
