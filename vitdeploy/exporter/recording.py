"""A deployed model's ONNX graph, written down while the model runs once without numbers.

PyTorch's own exporter takes any module: it traces it, decomposes it, translates it and optimises what came
out, seconds for a model of twelve blocks. Deployed models are made of few functions and hold no control flow
that depends on numbers. They run on tensors that have shapes and no values, and every function that they call
becomes its operators in place (``exporter.operators``).

Source: PyTorch's ``__torch_function__`` protocol, https://pytorch.org/docs/stable/notes/extending.html.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitdeploy.exporter.operators import FUNCTIONS, Recorded, UnknownFunction, empty

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter notes the modules that a node comes from, and its own name last."""
_IR_VERSION = 10
_ASKING = frozenset({"__get__", "dim", "size", "numel", "is_floating_point"})
"""What is asked of a tensor and gives none."""


def record(module: nn.Module, image: Tensor, *, opset: int, names: Sequence[str]) -> ir.Model:
    """The graph of ``module(image)``.

    Args:
        image: only its shape and dtype matter.
        names: of the input and of every output.

    Raises:
        UnknownFunction: the module calls what is in no table here.
    """
    recording = _Recording(opset)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: empty(tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        recording.bind(shapes[name], recording.weight(name, tensor))
    image = empty(image.shape, image.dtype)
    given = ir.Value(name=names[0], shape=ir.Shape(image.shape), type=_type(image.dtype))
    recording.bind(image, given)
    with torch.no_grad(), _paths(module, recording), _Listener(recording):
        result = torch.func.functional_call(module, shapes, (image,))
    results = result if isinstance(result, tuple) else (result,)
    graph = ir.Graph(
        [given],
        [recording.value(tensor) for tensor in results],
        nodes=recording.nodes,
        initializers=recording.constants,
        opset_imports={"": opset},
        name="graph",
    )
    model = ir.Model(graph, ir_version=_IR_VERSION)
    _simplify(model)
    for value, name in zip(graph.outputs, names[1:], strict=True):
        value.name = name
    return model


class _Recording(Recorded):
    """The graph as it grows."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.path: list[str] = [""]
        """Of the modules that run, the innermost last."""
        self._values: dict[int, ir.Value] = {}
        self._tensors: list[Tensor] = []
        """Kept, so that no later one has the id of an earlier."""

    def bind(self, tensor: Tensor, value: ir.Value) -> None:
        self._values[id(tensor)] = value
        self._tensors.append(tensor)

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values

    def value(self, tensor: Tensor) -> ir.Value:
        return self._values[id(tensor)]

    def weight(self, name: str, tensor: Tensor) -> ir.Value:
        return self._constant(name, TorchTensor(tensor.detach(), name=name))

    def constant(self, value: Any, dtype: torch.dtype) -> ir.Value:
        name = f"constant_{len(self.constants)}"
        return self._constant(name, ir.tensor(value, dtype=from_torch_dtype(dtype), name=name))

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        kind = ir.TensorType(ir.DataType(tensor.dtype))
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
        self.constants.append(value)
        return value

    def node(
        self, op: str, inputs: Sequence[ir.Value | Tensor], outputs: Sequence[Tensor], **attributes: Any
    ) -> None:
        values = [self.value(x) if isinstance(x, Tensor) else x for x in inputs]
        node = ir.node(op, values, attributes, num_outputs=len(outputs))
        node.metadata_props[SCOPES] = repr([self.path[-1], ""])
        for tensor, value in zip(outputs, node.outputs, strict=True):
            value.shape, value.type = ir.Shape(tensor.shape), _type(tensor.dtype)
            self.bind(tensor, value)
        self.nodes.append(node)


class _Listener(TorchFunctionMode):
    """Hears of every function, and has it written down."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", repr(func))
        if name in _ASKING:
            answer = func(*args, **kwargs)
            if not isinstance(answer, Tensor):
                return answer
        write = FUNCTIONS.get(name)
        if write is None:
            raise UnknownFunction(name)
        if not all(map(self.recording.knows, _tensors([args, kwargs]))):
            raise UnknownFunction(f"{name} of a tensor that is neither computed nor a weight")
        try:
            return write(self.recording, *args, **kwargs)
        except TypeError as error:  # it does not take these arguments
            raise UnknownFunction(f"{name}: {error}") from error


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


@contextlib.contextmanager
def _paths(module: nn.Module, recording: _Recording) -> Iterator[None]:
    """Know which module runs."""
    handles = []

    def enters(path: str) -> Any:
        return lambda *_: recording.path.append(path)

    def leaves(*_: Any) -> None:
        recording.path.pop()

    for path, part in module.named_modules():
        handles += [part.register_forward_pre_hook(enters(path)), part.register_forward_hook(leaves)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _type(dtype: torch.dtype) -> ir.TensorType:
    return ir.TensorType(from_torch_dtype(dtype))


def _simplify(model: ir.Model) -> None:
    """What PyTorch's exporter does to a graph at the end, as far as deployed models need it."""
    for node in list(model.graph):
        before = _before(node)
        if before is None or before.op_type != node.op_type:
            continue
        if node.op_type == "Transpose":
            first, second = (each.attributes["perm"].as_ints() for each in (before, node))
            node.attributes["perm"] = ir.AttrInt64s("perm", [first[place] for place in second])
        elif node.op_type != "Reshape":
            continue
        node.replace_input_with(0, before.inputs[0])
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)


def _before(node: ir.Node) -> ir.Node | None:
    """What computes a node's first input, if nobody else reads it."""
    read = node.inputs[0]
    if read is None or len(read.uses()) > 1 or read.is_graph_output():
        return None
    return read.producer()
