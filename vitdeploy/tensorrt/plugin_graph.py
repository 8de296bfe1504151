"""Regions of an exported graph as single operators that a TensorRT plugin computes.

The operators belong to the domain ``vitdeploy`` and are ONNX local functions: their bodies are the nodes
they stand for, so any runtime that inlines functions computes what it computed before. What TensorRT is
given has no bodies: which of body and plugin its parser prefers depends on its version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from vitdeploy.config import ViTConfig

if TYPE_CHECKING:
    import onnx

Value: TypeAlias = int | float | str | tuple[int, ...]
"""Of an attribute."""

DOMAIN = "vitdeploy"
"""Of the operators, and the namespace of their plugins."""

ATTENTION = "fused_attention"
"""TensorRT's parser looks at an operator's name before its domain: it must not be one of ONNX's own."""

FILE_SUFFIX = ".plugins.onnx"
"""Files with such operators end in it."""

_DOMAIN_VERSION = 1
_PARSER: Mapping[str, Value] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
"""What TensorRT's parser reads from a node to find its plugin, and to take its compiled kernel."""

FLOAT32_SOFTMAX = "float32_softmax"
"""The overload whose softmax is an fp32 island. The kernel computes every softmax in float32."""

_ATTENTION_BODY = """
<domain: "vitdeploy", overload: "{overload}", opset_import: ["" : {opset}]>
fused_attention
  <split, joined, dtype, plugin_namespace: string = "", plugin_version: string = "1", aot: int = 0>
  (qkv) => (mixed)
{{
   split_shape = Constant <value_ints: ints = @split> ()
   heads = Reshape (qkv, split_shape)
   rows = Transpose <perm = [0, 2, 1, 3]> (heads)
   q, k, v = Split <axis = 1{outputs}> (rows)
   columns = Transpose <perm = [0, 1, 3, 2]> (k)
   scores = MatMul (q, columns)
   {softmax}
   pooled = MatMul (weights, v)
   tokens = Transpose <perm = [0, 2, 1, 3]> (pooled)
   joined_shape = Constant <value_ints: ints = @joined> ()
   mixed = Reshape (tokens, joined_shape)
}}
"""
"""The nodes of ``lowered.Attention``."""

_SOFTMAX = {
    "": "weights = Softmax <axis = -1> (scores)",
    FLOAT32_SOFTMAX: """wide = Cast <to = 1> (scores)
   wide_weights = Softmax <axis = -1> (wide)
   weights = Cast <to: int = @dtype> (wide_weights)""",
}


@dataclass(frozen=True)
class PluginSpec:
    """What an operator computes, as far as its kernel must know: ``attention`` of packed q, k and v.

    Attributes:
        op: the operator's name.
        dtype: ``float16``, as numpy names it.
        tokens: T.
        heads: h.
        width: columns of a head, d; (N, T, 3 h d) becomes (N, T, h d).
    """

    op: str
    dtype: str
    tokens: int
    heads: int
    width: int

    @property
    def plugin(self) -> str:
        """The plugin's name as TensorRT registers it."""
        return f"{DOMAIN}::{self.op}"


Refusal: TypeAlias = Callable[[PluginSpec], str | None]
"""Why no kernel computes a spec, or None if one does."""


@dataclass(frozen=True)
class PluginSite:
    """A part of the model that was looked at; ``reason`` says why it is not an operator, None if it is."""

    site: str
    op: str
    reason: str | None = None


@dataclass(frozen=True)
class PluginReport:
    """What was marked, and what was not."""

    sites: tuple[PluginSite, ...]

    @property
    def marked(self) -> tuple[PluginSite, ...]:
        return tuple(site for site in self.sites if site.reason is None)

    def __str__(self) -> str:
        """One line, ``fused_attention: 11 of 12 blocks (blocks.11.attn: ...)``."""
        lines = []
        for op, count in Counter(site.op for site in self.sites).items():
            left = [f"{s.site}: {s.reason}" for s in self.sites if s.op == op and s.reason is not None]
            rest = f" ({'; '.join(left)})" if left else ""
            lines.append(f"{op}: {count - len(left)} of {count} blocks{rest}")
        return ", ".join(lines)


