"""A stranger's ONNX file before anything runs it: where it lies, what goes in and out, what it claims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from vitdeploy.bundle.dtypes import DType
from vitdeploy.bundle.manifest import safe_path
from vitdeploy.bundle.onnx_graph import dtype_name, graphs_of, read_graph, summarise
from vitdeploy.bundle.onnx_metadata import SelfDescription, read_properties
from vitdeploy.config import InputKind, Precision, Scores, Size
from vitdeploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    import onnx

Claim = Precision | Literal["mixed", "quantised"]

_QUANTISED_OPS = re.compile(
    r"QuantizeLinear|DequantizeLinear|MatMulInteger\w*|ConvInteger|QLinear\w+|QGemm|QAttention|QMoE|"
    r"DynamicQuantize\w+|MatMulNBits|MatMulBnb4|GatherBlockQuantized"
)
_WORDS: dict[Claim, re.Pattern[str]] = {
    "quantised": re.compile(
        r"u?int[248]|quant|quanti[sz]ed|q[248](f(p)?(16|32))?|bnb4|dynamic_?q\w*|qdq|w?8a8|fp8|float8\w*"
    ),
    "fp32": re.compile(r"fp32|float32|f32"),
    "fp16": re.compile(r"fp16|float16|f16|half"),
    "bf16": re.compile(r"bf16|bfloat16"),
}
_FLOATING: dict[str, Claim] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp32"}
_LISTED, _SHOWN = 4, 80
"""How many names an error lists, and how much of each."""


@dataclass(frozen=True)
class Value:
    """An input or output as the file declares it; a dimension that varies is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    """None where the file does not say."""

    def __str__(self) -> str:
        shape = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{shown(self.name)} {self.dtype} ({shape})"


@dataclass(frozen=True)
class Interface:
    """What goes into a file's one input, and what comes out."""

    input: str
    dtype: DType
    kind: InputKind
    batch: int | None
    """None varies."""
    channels: int | None
    size: Size | None
    """None varies."""
    outputs: tuple[Value, ...]


def shown(name: str) -> str:
    """A stranger's name for something, as part of a line."""
    return repr(name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}...")[1:-1]


class Described(Protocol):
    """A file, and what is known of it without the checkpoint."""

    path: Path
    name: str
    """As it is shown."""

    @property
    def folder(self) -> Path: ...
    @property
    def said(self) -> SelfDescription: ...
    @property
    def interface(self) -> Interface: ...
    @property
    def claim(self) -> tuple[Claim, str]: ...


class OnnxFile:
    """A file that is opened, but for weights beside it."""

    def __init__(self, path: Path, name: str) -> None:
        """Open a file.

        Raises:
            UsageError: it is no ONNX file.
            BundleError: weights that it keeps in other files are missing, cut off, or outside of its folder.
        """
        self.path, self.name = path, name
        self.model = read_graph(path)
        self.said: SelfDescription = read_properties(summarise(self.model).metadata)
        for graph in graphs_of(self.model):
            for tensor in _tensors(graph):
                _check_external(tensor, path)

    @property
    def folder(self) -> Path:
        return folder_of(self.path)

    def tensors(self) -> Iterator[onnx.TensorProto]:
        """The weights: initialisers and constants."""
        return _tensors(self.model.graph)

    @cached_property
    def interface(self) -> Interface:
        """What goes in and out.

        Raises:
            UsageError: it is no model of images.
        """
        graph = self.model.graph
        weights = {tensor.name for tensor in graph.initializer}
        inputs = [_value(info) for info in graph.input if info.name not in weights]
        return interface_of(self.path, inputs, [_value(info) for info in graph.output])

    def ending(self, output: str) -> Scores:
        """What the file itself makes of its logits at the end."""
        producers = {name: node for node in self.model.graph.node for name in node.output}
        last = producers.get(output)
        while last is not None and last.op_type in ("Cast", "Identity"):
            last = producers.get(last.input[0])
        endings: dict[str, Scores] = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
        return endings.get(last.op_type, "none") if last else "none"

    @cached_property
    def quantised(self) -> Counter[str]:
        """How many operators of each kind compute with integers, or unpack them."""
        types = (node.op_type for node in self.model.graph.node)
        return Counter(name for name in types if _QUANTISED_OPS.fullmatch(name))

    @cached_property
    def has_fp8(self) -> bool:
        """Whether any of its constants is in 8-bit floats."""
        return any(dtype_name(tensor.data_type).startswith("float8") for tensor in self.tensors())

    @cached_property
    def claim(self) -> tuple[Claim, str]:
        """The precision that the file is said to have, and what says so."""
        if (stated := self.said.precision) is not None:
            return "quantised" if stated == "int8" or stated == "fp8" else stated, "its metadata"
        if (said := claim_of_name(self.path)) is not None:
            return said, "its name"
        if self.quantised:
            return "quantised", "its operators"
        return self._most_weights(), "most of its weights"

    def _most_weights(self) -> Claim:
        sizes = Counter[str]()
        for tensor in self.tensors():
            elements = 1
            for dimension in tensor.dims:
                elements *= dimension
            sizes[dtype_name(tensor.data_type)] += elements
        floating = Counter({name: n for name, n in sizes.items() if name in _FLOATING})
        return _FLOATING[floating.most_common(1)[0][0]] if floating else "fp32"


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    import onnx

    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def folder_of(path: Path) -> Path:
    """Where what describes a file lies: its folder, or the one above ``onnx/``."""
    parent = path.absolute().parent
    return parent.parent if parent.name == "onnx" else parent


