"""Quantised models and their files: the plainest recipe there is, so that a test knows what was rounded."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from tests.helpers.models import pixels, random_vit
from tests.helpers.traces import RANGE, SPREAD
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.config import BatchRange, Precision, ViTConfig
from vitdeploy.exporter.graph import trace
from vitdeploy.model.deployed import DeployedModel, Linear
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.precision import sites as all_sites
from vitdeploy.model.rewrites import deploy
from vitdeploy.quantisation.attention import attention_scales
from vitdeploy.quantisation.deviation import Deviation
from vitdeploy.quantisation.qdq import insert
from vitdeploy.quantisation.ranges import Ranges
from vitdeploy.quantisation.sites import FP8_LARGEST, INT8_LARGEST, QuantisedModel, QuantisedSite

HEAD = "head"
"""Left in float."""


@functools.cache
def quantised_vit(config: ViTConfig, kind: Quantised, weight_bits: int = 7) -> QuantisedModel:
    """Every linear layer but the head by its largest magnitudes, which are of fp16; the float model is
    ``random_vit(config, spread=SPREAD)``."""
    model = deploy(random_vit(config, spread=SPREAD), PrecisionPlan.of("fp32"), outputs=(config.outputs[0],))
    return quantised(model, pixels(config, 4, seed=5), kind, weight_bits)


@torch.no_grad()
def quantised(
    model: DeployedModel, images: torch.Tensor, kind: Quantised, weight_bits: int = 7
) -> QuantisedModel:
    linears = {name: site for name, site in all_sites(model) if isinstance(site, Linear) and name != HEAD}
    read: dict[str, float] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: read.__setitem__(name, args[0].abs().max().item())
        )
        for name, linear in linears.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    attention = attention_scales(model, images) if kind == "fp8" else {}
    bound = 2 ** (weight_bits - 1) - 1
    found = {}
    for name, linear in linears.items():
        largest = linear.weight.abs().amax(0) if kind == "int8" else linear.weight.abs().amax()
        scale = (largest / (bound if kind == "int8" else FP8_LARGEST)).half().float()
        stored = linear.weight / scale
        rounded = stored.round().clamp(-bound, bound).to(torch.int8) if kind == "int8" else None
        weight = stored.to(torch.float8_e4m3fn) if rounded is None else rounded
        step = torch.tensor(read[name] / (INT8_LARGEST if kind == "int8" else FP8_LARGEST)).half().item()
        found[name] = QuantisedSite(name, kind, weight, scale, step, linear.bias)
        linear.weight = nn.Parameter(found[name].dequantised, requires_grad=False)
    left_out = (HEAD,) if any(name == HEAD for name, _ in all_sites(model)) else ()
    return QuantisedModel(
        model, found, left_out, 0.9, Deviation(0.0), Deviation(1.0, 1.0), Ranges({}, {}), attention
    )


@functools.cache
def quantised_file(
    config: ViTConfig,
    kind: Quantised,
    rest: Precision = "fp32",
    attention: bool = False,
    weight_bits: int = 7,
) -> bytes:
    """The ONNX file of a quantised model."""
    made = quantised_vit(config, kind, weight_bits)
    model = graph_of(made, config, rest)
    insert(model, made.sites, rest, made.attention if attention else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        ir.save(model, path)
        return path.read_bytes()


def graph_of(
    made: QuantisedModel, config: ViTConfig, rest: Precision, opset: int = 20, batch: BatchRange = RANGE
) -> ir.Model:
    """The float graph around the sites."""
    model = assign_dtypes(copy.deepcopy(made.model), "", PrecisionPlan.of(rest))
    names = ("pixel_values", config.outputs[0])
    return trace(model, pixels(config, 1), batch=batch, opset=opset, names=names)


def declared(config: ViTConfig, kind: Quantised, attention: bool = False) -> QuantisedGemms:
    """What the manifest would say of it."""
    made = quantised_vit(config, kind)
    return QuantisedGemms(kind=kind, sites=(*made.sites, *(made.attention if attention else ())))