def mark_plugins(
    model: onnx.ModelProto, config: ViTConfig, refusal: Refusal
) -> tuple[onnx.ModelProto, PluginReport]:
    """Replace every region that a plugin computes by one node of the domain ``vitdeploy``.

    Args:
        model: an exported graph of ours, of float16 or bfloat16; it is not changed.
        config: of the model; every block of it has a site in the report.
        refusal: asked for each region whether the kernel takes it
            (:func:`vitdeploy.tensorrt.plugin_kernels.refusal`).

    Returns:
        The graph with its functions, and the report. The graph is the given one if nothing was marked.
    """
    import onnx

    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    regions = _Regions(marked)
    sites, specs = [], set[PluginSpec]()
    for index in range(config.depth):
        site = f"blocks.{index}.attn"
        found = regions.attention(site)
        reason = found if isinstance(found, str) else refusal(found.spec)
        if isinstance(found, _Match) and reason is None:
            if specs - {found.spec}:
                reason = f"another block's operator is different: {next(iter(specs))}"
            else:
                regions.replace(site, found)
                specs.add(found.spec)
        sites.append(PluginSite(site, ATTENTION, reason))
    regions.finish()
    return marked, PluginReport(tuple(sites))


def with_plugins(path: str) -> bool:
    """Whether a file holds such operators."""
    return path.endswith(FILE_SUFFIX)


def strip_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """What TensorRT's parser is given: the same graph, and no function it could take in place of a plugin."""
    import onnx

    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    del stripped.functions[:]
    for node in stripped.graph.node:
        node.ClearField("overload")
    return stripped


def plugin_specs(model: onnx.ModelProto) -> tuple[PluginSpec, ...]:
    """The distinct operators of a marked graph, with or without functions; none of a plain one."""
    specs = (_spec(_attributes(node)) for node in model.graph.node if node.domain == DOMAIN)
    return tuple(dict.fromkeys(specs))


def _spec(attributes: Mapping[str, Value]) -> PluginSpec:
    """The spec of attention by the attributes of its node."""
    import onnx

    split, dtype = attributes["split"], attributes["dtype"]
    assert isinstance(split, tuple)
    assert isinstance(dtype, int)
    name = onnx.TensorProto.DataType.Name(dtype).lower()
    names = {"float": "float32", "double": "float64"}
    return PluginSpec(ATTENTION, names.get(name, name), split[1], split[2] // 3, split[3])


def _attributes(node: onnx.NodeProto) -> dict[str, Value]:
    from onnx import helper

    values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Value:
    """An attribute's value as it can be compared."""
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, Iterable) else value


@dataclass(frozen=True)
class _Match:
    """A region, and the operator that is the same."""

    region: tuple[onnx.NodeProto, ...]
    overload: str
    attributes: Mapping[str, Value]

    @property
    def spec(self) -> PluginSpec:
        return _spec(self.attributes)


