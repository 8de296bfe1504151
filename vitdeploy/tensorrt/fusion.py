"""The fusion report of an engine: which attentions, LayerNorms and GELUs run as one kernel, and which not.

From a network that was only parsed it says what can be fused, by the conditions NVIDIA documents ("Fused
Attention" in TensorRT's documentation); from the layers of a built engine it says what was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vitdeploy.tensorrt.proof import MOVING, Layer, operator_of

Pattern = Literal["attention", "LayerNorm", "GELU"]
_HALF = ("float16", "bfloat16", "float8e4m3fn", "int8")
_WIDEST_HEAD = 256
_BETWEEN = MOVING | {"ELEMENTWISE", "CAST", "SCALE", "QUANTIZE", "DEQUANTIZE"}
"""Kinds that may stand between an attention's products and its softmax: scale, mask, layout."""
_GELU_OPERATORS = ("Gelu", "Erf")


class FusionSite(BaseModel):
    """One place in the model where a fused kernel is to be expected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    """``blocks.3.attn``."""
    pattern: Pattern
    nodes: tuple[str, ...]
    """ONNX nodes that one kernel must compute."""
    fused: bool
    reason: str = ""
    """Why not."""


class FusionReport(BaseModel):
    """All places, and where the answer comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["network", "engine"]
    """``network``: what TensorRT can fuse; ``engine``: what the built engine does."""
    places: tuple[FusionSite, ...]

    def lines(self) -> tuple[str, ...]:
        """For people: ``11/12 attention can be fused``, then what cannot and why."""
        verb = "fused" if self.source == "engine" else "can be fused"
        lines = []
        for pattern in ("attention", "LayerNorm", "GELU"):
            sites = [place for place in self.places if place.pattern == pattern]
            if sites:
                lines.append(f"{sum(place.fused for place in sites)}/{len(sites)} {pattern} {verb}")
        reasons: dict[str, list[str]] = {}
        for place in self.places:
            if not place.fused:
                reasons.setdefault(f"{place.pattern}: {place.reason}", []).append(place.site)
        lines += [f"not fused, {reason} ({_listed(sites)})" for reason, sites in reasons.items()]
        return tuple(lines)


def fusible(layers: Sequence[Layer]) -> FusionReport:
    """What TensorRT can fuse in a network."""
    return FusionReport(source="network", places=(*_attentions(layers), *_norms(layers), *_gelus(layers)))


def fused(engine: Sequence[Layer], network: FusionReport) -> FusionReport:
    """What a built engine fuses of its network's places; each of its layers names its ONNX nodes."""
    kernels = [frozenset(layer.nodes) for layer in engine]
    places = []
    for place in network.places:
        nodes_of_place = frozenset(place.nodes)
        parts = [nodes for nodes in kernels if nodes & nodes_of_place]
        # A LayerNorm is fused as soon as it is one kernel; a GELU when it rides on another operation's.
        company = place.pattern == "GELU"
        ok = any(nodes_of_place <= nodes and (not company or nodes > nodes_of_place) for nodes in parts)
        updated = place.model_copy(update={"fused": ok, "reason": "" if ok else _why(place, len(parts))})
        places.append(updated)
    return FusionReport(source="engine", places=tuple(places))


def _attentions(layers: Sequence[Layer]) -> Iterator[FusionSite]:
    producers = {tensor: layer for layer in layers for tensor in layer.writes}
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for tensor in layer.reads:
            readers.setdefault(tensor, []).append(layer)
    for layer in layers:
        if layer.kind == "ATTENTION_INPUT":
            yield FusionSite(site=_site(layer), pattern="attention", nodes=_nodes(layer), fused=True)
        if layer.kind != "SOFTMAX":
            continue
        scores, mixed = _before(layer, producers), _after(layer, readers)
        parts = [part for part in (scores, layer, mixed) if part is not None]
        reason = _objection(scores, layer, mixed)
        nodes = tuple(node for part in parts for node in _nodes(part))
        site = _site(scores or layer)
        yield FusionSite(site=site, pattern="attention", nodes=nodes, fused=not reason, reason=reason)


def _before(layer: Layer, producers: dict[str, Layer]) -> Layer | None:
    """The product whose result reaches a softmax."""
    while layer.reads and (producer := producers.get(layer.reads[0])):
        if producer.kind == "MATRIX_MULTIPLY":
            return producer
        if producer.kind not in _BETWEEN:
            return None
        layer = producer
    return None


def _after(layer: Layer, readers: dict[str, list[Layer]]) -> Layer | None:
    """The product that reads a softmax."""
    while layer.writes and (followers := readers.get(layer.writes[0])):
        if followers[0].kind == "MATRIX_MULTIPLY":
            return followers[0]
        if followers[0].kind not in _BETWEEN:
            return None
        layer = followers[0]
    return None


def _objection(scores: Layer | None, softmax: Layer, mixed: Layer | None) -> str:
    if scores is None or mixed is None:
        return "its softmax does not stand between two products"
    for part in (scores, softmax, mixed):
        if part.inputs[0] not in _HALF:
            return f"computed in {part.inputs[0]}, and the fused kernels are for half precision"
    if scores.columns is not None and scores.columns > _WIDEST_HEAD:
        return f"a product over {scores.columns} columns; the fused kernels take {_WIDEST_HEAD} a head"
    return ""


def _norms(layers: Sequence[Layer]) -> Iterator[FusionSite]:
    for layer in layers:
        if layer.kind == "NORMALIZATION":
            yield FusionSite(site=_site(layer), pattern="LayerNorm", nodes=_nodes(layer), fused=True)


def _gelus(layers: Sequence[Layer]) -> Iterator[FusionSite]:
    for layer in layers:
        if any(operator_of(node) in _GELU_OPERATORS for node in layer.nodes):
            yield FusionSite(site=_site(layer), pattern="GELU", nodes=_nodes(layer), fused=True)


def _why(place: FusionSite, kernels: int) -> str:
    if place.reason:
        return place.reason
    if not kernels:
        return "no kernel of the engine names it"
    return "a kernel of its own" if kernels == 1 else f"{kernels} kernels"


def _nodes(layer: Layer) -> tuple[str, ...]:
    return layer.nodes or (layer.name,)


def _site(layer: Layer) -> str:
    """``blocks.3.attn/MatMul`` stands at ``blocks.3.attn``."""
    return _nodes(layer)[0].rsplit("/", 1)[0]


def _listed(sites: Sequence[str]) -> str:
    return ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
