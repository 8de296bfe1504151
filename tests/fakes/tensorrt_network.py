"""The double's ONNX parser and the network it fills: one layer for each ONNX node, one for each weight.

The real parser adds layers of its own (shape computations, broadcasts), which are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from tests.fakes.tensorrt_names import Library, Played

DTYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
LAYERS = {
    "MATRIX_MULTIPLY": ("MatMul", "Gemm"),
    "CONVOLUTION": ("Conv",),
    "NORMALIZATION": ("LayerNormalization", "InstanceNormalization", "RMSNormalization"),
    "SOFTMAX": ("Softmax",),
    "CAST": ("Cast",),
    "ACTIVATION": ("Gelu", "Relu", "Tanh", "Sigmoid", "Clip"),
    "ELEMENTWISE": ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"),
    "UNARY": ("Erf", "Sqrt", "Exp", "Neg", "Reciprocal"),
    "REDUCE": ("ReduceMean", "ReduceSum", "ReduceMax", "GlobalAveragePool"),
    "QUANTIZE": ("QuantizeLinear",),
    "DEQUANTIZE": ("DequantizeLinear",),
    "CONCATENATION": ("Concat",),
    "GATHER": ("Gather",),
    "SLICE": ("Slice", "Split", "Pad", "Expand"),
    "SHUFFLE": ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
    "SHAPE": ("Shape",),
    "CONSTANT": ("Constant",),
    "IDENTITY": ("Identity",),
}
KINDS = {operator: kind for kind, operators in LAYERS.items() for operator in operators}
# Their further inputs say how to move values, and are no tensors of the network.
MOVES = ("Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Expand", "ReduceMean", "ReduceSum")


class Dims(Played):
    def __init__(self, library: Library, shape: Any = ()) -> None:
        super().__init__(library)
        self.shape = [int(size) for size in shape]

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, arg0: Any) -> Any:
        return tuple(self.shape[arg0]) if isinstance(arg0, slice) else self.shape[arg0]


class ITensor(Played):
    def __init__(self, library: Library, name: str, dtype: str, sizes: list[int | str]) -> None:
        super().__init__(library)
        self.name = name
        self.dtype = self.member(f"DataType.{dtype}")
        self.sizes = sizes
        """With the names of those that only an input's shape decides."""
        self.is_network_input = self.is_network_output = False

    @property
    def shape(self) -> Dims:
        return Dims(self.library, [size if isinstance(size, int) else -1 for size in self.sizes])


class ILayer(Played):
    def __init__(self, library: Library, kind: str, name: str, node: str | None) -> None:
        super().__init__(library)
        self.type = self.member(f"LayerType.{kind}")
        self.name = name
        self.metadata = "" if node is None else f"[ONNX Layer: {node}]"
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> ITensor | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def get_output(self, index: int) -> ITensor | None:
        return self.outputs[index] if index < len(self.outputs) else None


class INetworkDefinition(Played):
    def __init__(self, library: Library, *, strongly_typed: bool) -> None:
        super().__init__(library)
        self.name = "Unnamed Network 0"
        self.strongly_typed = strongly_typed
        self.model: onnx.ModelProto | None = None
        self.layers: list[ILayer] = []
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]

    def fill(self, model: onnx.ModelProto) -> None:
        """Make the layers of a model."""
        self.model = model
        infos = tensor_infos(model)
        weights = {weight.name: weight for weight in model.graph.initializer}
        tensors: dict[str, ITensor] = {}

        def tensor(name: str, outside: str | None = None) -> ITensor:
            if name not in tensors:
                dtype, sizes = infos.get(name, ("FLOAT", []))
                tensors[name] = ITensor(self.library, outside or name, dtype, sizes)
            return tensors[name]

        for value in model.graph.input:
            self.inputs.append(tensor(value.name))
            self.inputs[-1].is_network_input = True
        for node in model.graph.node:
            names = [name for name in node.input if name][: 1 if node.op_type in MOVES else None]
            for name in names:
                if name in weights and name not in tensors:
                    constant = ILayer(self.library, "CONSTANT", name, None)
                    constant.outputs.append(tensor(name, f"{name}_output"))
                    self.layers.append(constant)
            layer = ILayer(self.library, KINDS[node.op_type], node.name, node.name)
            layer.inputs = [tensor(name) for name in names]
            layer.outputs = [tensor(name) for name in node.output if name]
            self.layers.append(layer)
        for value in model.graph.output:
            self.outputs.append(tensor(value.name))
            self.outputs[-1].is_network_output = True


class ParserError(Played):
    def __init__(self, library: Library, code: str, desc: str, index: int = -1, node: Any = None) -> None:
        super().__init__(library)
        self._facts = (self.member(f"ErrorCode.{code}"), desc, index, node or onnx.NodeProto())

    def code(self) -> Any:
        return self._facts[0]

    def desc(self) -> str:
        return str(self._facts[1])

    def node(self) -> int:
        return int(self._facts[2])

    def node_name(self) -> str:
        return str(self._facts[3].name)

    def node_operator(self) -> str:
        return str(self._facts[3].op_type)

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


class OnnxParser(Played):
    def __init__(self, library: Library, network: INetworkDefinition, logger: Any) -> None:
        super().__init__(library)
        self.network, self.logger = network, logger
        self._errors: list[ParserError] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def parse_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            return self._fail([("INVALID_VALUE", f"Input file cannot be found: {model}", -1, None)])
        return self._parse(lambda: _load(Path(model)))

    def parse(self, model: Any, path: str | None = None) -> bool:
        return self._parse(lambda: onnx.load_from_string(bytes(model)))

    def _parse(self, load: Any) -> bool:
        try:
            model = load()
        except DecodeError as error:
            return self._fail([("MODEL_DESERIALIZE_FAILED", str(error), -1, None)])
        if self.network.layers:
            self.error("Parse was called with a non-empty network definition")
            return False
        foreign = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
        unknown = [
            ("INVALID_NODE", foreign, index, node)
            if node.domain
            else ("UNSUPPORTED_NODE", "false", index, node)
            for index, node in enumerate(model.graph.node)
            if node.domain or node.op_type not in KINDS
        ]
        if unknown:
            return self._fail(unknown)
        self.network.fill(model)
        return True

    def _fail(self, errors: list[tuple[str, str, int, Any]]) -> bool:
        for code, desc, index, node in errors:
            self._errors.append(ParserError(self.library, code, desc, index, node))
            self.error(f"In node {index}: {code}: {desc}")
        return False


def _load(path: Path) -> onnx.ModelProto:
    """The file with the data beside it, which onnx itself refuses to read through a second hard link."""
    model = onnx.load(path, load_external_data=False)
    for constant in model.graph.initializer:
        if constant.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in constant.external_data}
            begin = int(where.get("offset", 0))
            data = (path.parent / where["location"]).read_bytes()
            constant.raw_data = data[begin : begin + int(where["length"])]
            constant.data_location = TensorProto.DEFAULT
    return model


def tensor_infos(model: onnx.ModelProto) -> dict[str, tuple[str, list[int | str]]]:
    """The type and the sizes of every tensor of a graph, with the names of dynamic sizes."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found: dict[str, tuple[str, list[int | str]]] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim]
        found[value.name] = (DTYPES[kind.elem_type], sizes)
    for weight in graph.initializer:
        found[weight.name] = (DTYPES[weight.data_type], list(weight.dims))
    return found
