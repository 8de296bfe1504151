"""The fusion report: what can be fused in a network, what is fused in an engine, and why not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from tests.fakes.machines import FULL, RTX
from tests.fakes.tensorrt import make_tensorrt
from tests.fakes.tensorrt_builds import Built, attention
from vitdeploy.tensorrt.fusion import FusionReport, FusionSite, fused, fusible
from vitdeploy.tensorrt.proof import Layer, network_layers

SHAPES = [(1, 3, 4), (2, 3, 4), (8, 3, 4)]


def chain(
    *kinds: str, dtype: str = "float16", columns: int = 64, block: int = 0, **special: str
) -> list[Layer]:
    """Layers one after the other, named by their kind and place; ``SOFTMAX="float32"`` for one of its own."""
    names = [f"blocks.{block}.attn/{kind.title()}_{index}" for index, kind in enumerate(kinds)]
    return [
        Layer(
            name=name,
            kind=kind,
            inputs=(special.get(kind, dtype),),  # type: ignore[arg-type]
            outputs=(dtype,),  # type: ignore[arg-type]
            nodes=(name,),
            reads=(f"{block}.{index}",),
            writes=(f"{block}.{index + 1}",),
            columns=columns,
        )
        for index, (kind, name) in enumerate(zip(kinds, names, strict=True))
    ]


PRODUCT, SOFTMAX, SCALE = "MATRIX_MULTIPLY", "SOFTMAX", "ELEMENTWISE"
ATTENTION = (PRODUCT, SOFTMAX, PRODUCT)


@pytest.mark.slow
@pytest.mark.parametrize("version", [*FULL, RTX])
@pytest.mark.parametrize(
    "dtype, first",
    [
        (TensorProto.FLOAT16, "1/1 attention can be fused"),
        (TensorProto.BFLOAT16, "1/1 attention can be fused"),
        (TensorProto.FLOAT, "0/1 attention can be fused"),
    ],
)
def test_a_parsed_network(version: str, dtype: int, first: str) -> None:
    network = Built(make_tensorrt(version), attention(dtype), "x", SHAPES).network
    report = fusible(network_layers(network))
    assert report.source == "network"
    assert report.lines()[:3] == (first, "1/1 LayerNorm can be fused", "1/1 GELU can be fused")
    (place,) = (place for place in report.places if place.pattern == "attention")
    assert place.site == "attn"
    assert place.nodes == ("attn/MatMul", "attn/Softmax", "attn/MatMul_2")


@pytest.mark.parametrize(
    "layers, reason",
    [
        (chain(*ATTENTION), ""),
        (chain(PRODUCT, SCALE, "CAST", SOFTMAX, "SHUFFLE", PRODUCT), ""),
        (chain(*ATTENTION, dtype="bfloat16"), ""),
        (
            chain(*ATTENTION, dtype="float32"),
            "computed in float32, and the fused kernels are for half precision",
        ),
        (chain(*ATTENTION, SOFTMAX="float32"), "computed in float32"),
        (chain(*ATTENTION, columns=256), ""),
        (chain(*ATTENTION, columns=257), "a product over 257 columns; the fused kernels take 256 a head"),
        (chain(SOFTMAX, PRODUCT), "its softmax does not stand between two products"),
        (chain(PRODUCT, SOFTMAX), "its softmax does not stand between two products"),
        (chain(PRODUCT, "REDUCE", SOFTMAX, PRODUCT), "its softmax does not stand between two products"),
        (chain(PRODUCT, SOFTMAX, "TOPK", PRODUCT), "its softmax does not stand between two products"),
        (chain(SOFTMAX), "its softmax does not stand between two products"),
    ],
)
def test_what_can_be_fused(layers: list[Layer], reason: str) -> None:
    (place,) = (place for place in fusible(layers).places if place.pattern == "attention")
    assert place.fused == (not reason)
    assert place.reason.startswith(reason)


def kernel(*nodes: str) -> Layer:
    return Layer("kernel", "kgen", ("float16",), ("float16",), nodes)


PLACES = (
    FusionSite(site="attn", pattern="attention", nodes=("qk", "soft", "pv"), fused=True),
    FusionSite(site="norm", pattern="LayerNorm", nodes=("norm",), fused=True),
    FusionSite(site="mlp", pattern="GELU", nodes=("gelu",), fused=True),
)


@pytest.mark.parametrize(
    "kernels, results",
    [
        ([kernel("qk", "soft", "pv"), kernel("norm"), kernel("fc1", "gelu")], ["", "", ""]),
        ([kernel("norm", "qkv", "qk", "soft", "pv"), kernel("fc1", "gelu")], ["", "", ""]),
        (
            [kernel("qk", "soft"), kernel("pv"), kernel("norm"), kernel("gelu")],
            ["2 kernels", "", "a kernel of"],
        ),
        ([kernel("qk"), kernel("soft"), kernel("pv")], ["3 kernels", "no kernel of", "no kernel of"]),
        ([], ["no kernel of"] * 3),
    ],
)
def test_what_an_engine_fuses(kernels: list[Layer], results: list[str]) -> None:
    report = fused(kernels, FusionReport(source="network", places=PLACES))
    assert report.source == "engine"
    for place, reason in zip(report.places, results, strict=True):
        assert place.fused == (not reason)
        assert place.reason.startswith(reason)


def test_the_reason_of_the_network_is_kept() -> None:
    network = fusible(chain(*ATTENTION, dtype="float32"))
    (place,) = fused([], network).places
    assert "half precision" in place.reason


@pytest.mark.slow
@given(st.integers(1, 24), st.sets(st.integers(0, 23)))
def test_lines_count_every_place_once(blocks: int, wide: set[int]) -> None:
    layers = [
        layer
        for block in range(blocks)
        for layer in chain(*ATTENTION, block=block, dtype="float32" if block in wide else "float16")
    ]
    lines = fusible(layers).lines()
    unfused = len(wide & set(range(blocks)))
    assert lines[0] == f"{blocks - unfused}/{blocks} attention can be fused"
    assert len(lines) == (2 if unfused else 1)
    if unfused > 3:
        assert lines[1].endswith(f"and {unfused - 3} more)")


def test_nothing_to_fuse() -> None:
    assert fusible([]).lines() == ()
    assert fusible(chain(PRODUCT, SCALE)).lines() == ()


@pytest.mark.parametrize("node, found", [("mlp/Gelu", 1), ("mlp/Erf", 1), ("mlp/Gelu_3", 1), ("mlp/Relu", 0)])
def test_which_nodes_are_gelus(node: str, found: int) -> None:
    layers: list[Any] = [Layer("a", "ACTIVATION", ("float16",), ("float16",), (node,))]
    assert len(fusible(layers).places) == found
