"""A module as an ONNX graph that a person can read: named nodes, named weights, no leftovers."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from vitdeploy.config import BatchRange
from vitdeploy.errors import ExportError
from vitdeploy.exporter.operators import UnknownFunction
from vitdeploy.exporter.recording import SCOPES, record
from vitdeploy.exporter.request import OLDEST_OPSET
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.reference import public_name

_NEWER_THAN_17 = 18
_MARK = 1_000_003
"""A batch size, never allocated, that is prime and larger than any dimension of a model."""


def trace(
    module: nn.Module, example: torch.Tensor, *, batch: BatchRange, opset: int, names: tuple[str, ...]
) -> ir.Model:
    """Return the graph of ``module(example)``.

    Args:
        module: a deployed model is recorded at one batch size, which is then set free. Any other module is
            traced by PyTorch's exporter, with a symbolic batch; so is a deployed model that calls a function
            which ``exporter.operators`` does not know, at one batch size.
        example: one input with the batch as its first axis; only its shape and dtype matter.
        batch: a fixed batch is a constant, otherwise the first axis is ``N``.
        names: of the input and of every output.

    Raises:
        ExportError: PyTorch cannot trace the module, or ONNX has no form of it at this opset.
    """
    marked = isinstance(module, DeployedModel) and not batch.fixed
    rows = batch.min if batch.fixed else _MARK if marked else 2
    image = torch.zeros((1, *example.shape[1:]), dtype=example.dtype).expand(rows, *example.shape[1:])
    model = _recorded(module, image, max(opset, _NEWER_THAN_17), names)
    if model is None:
        symbolic = (
            None if batch.fixed or marked else ({0: torch.export.Dim("N", min=1, max=max(batch.max, 2))},)
        )
        model = _exported(module, image, symbolic, max(opset, _NEWER_THAN_17), names)
    if opset == OLDEST_OPSET:
        _to_opset_17(model)
    if (used := model.opset_imports.get("")) != opset:
        raise ExportError(
            f"the graph uses operators of opset {used}, not {opset}", hint="choose another --opset"
        )
    if marked:
        free_batch(model, _MARK)
    tidy(model)
    return model


def _recorded(module: nn.Module, image: torch.Tensor, opset: int, names: tuple[str, ...]) -> ir.Model | None:
    """The graph of a deployed model; None where it is to be traced."""
    if not isinstance(module, DeployedModel):
        return None
    try:
        return record(module, image, opset=opset, names=names)
    except UnknownFunction:
        return None


def _exported(
    module: nn.Module,
    image: torch.Tensor,
    symbolic: tuple[dict[int, torch.export.Dim]] | None,
    opset: int,
    names: tuple[str, ...],
) -> ir.Model:
    """The graph as PyTorch's exporter makes it.

    Raises:
        ExportError: it cannot trace the module.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (image,),
                dynamo=True,
                opset_version=opset,
                input_names=[names[0]],
                output_names=list(names[1:]),
                dynamic_shapes=symbolic,
                verbose=False,
                external_data=False,
            )
    except Exception as error:  # the exporter raises whatever the module, the tracer or a pass raises
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(
            f"PyTorch could not trace {type(module).__name__} into ONNX: {reason[0] if reason else error!r}",
            hint="a model must take one (N, C, H, W) tensor, return one tensor and keep N dynamic; "
            "--batch 1 traces a fixed batch",
        ) from error
    if program is None:
        raise ExportError(f"PyTorch returned no graph for {type(module).__name__}")
    return program.model


def free_batch(model: ir.Model, mark: int) -> None:
    """Turn the batch size ``mark``, which stands for nothing else in the graph, into the dimension ``N``.

    Raises:
        ExportError: it is part of a constant that is no shape, so the graph depends on it.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > 16:
            continue
        numbers = tensor.numpy()
        multiples = (numbers % mark == 0) & (numbers != 0)
        if not multiples.any():
            continue
        if (
            multiples.sum() > 1
            or (numbers < 0).any()
            or {user.op_type for user, _ in value.uses()} != {"Reshape"}
        ):
            raise ExportError(f"the graph depends on the batch size: {value.name} is {numbers.tolist()}")
        value.const_value = ir.tensor(np.where(multiples, -1, numbers), name=value.name)
    values = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *values):
        if value.shape is not None:
            value.shape = ir.Shape([_freed(size, mark) for size in value.shape])


def _freed(size: int | ir.SymbolicDim, mark: int) -> int | str | ir.SymbolicDim | None:
    if not isinstance(size, int) or size % mark:
        return size
    return "N" if size == mark else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter about optional libraries and its internals off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _to_opset_17(model: ir.Model) -> None:
    """Undo what opset 18 changed in the operators of a traced model: Split, Pad, and those that reduce."""
    for node in list(model.graph):
        if node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
        elif node.op_type == "Pad" and len(node.inputs) == 4 and node.inputs[3] is not None:
            raise ExportError(
                f"{node.name}: padding of chosen axes needs opset 18", hint="choose --opset 18 or more"
            )
        elif node.op_type in ("ReduceMean", "ReduceL2") and len(node.inputs) == 2:
            axes = node.inputs[1]
            if axes is None or axes.const_value is None:
                raise ExportError(
                    f"{node.name}: computed axes need opset 18", hint="choose --opset 18 or more"
                )
            node.attributes["axes"] = ir.AttrInt64s("axes", axes.const_value.numpy().tolist())
            node.attributes.pop("noop_with_empty_axes", None)
            node.resize_inputs(1)
    model.opset_imports[""] = OLDEST_OPSET


def tidy(model: ir.Model) -> None:
    """Name nodes after module paths and constants after what reads them; drop what nothing reads."""
    graph = model.graph
    taken: Counter[str] = Counter()
    paths: dict[ir.Node, str] = {}
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        paths[node] = _module_path(node, paths)
        name = f"{public_name(paths[node] + '.').rstrip('.') or 'model'}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for i, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{i}"
        node.doc_string = None
        node.metadata_props.clear()
        if (
            node.op_type == "Reshape"
        ):  # no target shape here has a zero, and not every runtime knows the attribute
            node.attributes.pop("allowzero", None)
    _name_constants(graph)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None


def _module_path(node: ir.Node, paths: dict[ir.Node, str]) -> str:
    scopes = node.metadata_props.get(SCOPES)
    if scopes:
        return str(ast.literal_eval(scopes)[-2])
    producers = (value.producer() for value in node.inputs if value is not None)
    return next((paths[producer] for producer in producers if producer in paths), "")


def _name_constants(graph: ir.Graph) -> None:
    constants = dict(graph.initializers)
    graph.initializers.clear()
    merged: dict[tuple[object, ...], ir.Value] = {}
    for name, value in constants.items():
        uses = list(value.uses())
        if not uses:
            continue
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.size <= 16:
            key = (*tensor.shape, *tensor.numpy().ravel().tolist())
            if key in merged:
                for user, index in uses:
                    user.replace_input_with(index, merged[key])
                continue
            merged[key] = value
        short = public_name(name) if "." in name else f"{uses[0].node.name}.{uses[0].idx}"
        value.name = name if short in graph.initializers else short
        if tensor is not None:
            tensor.name = value.name
        value.metadata_props.clear()
        graph.initializers[value.name] = value
