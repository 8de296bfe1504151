"""What an export would build, found out without building it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdeploy.bundle.folder import CALIBRATION, GOLDEN, HELD_OUT, WEIGHTS, BundleWriter
from vitdeploy.bundle.golden import FEWER_NAMES, GOLDEN_NAMES, raw_images
from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.bundle.sizes import sized
from vitdeploy.config import Size, model_fields
from vitdeploy.errors import BundleError
from vitdeploy.exporter.onnx import FILES, INPUT
from vitdeploy.exporter.quantised import open_calibration
from vitdeploy.exporter.request import ExportRequest, Order, engines_of, orders_of
from vitdeploy.exporter.subject import Subject, further_subjects, open_subject
from vitdeploy.quantisation.calibration import CalibrationImages
from vitdeploy.tensorrt.flavours import FLAVOURS

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
_GRAPH = 200_000
"""Bytes of a graph without its weights, about."""


@dataclass(frozen=True)
class ExportPlan:
    """A model as it was opened, and the bundle it would become."""

    source: str
    config: dict[str, Any]
    """Empty for a module of the user's own."""
    parameters: int
    flops: int | None
    input: str
    output: str
    rewrites: tuple[Rewrite, ...]
    folder: Path
    files: dict[str, int]
    """Estimated bytes."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rewrites = [rewrite.model_dump(mode="json") for rewrite in self.rewrites]
        return plain | {"folder": str(self.folder), "notes": list(self.notes), "rewrites": rewrites}


def plan_export(request: ExportRequest, folder: Path | None = None, *, force: bool = False) -> ExportPlan:
    """Open the model and say what exporting it would write; nothing stays on the disk.

    Where the export could not write is a note, because the plan is the same for another folder.

    Raises:
        UsageError, CheckpointError, MissingDependency, DeviceUnavailable: as the export itself.
    """
    target = folder or request.default_folder
    orders, impossible = orders_of(request.engines)
    opened, subject = open_subject(request)
    images = open_calibration(request, subject) if request.quantised else None
    subjects = (subject, *further_subjects(opened, request))
    shapes = " or ".join(map(_input_shape, subjects))
    return ExportPlan(
        source=opened.source,
        config=model_fields(subject.config) if subject.config else {},
        parameters=subject.parameters,
        flops=subject.flops,
        input=f"{INPUT} {'uint8' if subject.input == 'uint8' else 'float32'} {shapes}",
        output=", ".join(f"{output} float32" for output in subject.outputs),
        rewrites=subject.rewrites,
        folder=target,
        files=_files(request, subjects)
        | _quantised_files(request, orders, subject, images)
        | _engine_files(request, orders, subjects),
        notes=(
            *opened.notes,
            *subject.notes,
            *engines_note(orders, impossible),
            *_objections(target, force),
        ),
    )


def _input_shape(subject: Subject) -> str:
    return f"(N, {', '.join(map(str, subject.input_shape))})"


def _places(subjects: Sequence[Subject]) -> list[Size | None]:
    """Their sizes, as artifacts name them."""
    return [subject.image_size if index else None for index, subject in enumerate(subjects)]


def _objections(target: Path, force: bool) -> tuple[str, ...]:
    """Why the export could not write there; nothing stays on the disk."""
    try:
        with BundleWriter(target, force=force):
            return ()
    except BundleError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return (f"the export itself would be refused: {error.message}{hint}",)


def engines_note(orders: Sequence[Order], impossible: Sequence[str]) -> tuple[str, ...]:
    """One line on the engines that ``auto`` leaves out here; who wants them can ask why."""
    if not impossible:
        return ()
    left_out = sorted(FLAVOURS.keys() - {order.flavour.name for order in orders})
    return (f"no engines for {' and '.join(left_out)}: `vitdeploy engine BUNDLE` says what they need",)


def _engine_files(
    request: ExportRequest, orders: Sequence[Order], subjects: Sequence[Subject]
) -> dict[str, int]:
    """An engine has about the size of its weights."""
    files: dict[str, int] = {}
    kinds: dict[str, int] = {name: _BYTES[name] for name in request.floats}
    kinds |= {f"{name}-fp16": _BYTES[name] for name in request.quantised}
    for (kind, each), place in itertools.product(kinds.items(), _places(subjects)):
        size = each * subjects[0].parameters
        files |= {engine.path: size for order in orders for engine in engines_of(order, kind, place)}
    return files


def _quantised_files(
    request: ExportRequest, orders: Sequence[Order], subject: Subject, images: CalibrationImages | None
) -> dict[str, int]:
    """The artifacts in 8 bits, with their images."""
    if images is None:
        return {}
    pixels = sum(array.nbytes for array in images.tensors().values())
    held_out = len(images.held_out) * (_input_bytes(subject) + _answer(subject))
    files = {CALIBRATION: pixels, HELD_OUT: held_out}
    for kind, rest in itertools.product(request.quantised, request.rests(orders)):
        name = kind if rest == "fp32" else f"{kind}-{rest}"
        files[FILES[name]] = _GRAPH + _BYTES[kind] * subject.parameters
    return files


def _files(request: ExportRequest, subjects: Sequence[Subject]) -> dict[str, int]:
    files: dict[str, int] = {}
    precisions = request.floats if request.wants_onnx else ()
    for subject, place in zip(subjects, _places(subjects), strict=True):
        state = subject.state
        own = sum(state[name].nbytes for name in (subject.own if place else state))
        if own:
            files[sized(WEIGHTS, place)] = own
        files[sized(GOLDEN, place)] = _golden(subject, GOLDEN_NAMES if place is None else FEWER_NAMES)
        for precision in precisions:
            weights, file = _BYTES[precision] * subject.parameters, FILES[precision]
            if len(subjects) > 1:
                files[sized(file, place)] = _GRAPH + (own if place else 0)
                files[f"{file}.data"] = weights
            else:
                files[file] = weights
    return files


def _golden(subject: Subject, names: Sequence[str]) -> int:
    """Bytes of the golden tensors."""
    raw = [image.nbytes for image in raw_images()] if subject.takes_images else []
    return sum(raw) + (len(names) + len(raw)) * _input_bytes(subject) + len(names) * _answer(subject)


def _input_bytes(subject: Subject) -> int:
    """Bytes of one image as artifacts read it."""
    return math.prod(subject.input_shape) * (1 if subject.input == "uint8" else 4)


def _answer(subject: Subject) -> int:
    """Bytes of the reference's answers to an image, in float64; of a user's module nobody knows."""
    shapes = [subject.config.output_shape(output) for output in subject.outputs] if subject.config else []
    return 8 * sum(math.prod(shape) for shape in shapes if shape is not None)
