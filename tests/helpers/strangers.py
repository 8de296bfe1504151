"""Files as other people's exporters write them, and what may be wrong with such a file."""

from __future__ import annotations

import copy
import fcntl
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.helpers.checkpoints import edit_config, save_tiny

LABELS = {"0": "cat", "1": "dog", "2": "eel", "3": "fox"}
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")
TORCHSCRIPT_OPSETS = (9, 13, 17)


class Plain(nn.Module):
    """A classifier that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values).logits
        return logits


class WithHiddenStates(nn.Module):
    """A classifier that also gives what optimum and others add."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = self.model(pixel_values, output_hidden_states=True)
        return given.hidden_states[0], given.hidden_states[-1], given.logits


class Strangers:
    """A checkpoint of transformers, and exports of it by PyTorch alone; to look at and to copy.

    Args:
        folder: that all processes of a test run share; whoever comes first fills it, the others wait.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        self.dynamo = folder / "dynamo.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "made").exists():
                self._make()
                (folder / "made").touch()

    def torchscript(self, opset: int) -> Path:
        """By the exporter of before; at opset 13 with more outputs, and a batch of two built in."""
        return self.dynamo.with_name(f"torchscript_{opset}.onnx")

    def _make(self) -> None:
        save_tiny(self.checkpoint)
        edit_config(self.checkpoint, id2label=LABELS, label2id={v: int(k) for k, v in LABELS.items()})
        self._export()

    def _export(self) -> None:
        load = transformers.ViTForImageClassification.from_pretrained
        image = torch.zeros(2, 3, 32, 32)
        torch.onnx.export(
            load(self.checkpoint).eval(),
            (image,),
            self.dynamo,
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        eager = load(self.checkpoint, attn_implementation="eager").eval()
        for opset, module, batch in (
            (9, Plain(eager), "b"),
            (13, WithHiddenStates(eager), None),
            (17, Plain(eager), "b"),
        ):
            names = ["first", "last", "answer"] if opset == 13 else ["logits"]
            export_torchscript(module, self.torchscript(opset), opset, names, batch)

    def optimum(self, folder: Path) -> Path:
        """As optimum-cli lays a folder out."""
        folder.mkdir(parents=True)
        shutil.copy(self.dynamo, folder / "model.onnx")
        for name in _DESCRIPTIONS:
            shutil.copy(self.checkpoint / name, folder / name)
        return folder

    def transformers_js(self, folder: Path) -> Path:
        """As a repository for transformers.js is laid out: several precisions under ``onnx/``."""
        (folder / "onnx").mkdir(parents=True)
        for name in _DESCRIPTIONS:
            shutil.copy(self.checkpoint / name, folder / name)
        source = self.torchscript(17)
        shutil.copy(source, folder / "onnx/model.onnx")
        onnx.save(in_fp16(onnx.load(source)), folder / "onnx/model_fp16.onnx")
        quantise(source, folder / "onnx/model_quantized.onnx")
        return folder


def export_torchscript(
    module: nn.Module,
    path: Path,
    opset: int,
    names: list[str],
    batch: str | None,
    shape: tuple[int, int, int] = (3, 32, 32),
) -> None:
    """Export for (C, H, W) images by PyTorch's exporter of before, which says much that is of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, *shape),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            output_names=names,
            dynamic_axes={name: {0: batch} for name in ("x", *names)} if batch else None,
        )


def in_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in fp16 but input and output, as converters with ``keep_io_types`` do."""
    narrow = copy.deepcopy(model)
    graph = narrow.graph
    (source,), (result,) = graph.input, graph.output
    for tensor in graph.initializer:
        _narrow(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _narrow(attribute.t)
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        node.input[:] = [f"{name}/half" if name == source.name else name for name in node.input]
        node.output[:] = [f"{name}/half" if name == result.name else name for name in node.output]
    before = helper.make_node("Cast", [source.name], [f"{source.name}/half"], to=TensorProto.FLOAT16)
    after = helper.make_node("Cast", [f"{result.name}/half"], [result.name], to=TensorProto.FLOAT)
    nodes = [before, *graph.node, after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return narrow


def _narrow(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = numpy_helper.to_array(tensor).clip(-65504, 65504).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def quantise(source: Path, target: Path) -> None:
    """Dynamically, to int8, as transformers.js' own script does."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def edited(source: Path, target: Path, edit: Callable[[onnx.ModelProto], Any]) -> Path:
    """A copy of a file after ``edit``."""
    model = onnx.load(source)
    edit(model)
    onnx.save(model, target)
    return target


def change_weight(model: onnx.ModelProto, name: str, by: float, elements: int = 1) -> None:
    """Add to the first elements of an initialiser."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[:elements] += by
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
