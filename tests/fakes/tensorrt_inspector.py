"""What the double's engines say of their kernels, in the JSON of each major version.

TensorRT 10 has ``Bindings`` (names) and ``Format/Datatype`` (a short type; with an execution context the
whole format); TensorRT 11 has ``I/O Tensors`` (objects), and ``Format`` and ``Datatype`` apart:
https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x-IEngineInspector.html.
Kernels that the compiler makes are ``kgen`` and ``gemm``, fused attention is ``_gemm_mha_v2``, and the ONNX
nodes of a kernel are joined by the unit separator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.fakes.tensorrt_names import Library, Played
from tests.fakes.tensorrt_network import ILayer, ITensor

SEPARATOR = "\x1f"
SHORT = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32"}
LONG = {"FLOAT": "FP32", "HALF": "FP16"}


@dataclass(frozen=True)
class Kernel:
    """Layers that run as one."""

    name: str
    layers: tuple[ILayer, ...]

    @property
    def kind(self) -> str:
        single = self.layers[0].type.name == "MATRIX_MULTIPLY" and len(self.layers) == 1
        return "gemm" if single else "kgen"

    @property
    def metadata(self) -> str:
        return SEPARATOR.join(layer.metadata for layer in self.layers)

    def inputs(self) -> list[ITensor]:
        made = {tensor.name for layer in self.layers for tensor in layer.outputs}
        return [tensor for layer in self.layers for tensor in layer.inputs if tensor.name not in made]

    def outputs(self) -> list[ITensor]:
        return self.layers[-1].outputs


class EngineInspector(Played):
    def __init__(self, library: Library, engine: Any) -> None:
        super().__init__(library)
        self.engine = engine
        self.execution_context: Any = None
        self.kernels = list(fuse(engine.network.layers))
        self.apart = library.rtx or library.version[0] >= 11

    def get_engine_information(self, format: Any) -> str:
        layers = [self._layer(kernel) for kernel in self.kernels if self._verbosity != "NONE"]
        if format.name == "ONELINE":
            return "\n".join(str(layer) for layer in layers)
        if not self.apart:
            return json.dumps({"Layers": layers, "Bindings": list(self.engine.tensors)})
        tensors = [self._io_tensor(tensor) for tensor in self.engine.tensors.values()]
        return json.dumps({"Layers": layers, "I/O Tensors": tensors})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        return json.dumps(self._layer(self.kernels[layer_index]))

    @property
    def _verbosity(self) -> str:
        return str(self.engine.plan.verbosity)

    def _layer(self, kernel: Kernel) -> Any:
        if self._verbosity != "DETAILED":
            return kernel.name
        return {
            "Name": kernel.name,
            "LayerType": kernel.kind,
            "Inputs": [self._tensor(tensor) for tensor in kernel.inputs()],
            "Outputs": [self._tensor(tensor) for tensor in kernel.outputs()],
            "TacticName": kernel.name,
            "StreamId": 0,
            "Metadata": kernel.metadata,
        }

    def _tensor(self, tensor: ITensor) -> dict[str, Any]:
        fields: dict[str, Any] = {"Name": tensor.name, "Location": "Device", "Dimensions": list(tensor.shape)}
        short = short_type(tensor)
        if self.apart:
            return fields | {"Format": long_format(tensor), "Datatype": short}
        return fields | {"Format/Datatype": long_format(tensor) if self.execution_context else short}

    def _io_tensor(self, tensor: ITensor) -> dict[str, Any]:
        shapes = [
            self.engine.profile_shapes(tensor.name, index)
            for index in range(self.engine.num_optimization_profiles)
        ]
        names = ("MinShape", "OptShape", "MaxShape")
        profiles = [
            dict(zip(names, three, strict=False)) | {"Format": long_format(tensor)} for three in shapes
        ]
        return {
            "Name": tensor.name,
            "IOMode": "Input" if tensor.is_network_input else "Output",
            "DataType": short_type(tensor),
            "Dimensions": list(tensor.shape),
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": profiles,
        }


def short_type(tensor: ITensor) -> str:
    name = tensor.dtype.name
    return SHORT.get(name, name)


def long_format(tensor: ITensor) -> str:
    name = tensor.dtype.name
    return f"Row major linear {LONG.get(name, name)} format (kLINEAR)"


def fuse(layers: list[ILayer]) -> Iterator[Kernel]:
    """Half-precision attention into one kernel, and an activation into the addition before it."""
    computing = [layer for layer in layers if layer.type.name != "CONSTANT"]
    readers: dict[str, list[ILayer]] = {}
    for layer in computing:
        for tensor in layer.inputs:
            readers.setdefault(tensor.name, []).append(layer)

    def only_reader(layer: ILayer, kind: str) -> ILayer | None:
        found = readers.get(layer.outputs[0].name, [])
        return found[0] if len(found) == 1 and found[0].type.name == kind else None

    taken: set[int] = set()
    for index, layer in enumerate(computing):
        if id(layer) in taken:
            continue
        group = _group(layer, only_reader)
        taken |= {id(member) for member in group}
        kind = layer.type.name.title().replace("_", "")
        name = f"_gemm_mha_v2_myl0_{index}" if len(group) == 3 else f"__myl_{kind}_myl0_{index}"
        yield Kernel(name, group)


def _group(layer: ILayer, only_reader: Callable[[ILayer, str], ILayer | None]) -> tuple[ILayer, ...]:
    if layer.type.name == "MATRIX_MULTIPLY" and layer.inputs[0].dtype.name in ("HALF", "BF16"):
        softmax = only_reader(layer, "SOFTMAX")
        second = softmax and only_reader(softmax, "MATRIX_MULTIPLY")
        if softmax and second:
            return layer, softmax, second
    if layer.type.name == "ELEMENTWISE" and (activation := only_reader(layer, "ACTIVATION")):
        return layer, activation
    return (layer,)