def claim_of_name(path: Path) -> Claim | None:
    """The precision that a file's name says."""
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    found = (claim for claim, pattern in _WORDS.items() if any(pattern.fullmatch(word) for word in words))
    return next(found, None)


def interface_of(path: Path, inputs: Sequence[Value], outputs: Sequence[Value]) -> Interface:
    """What a file with these inputs and outputs takes and gives.

    Raises:
        UsageError: it is no model of images.
    """
    names = ", ".join(shown(value.name) for value in inputs[:_LISTED])
    if len(inputs) != 1:
        raise UsageError(
            f"{path}: has {len(inputs)} inputs ({names}), and a model of images has one"
            if inputs
            else f"{path}: has no input",
            hint="verify takes the image model alone",
        )
    (value,) = inputs
    if value.dtype not in ("float32", "float16", "float64", "uint8"):
        raise UsageError(f"{path}: its input {value} is no image", hint="images are floats or uint8")
    if value.shape is None or len(value.shape) != 4:
        raise UsageError(f"{path}: its input {value} is no (N, C, H, W) tensor")
    if 0 in value.shape:
        raise UsageError(f"{path}: a dimension of its input {value} is 0: nothing goes in")
    batch, first, _, last = value.shape
    is_last = value.dtype == "uint8"
    channels, other = (last, first) if is_last else (first, last)
    if other in (1, 3) and channels not in (1, 3):
        wanted = "(N, H, W, C), in uint8, or (N, C, H, W), in floats"
        raise UsageError(f"{path}: its input {value} is not {wanted}")
    height, width = value.shape[1:3] if is_last else value.shape[2:]
    size = None if height is None or width is None else (height, width)
    kind: InputKind = "uint8" if is_last else "float"
    dtype: DType = value.dtype  # type: ignore[assignment]  # one of the four above
    return Interface(value.name, dtype, kind, batch, channels, size, tuple(outputs))


def find_files(path: Path) -> list[tuple[Path, str]]:
    """The ONNX files that a path means, and how each is shown: one, or those of a folder and its ``onnx/``.

    Raises:
        UsageError: there are none.
    """
    if path.is_dir():
        found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")], key=lambda p: (len(p.parts), p))
        if not found:
            raise UsageError(
                f"{path}: neither a bundle nor a folder with .onnx files", hint="give the .onnx file itself"
            )
        return [(file, file.relative_to(path).as_posix()) for file in found]
    if not path.exists():
        raise UsageError(f"{path}: does not exist")
    return [(path, path.name)]


def _value(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    shape = (
        tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        if tensor.HasField("shape")
        else None
    )
    return Value(info.name, dtype_name(tensor.elem_type), shape)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Hold a tensor's bytes in another file against that file, before a runtime looks for them.

    Raises:
        BundleError: there is no such file beside the model, or it is too short.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    try:
        location = safe_path(where.get("location", ""))
        offset, length = int(where.get("offset", "0")), int(where.get("length", "0"))
    except ValueError as error:
        problem = f"its weight {tensor.name!r} lies where nothing may lie: {error}"
        raise BundleError(f"{path}: {problem}") from error
    data = path.parent / location
    if not data.resolve().is_relative_to(_root(path)):
        raise BundleError(f"{path}: its weights in {location} are a link that leads out of its folder")
    if not data.is_file():
        raise BundleError(
            f"{path}: its weights in {location} are missing", hint="copy that file beside the model"
        )
    if offset < 0 or length < 0 or offset + length > data.stat().st_size:
        raise BundleError(
            f"{data}: too short for the weight {tensor.name!r}: it is cut off", hint="copy it again"
        )


def _root(path: Path) -> Path:
    """The folder that links may lead to: the file's own, or the hub's cache that it is part of."""
    parent = path.absolute().parent
    for folder in parent.parents:
        if folder.name == "snapshots":
            return folder.parent.resolve()
    return parent.resolve()
