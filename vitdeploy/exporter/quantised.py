"""Quantised artifacts: what they are calibrated with and proven on, and when they are refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.absent import looks_like_bundle
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.folder import CALIBRATION, WEIGHTS, Bundle
from vitdeploy.bundle.golden import reference_key
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.quantisation import QuantisationRecord
from vitdeploy.config import Precision
from vitdeploy.errors import UsageError
from vitdeploy.exporter.onnx import INPUT
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.subject import Subject
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.predictor import Predictor
from vitdeploy.progress import Progress
from vitdeploy.quantisation.attention import attention_scales
from vitdeploy.quantisation.calibration import WANTED, CalibrationImages, from_tensors, read_folder
from vitdeploy.quantisation.ranges import Ranges
from vitdeploy.quantisation.recipe import quantise
from vitdeploy.quantisation.sites import QuantisedModel
from vitdeploy.verification.accuracy import LabelledImages, TopClasses, check_max_drop, top_classes

LEAST_MACS = 0.7
"""Share of the GEMMs' multiplications below which an artifact is not worth its error."""


@dataclass(frozen=True)
class QuantisedForm:
    """A quantised model around a rest of one precision: one artifact."""

    model: QuantisedModel
    kind: Quantised
    rest: Precision
    record: QuantisationRecord

    @property
    def name(self) -> str:
        """What its artifact is called behind ``onnx-``."""
        return self.kind if self.rest == "fp32" else f"{self.kind}-{self.rest}"

    def deployed(self, plan: PrecisionPlan) -> DeployedModel:
        """The float model to trace, in the dtypes of the plan.

        Raises:
            PrecisionError: a weight does not fit into its dtype.
        """
        if plan.default == torch.float32:
            return self.model.model
        return assign_dtypes(copy.deepcopy(self.model.model), "", plan)


def open_calibration(request: ExportRequest, subject: Subject) -> CalibrationImages:
    """The images that the request names.

    Raises:
        ImageError, UsageError: there are none, or none that serve; or a drop that cannot be measured.
        BundleError: the bundle is damaged.
    """
    source = request.calibration
    assert source is not None  # which the request has checked
    check_max_drop(request.max_drop, request.data)
    if source.is_file():
        raise UsageError(f"{source} is a file: calibration takes a folder", hint=WANTED)
    if not looks_like_bundle(source):
        return read_folder(source, subject.preprocess)
    bundle = Bundle.open(source)
    tensors = bundle.tensors(CALIBRATION)
    return from_tensors(tensors, bundle.manifest.calibration, subject.preprocess, source)


def kept_ranges(request: ExportRequest, subject: Subject) -> Ranges | None:
    """The ranges that a bundle has beside its calibration images; None where there is none.

    With other outputs, other layers are quantised: then they are measured again.
    """
    source = request.calibration
    if source is None or not looks_like_bundle(source):
        return None
    bundle = Bundle.open(source)
    if bundle.manifest.outputs != subject.outputs:
        return None
    tensors = bundle.tensors(CALIBRATION)
    return Ranges.from_tensors({name: torch.from_numpy(array) for name, array in tensors.items()})


def require_same_model(source: Path, weights: Path) -> None:
    """Refuse the calibration of a bundle with other weights than those that were written to ``weights``.

    Raises:
        UsageError: they differ.
    """
    if looks_like_bundle(source):
        record = Bundle.open(source).manifest.files.get(WEIGHTS)
        if record is None or record.sha256 != sha256(weights):
            raise UsageError(
                f"{source}: was calibrated for another model: its weights are not these", hint=WANTED
            )


def held_out_arrays(subject: Subject, images: CalibrationImages) -> dict[str, np.ndarray[Any, Any]]:
    """The held-out images as artifacts read them, with the float64 reference's outputs."""
    inputs = subject.inputs_of(images.held_out)
    arrays: dict[str, np.ndarray[Any, Any]] = {INPUT: inputs.numpy()}
    for output, reference in subject.reference(inputs).items():
        arrays[reference_key(subject.outputs, output)] = reference.numpy().copy()
    return arrays


def quantise_subject(
    subject: Subject,
    images: CalibrationImages,
    kind: Quantised,
    request: ExportRequest,
    rests: Sequence[Precision],
    ranges: Ranges | None,
    progress: Progress,
) -> QuantisedModel:
    """Quantise the deployed model.

    Args:
        rests: all that artifacts are made around, the narrowest last: scales fit into it.
        ranges: where these images were measured already.

    Raises:
        UsageError: it gives NaN or infinite values for a calibration image.
    """
    deployed = subject.deployed(PrecisionPlan.of("fp32"))
    assert isinstance(deployed, DeployedModel)  # modules of users' own are refused
    inputs = subject.inputs_of(images.images)
    model = quantise(
        deployed,
        inputs,
        kind=kind,
        weight_bits=request.weight_bits,
        rest=rests[-1],
        ranges=ranges,
        progress=progress,
    )
    if kind == "fp8" and request.fp8_attention:
        model = replace(model, attention=attention_scales(model.model, inputs))
    return model


def onnx_answers(bundle: Bundle, artifact: Artifact, images: LabelledImages) -> TopClasses:
    """The classes that an ONNX artifact puts first on ONNX Runtime.

    Raises:
        ImageError: an image cannot be decoded.
    """
    with get_backend("onnxruntime").load(bundle, artifact, Options()) as session:
        return top_classes(Predictor(bundle, session), images)


def form_of(
    model: QuantisedModel, kind: Quantised, rest: Precision, images: CalibrationImages, request: ExportRequest
) -> QuantisedForm:
    """An artifact to make, with what the manifest will say of it."""
    record = QuantisationRecord(
        rest=rest,
        weight_bits=request.weight_bits if kind == "int8" else 8,
        sites=(*model.sites, *model.attention),
        left_out=model.left_out,
        macs=model.macs,
        images=len(images.images),
        attention=bool(model.attention),
    )
    return QuantisedForm(model, kind, rest, record)


def shortage(model: QuantisedModel) -> str | None:
    """Why a quantised model is not worth an artifact; None where it is."""
    if model.macs < LEAST_MACS:
        return (
            f"{100 * (1 - model.macs):.0f} % of the multiplications stay float (at most "
            f"{100 * (1 - LEAST_MACS):.0f} % may)"
        )
    if model.falls_short:
        layers = len(model.left_out) + len(model.sites)
        floats = f"{len(model.left_out)} of {layers} layers left float"
        return f"{model.found} of the calibration images with {floats}, at most {model.target}"
    return None
