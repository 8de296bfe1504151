"""Recorded graphs against those of PyTorch's own exporter: node for node, weight for weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.helper import get_attribute_value
from torch import Tensor, nn

from tests.helpers.models import CONFIGS, random_state
from tests.helpers.qwens import CONFIGS as QWENS
from tests.helpers.swins import SWINS
from tests.helpers.traces import RANGE
from vitdeploy.bundle.onnx_graph import site_of
from vitdeploy.config import BatchRange, InputKind, ModelConfig, Output, Preprocess
from vitdeploy.errors import ExportError
from vitdeploy.exporter import graph
from vitdeploy.exporter.operators import UnknownFunction
from vitdeploy.exporter.recording import record
from vitdeploy.exporter.request import NEWEST_OPSET, OLDEST_OPSET
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import DTYPES, PrecisionPlan, sites
from vitdeploy.model.registry import architecture_of, build_reference

FAMILIES: dict[str, ModelConfig] = {
    **CONFIGS,
    **{f"swin {name}": config for name, config in SWINS.items()},
    **{f"qwen {name}": config for name, config in QWENS.items()},
}
PRECISIONS = ("fp16", "mixed", "bf16", "fp32")
ISLANDS = ("0.attn.softmax", "1.mlp.fc1", "1.mlp.gate", "0.add1", "1.add2", "1.attn.proj", "tokens", "head")
OPSETS = (20, OLDEST_OPSET, NEWEST_OPSET, 18)


def plan_of(precision: str, deploy: Any) -> PrecisionPlan:
    """A plan; ``mixed`` has islands of every kind."""
    if precision != "mixed":
        return PrecisionPlan(DTYPES[precision])  # type: ignore[index]
    half = PrecisionPlan.of("fp16")
    names = [name for name, site in sites(deploy(half)) if not site.always_fp32]
    return half.with_islands(frozenset(name for name in names if name.endswith(ISLANDS)))


def deployed(
    config: ModelConfig,
    precision: str,
    outputs: tuple[Output, ...] = (),
    input_kind: InputKind = "float",
) -> tuple[DeployedModel, Tensor]:
    """A small model with random weights, and an image as it reads it."""
    architecture = architecture_of(config)
    reference = build_reference(config, random_state(config))

    def deploy(plan: PrecisionPlan) -> DeployedModel:
        return architecture.deploy(
            reference,
            plan,
            outputs=outputs or config.usual_outputs,
            input_kind=input_kind,
            preprocess=Preprocess(size=config.image_size),
        )

    dtype = torch.uint8 if input_kind == "uint8" else torch.float32
    return deploy(plan_of(precision, deploy)), torch.zeros(1, *config.inputs[input_kind], dtype=dtype)


def described(model: ir.Model) -> dict[str, Any]:
    """What a graph is, its values by where they come from.

    Nodes come in an order that only depends on what reads what. PyTorch's exporter writes attributes out that
    say what an operator does anyway; it names what it has rewritten, and small constants that it folded,
    after the operator before or behind; it leaves a Reshape that does nothing, behind a broadcast; and of a
    fixed batch some Reshapes say -1.
    """
    opset = model.opset_imports[""]
    for node in list(model.graph):
        if node.op_type == "Reshape" and (read := node.inputs[0]) and read.shape == node.outputs[0].shape:
            node.outputs[0].replace_all_uses_with(read)
            model.graph.remove(node, safe=True)
    nodes: list[ir.Node] = []
    places: dict[ir.Value, int] = {}

    def visit(value: ir.Value | None) -> None:
        producer = value.producer() if value is not None else None
        if producer is None or producer.outputs[0] in places:
            return
        for read in producer.inputs:
            visit(read)
        places.update(dict.fromkeys(producer.outputs, len(nodes)))
        nodes.append(producer)

    def shown(value: ir.Value | None) -> Any:
        return value and (value.dtype, None if value.shape is None else [str(size) for size in value.shape])

    def source(value: ir.Value | None) -> Any:
        if value is None:
            return None
        if (producer := value.producer()) is not None:
            return places[value], producer.outputs.index(value)
        if value.const_value is None:
            return value.name
        own = value.name if value.dtype != ir.DataType.INT64 else None
        return own, shown(value), value.const_value.tobytes()

    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value

    def attributes(node: ir.Node) -> dict[str, Any]:
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        usual = {
            name: plain(get_attribute_value(it.default_value))
            for name, it in known.items()
            if it.default_value.name
        }
        return usual | {name: it.value for name, it in node.attributes.items()}

    def reads(node: ir.Node) -> list[Any]:
        if node.op_type != "Reshape":
            return [source(value) for value in node.inputs]
        target, shape = node.inputs[1], node.outputs[0].shape
        assert target is not None
        assert target.const_value is not None
        sizes = target.const_value.numpy().tolist()
        assert sizes.count(-1) <= 1
        assert all(size in (-1, there) for size, there in zip(sizes, shape or (), strict=True))
        return [source(node.inputs[0])]

    for value in model.graph.outputs:
        visit(value)
    listed = [
        {
            "site": None if node.op_type == "Split" else site_of(node.name or ""),
            "operator": (node.domain, node.op_type),
            "reads": reads(node),
            "gives": [shown(value) for value in node.outputs],
            "attributes": attributes(node),
        }
        for node in nodes
    ]
    assert len(nodes) == len(model.graph), "nodes that nothing reads"
    assert len({node.name for node in nodes}) == len(nodes)
    ends = [
        [(value.name, shown(value), source(value)) for value in values]
        for values in (model.graph.inputs, model.graph.outputs)
    ]
    return {"nodes": listed, "ends": ends, "opset": model.opset_imports, "ir": model.ir_version}


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hold a model's recorded graph against the traced one."""

    def compare(model: DeployedModel, image: Tensor, *, opset: int = 20, batch: BatchRange = RANGE) -> None:
        def made(unused: str) -> dict[str, Any]:
            def refuse(*_: Any, **__: Any) -> None:
                raise UnknownFunction(unused)

            with monkeypatch.context() as patch:
                patch.setattr(graph, unused, refuse)
                names = ("pixel_values", *model.outputs)
                return described(graph.trace(model, image, batch=batch, opset=opset, names=names))

        recorded, traced = made("_exported"), made("record")
        for mine, theirs in zip(recorded["nodes"], traced["nodes"], strict=False):
            assert mine == theirs
        assert len(recorded["nodes"]) == len(traced["nodes"])
        assert recorded == traced

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(both: Any, name: str) -> None:
    """Precisions and opsets go round, so that each family meets one of them."""
    place = list(FAMILIES).index(name)
    precision, opset = PRECISIONS[place % len(PRECISIONS)], OPSETS[place % len(OPSETS)]
    both(*deployed(FAMILIES[name], precision), opset=opset)


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_opset_and_precision(both: Any, precision: str, opset: int) -> None:
    config = dataclasses.replace(CONFIGS["clip"], depth=2, activation="gelu_tanh")
    both(*deployed(config, precision), opset=opset)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "hybrid", "swin v2", "qwen qwen2_5"])
