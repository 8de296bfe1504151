"""What each precision costs behind each block, by rehearsal: the deployed model with every result rounded.

A bundle's parity records are of whole outputs; where an error begins they do not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from vitdeploy.bundle.manifest import Manifest
from vitdeploy.config import Output, Precision, Preprocess, layer_of
from vitdeploy.errors import PrecisionError
from vitdeploy.explanation.measures import relative_error
from vitdeploy.exporter.fallback import emulate
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import Reference, outputs_float64
from vitdeploy.model.registry import architecture_of


@dataclass(frozen=True)
class BlockErrors:
    """The relative errors of one precision, each of a whole tensor: ||x - float64|| / ||float64||."""

    precision: str
    blocks: tuple[float | None, ...]
    """Of the tokens behind each block; None where a number is not finite."""
    output: float | None
    """Of the output named in ``of``."""
    of: Output
    reason: str = ""
    """Why there are no numbers."""


def plans(manifest: Manifest) -> Iterator[tuple[str, PrecisionPlan]]:
    """The precisions without islands, and those of the bundle's artifacts that have some."""
    for precision in get_args(Precision):
        yield precision, PrecisionPlan.of(precision)
    for artifact in manifest.artifacts:
        if artifact.precision == "mixed" and artifact.image_size is None and artifact.format == "onnx":
            requested: Precision = "bf16" if artifact.requested == "bf16" else "fp16"
            yield artifact.name, PrecisionPlan.of(requested).with_islands(frozenset(artifact.islands))


def block_errors(model: Reference, manifest: Manifest, pixel_values: Tensor) -> tuple[BlockErrors, ...]:
    """Rehearse each precision on images, and hold the tokens behind each block against float64.

    Args:
        model: the reference, which stays as it is.
        pixel_values: (N, C, H, W) float32, normalised.
    """
    config, architecture = model.config, architecture_of(model.config)
    layers = (f"layer_{block}" for block in range(config.depth))
    known = tuple(layer for layer in layers if config.output_shape(layer) is not None)
    outputs = (*known, config.outputs[0])
    exact = outputs_float64(model, pixel_values, outputs)
    found = []
    for name, plan in plans(manifest):
        try:
            deployed = architecture.deploy(
                model,
                plan,
                outputs=outputs,
                input_kind="float",
                preprocess=manifest.preprocess or Preprocess(),
            )
            results = emulate(deployed.float(), plan, pixel_values)
        except PrecisionError as error:
            found.append(BlockErrors(name, (), None, outputs[-1], error.message))
            continue
        errors = {
            output: relative_error(result.double().numpy(), exact[output].numpy())
            for output, result in zip(outputs, results, strict=True)
        }
        blocks = tuple(errors[output] for output in outputs if layer_of(output) is not None)
        found.append(BlockErrors(name, blocks, errors[outputs[-1]], outputs[-1]))
    return tuple(found)