class _Regions:
    """A graph whose regions are replaced one after the other."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto, numpy_helper

        self.model, graph = model, model.graph
        self.opset = next(i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
        self.functions = {overload: attention_function(self.opset, overload) for overload in _SOFTMAX}
        self.nodes = list(graph.node)
        self.read = Counter(name for node in graph.node for name in node.input)
        self.read.update(value.name for value in graph.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
        self.shapes = {
            tensor.name: tuple(numpy_helper.to_array(tensor).tolist())
            for tensor in graph.initializer
            if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1
        }
        self.used: set[str] = set()

    def attention(self, site: str) -> _Match | str:
        """The attention of a block, or why it is none that an operator stands for."""
        region = self._region(site)
        if not region:
            return "the graph has no nodes of that name"
        if any(node.name.startswith(f"{site}.key/") for node in self.nodes):
            return "the absorbed last block attends for the tokens that are read, without keys and values"
        inside = Counter(name for node in region for name in node.input)
        if any(inside[name] != self.read[name] for node in region[:-1] for name in node.output):
            return "something else reads what is inside"
        if region[0].input[0] not in self.types:
            return f"the graph does not state the dtype of {region[0].input[0]}"
        for overload, function in self.functions.items():
            attributes = self._match(region, function)
            if attributes is not None:
                return _Match(tuple(region), overload, attributes)
        return "the graph is not as vitdeploy exports it"

    def replace(self, site: str, match: _Match) -> None:
        """Put one node where the region's last one is."""
        from onnx import helper

        name, attributes = f"{site}/{ATTENTION}", {**match.attributes, **_PARSER}
        ends = [match.region[0].input[0]], [match.region[-1].output[0]]
        node = helper.make_node(ATTENTION, *ends, name, domain=DOMAIN, overload=match.overload or None)
        node.attribute.extend(helper.make_attribute(key, attributes[key]) for key in sorted(attributes))
        names = {each.name for each in match.region}
        self.nodes[self.nodes.index(match.region[-1])] = node
        self.nodes = [each for each in self.nodes if each.name not in names]
        self.used.add(match.overload)

    def finish(self) -> None:
        """Write the nodes back, without what nothing reads any more, and with the function they need."""
        from onnx import helper

        if not self.used:
            return
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        known = read | {name for node in self.nodes for name in node.output}
        for values, names in ((graph.initializer, read), (graph.value_info, known)):
            for index in reversed(range(len(values))):
                if values[index].name not in names:
                    del values[index]
        self.model.functions.extend(self.functions[overload] for overload in sorted(self.used))
        self.model.opset_import.append(helper.make_opsetid(DOMAIN, _DOMAIN_VERSION))

    def _region(self, site: str) -> list[onnx.NodeProto]:
        scopes = (f"{site}/", f"{site}.softmax/")
        return [node for node in self.nodes if node.name.startswith(scopes)]

    def _match(
        self, region: Sequence[onnx.NodeProto], function: onnx.FunctionProto
    ) -> dict[str, Value] | None:
        """The attributes with which a function's body is this region; None if it is not."""
        names = {function.input[0]: region[0].input[0]}
        found: dict[str, Value] = {"dtype": self.types[region[0].input[0]]}
        constants = {
            node.output[0]: node.attribute[0].ref_attr_name
            for node in function.node
            if node.op_type == "Constant"
        }
        body = [node for node in function.node if node.op_type != "Constant"]
        same = len(body) == len(region) and all(
            self._same(pattern, node, names, constants, found)
            for pattern, node in zip(body, region, strict=True)
        )
        return found if same else None

    def _same(
        self,
        pattern: onnx.NodeProto,
        node: onnx.NodeProto,
        names: dict[str, str],
        constants: Mapping[str, str],
        found: dict[str, Value],
    ) -> bool:
        """Whether a node is that of the body; then its outputs and shapes are taken down."""
        fixed = {a.name: found[a.ref_attr_name] for a in pattern.attribute if a.ref_attr_name}
        if node.op_type != pattern.op_type or _attributes(node) != _attributes(pattern) | fixed:
            return False
        if len(node.input) != len(pattern.input) or len(node.output) != len(pattern.output):
            return False
        for want, have in zip(pattern.input, node.input, strict=True):
            if want in constants:
                if have not in self.shapes:
                    return False
                found[constants[want]] = self.shapes[have]
            elif names[want] != have:
                return False
        names.update(zip(pattern.output, node.output, strict=True))
        return True


def attention_function(opset: int, overload: str = "") -> onnx.FunctionProto:
    """What :data:`ATTENTION` means: attributes ``split`` [-1, T, 3 h, d], ``joined`` [-1, T, h d], ``dtype``.

    Args:
        overload: none, or :data:`FLOAT32_SOFTMAX`.

    Source: Vaswani et al. 2017, "Attention Is All You Need" (https://arxiv.org/abs/1706.03762).
    """
    from onnx import parser

    outputs = ", num_outputs = 3" if opset >= 18 else ""
    softmax = _SOFTMAX[overload]
    text = _ATTENTION_BODY.format(opset=opset, outputs=outputs, overload=overload, softmax=softmax)
    return parser.parse_function(text)