def test_pixels_of_bytes(both: Any, name: str) -> None:
    both(*deployed(FAMILIES[name], "fp16", input_kind="uint8"))


@pytest.mark.slow
def test_patches(both: Any) -> None:
    both(*deployed(QWENS["qwen3"], "fp16", input_kind="patches"))


@pytest.mark.slow
def test_a_fixed_batch(both: Any) -> None:
    both(*deployed(CONFIGS["vit"], "fp16"), batch=BatchRange(3, 3, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, outputs",
    [
        ("clip", ("features", "embedding", "tokens")),
        ("mean_of_unnormalised", ("layer_0", "tokens", "features")),
        ("no_head", ("layer_1", "layer_2", "tokens")),
        ("swin v1", ("layer_0", "logits", "tokens")),
    ],
)
def test_several_outputs(both: Any, name: str, outputs: tuple[Output, ...]) -> None:
    both(*deployed(FAMILIES[name], "fp16", outputs))


def test_constants_of_parts_that_share_a_public_name() -> None:
    """Of a tower with windows, the embedding and the readout both have an order of rows."""
    module, image = deployed(QWENS["qwen2_5"], "fp32")
    traced = graph.trace(module, image, batch=RANGE, opset=NEWEST_OPSET, names=("x", "y")).graph
    read = {
        value for node in traced for value in node.inputs if value is not None and value.producer() is None
    }
    assert read - set(traced.inputs) == set(traced.initializers.values())


class Foreign(nn.Module):
    """Calls what no table here has, or has in another form."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


@pytest.mark.parametrize(
    "function",
    [
        torch.fft.fft,
        lambda x: x.mean(),
        lambda x: x.add_(1),
        lambda x: x[..., ::2],
        lambda x: x + torch.ones(1),
        lambda x: x.mT,
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: nn.functional.pad(x, (1, 1), value=2.0),
        lambda x: x.softmax(-1, dtype=torch.float64),
    ],
)
def test_what_is_not_known_is_said(function: Any) -> None:
    with pytest.raises(UnknownFunction):
        record(Foreign(function), torch.zeros(1, 3, 8, 8), opset=20, names=("x", "y"))


@pytest.mark.slow
def test_a_model_with_a_foreign_function_is_traced() -> None:
    """As one of an architecture that nobody here knows may have it."""
    model = DeployedModel(Foreign(lambda x: torch.floor(x)), [], nn.Identity(), ("layer_0",))
    model.blocks.append(Foreign(torch.ceil))
    made = graph.trace(model, torch.zeros(1, 3, 8, 8), batch=RANGE, opset=20, names=("x", "layer_0"))
    assert [node.op_type for node in made.graph] == ["Floor", "Ceil"]
    model.blocks[0] = Foreign(lambda x: x if x.sum().item() > 0 else -x)
    with pytest.raises(ExportError, match="could not trace DeployedModel"):
        graph.trace(model, torch.zeros(1, 3, 8, 8), batch=RANGE, opset=20, names=("x", "layer_0"))
