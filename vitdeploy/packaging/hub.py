"""``--target hub``: a folder as models lie on the Hugging Face hub, for transformers, transformers.js and
ONNX Runtime, and a bundle that ``vitdeploy verify`` verifies."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx

from vitdeploy.bundle.files import names_below, sha256
from vitdeploy.bundle.folder import GOLDEN, HELD_OUT, Bundle
from vitdeploy.bundle.manifest import MANIFEST, Artifact, FileRecord, Manifest, canonical, seal
from vitdeploy.bundle.sizes import sized
from vitdeploy.config import size_name
from vitdeploy.errors import MissingDependency, UsageError
from vitdeploy.packaging.hub_card import RESIZE, Card, model_card, source_name
from vitdeploy.packaging.hub_processor import processor_config
from vitdeploy.packaging.hub_push import push, require_pushing
from vitdeploy.packaging.target import Job, Outcome, copy_listed, template, write_text

SETTINGS = ("push", "private", "license", "base_model")
CARD = "README.md"
_ONNX: Mapping[str, tuple[str, str]] = {
    "fp32": ("onnx/model.onnx", "fp32"),
    "fp16": ("onnx/model_fp16.onnx", "fp16"),
    "int8": ("onnx/model_quantized.onnx", "q8"),
}
"""By what was asked for: the file by optimum's convention, and its ``dtype`` in transformers.js."""
_DATA = "_data"
"""Behind the name of an ONNX file, the one with its weights where they are not inside."""


def write(job: Job) -> Outcome:
    """Write the folder.

    Raises:
        UsageError: transformers has no class for the model, no processor for the preprocessing, or no place
            for what the artifacts read or return; or the repository's name cannot be one.
        MissingDependency: torch, which reads and writes the weights, or the hub's library, to push.
    """
    bundle = job.bundle.views[0]
    manifest = bundle.manifest
    where = job.bundle.root
    _refuse_unfit(bundle, where)
    require_pushing(job.settings.push, job.settings.private)
    try:
        from vitdeploy.packaging import hub_model
    except ImportError as error:
        raise MissingDependency(error.name or "torch", extra="export", purpose="a hub folder") from error
    model = hub_model.hub_model(manifest, where)
    assert manifest.preprocess is not None
    processor, notes = processor_config(manifest.preprocess, where)
    chosen = _by_convention(manifest)
    if not chosen:
        raise UsageError(
            f"{where}: has no ONNX artifact in fp32, fp16 or int8, which are the precisions of a hub folder",
            hint="vitdeploy export --fp32 --fp16",
        )
    folder = job.folder
    onnx_files = {kind: _write_onnx(job, artifact, _ONNX[kind][0]) for kind, artifact in chosen.items()}
    config = dict(model.config)
    external = {Path(name).name: 1 for name, data in onnx_files.values() if data}
    if external:
        config["transformers.js_config"] = {"use_external_data_format": external}
    _write_json(folder / hub_model.CONFIG, config)
    _write_json(folder / hub_model.PROCESSOR, processor)
    if model.needs_code:
        write_text(folder / f"{hub_model.MODULE}.py", template("hub_zero_shot.py"))
    hub_model.write_weights(model, bundle, folder)
    hub_model.check_written(model, bundle, folder)
    tensors = [GOLDEN, *([HELD_OUT] if "int8" in chosen else [])]
    for name in tensors:
        source = sized(name, bundle.place)
        if source in manifest.files:
            copy_listed(job, source, folder / name)
    left_out = _left_out(job.bundle, [*chosen.values()])
    write_text(folder / RESIZE, template("hub_resize.mjs"))
    sealed = _write_manifest(folder, bundle, chosen, onnx_files)
    card = Card(
        name=job.name,
        where=job.settings.push or job.output.name,
        pushed=job.settings.push is not None,
        manifest=sealed,
        source=manifest,
        model=model.architecture,
        model_type=model.model_type,
        needs_code=model.needs_code,
        files={_ONNX[kind][1]: name for kind, (name, _) in onnx_files.items()},
        license=job.settings.license,
        base_model=job.settings.base_model,
        notes=notes,
    )
    write_text(folder / CARD, model_card(card))
    return Outcome(
        what=_what(folder, {kind: name for kind, (name, _) in onnx_files.items()}, model.architecture),
        next=_next(job),
        notes=(*notes, *left_out, *_private_notes(sealed, model.needs_code)),
        finish=(lambda place: push(place, job.settings)) if job.settings.push else None,
    )


def _refuse_unfit(bundle: Bundle, where: Path) -> None:
    manifest = bundle.manifest
    if not manifest.classifies:
        raise UsageError(
            f"{where}: gives {manifest.gives}, and a hub folder is an image classifier, which gives logits",
            hint="export it with a head, or a zero-shot head: --zero-shot labels.txt",
        )
    if manifest.refuses_images:
        raise UsageError(f"{where}: {manifest.refuses_images}, which an image classifier on the hub takes")
    if manifest.input != "float":
        raise UsageError(
            f"{where}: reads {manifest.input} images, and transformers.js and optimum give normalised floats",
            hint="vitdeploy export --input float",
        )
    if manifest.model is not None and not bundle.weights:
        raise UsageError(
            f"{where}: has no weights, of which model.safetensors is made", hint="export it again"
        )


def _by_convention(manifest: Manifest) -> dict[str, Artifact]:
    """The artifacts that have a name there, by the precision that was asked for."""
    found: dict[str, Artifact] = {}
    for artifact in manifest.artifacts:
        # What fell back to fp32 islands is the fp16 file still; what fell back to bf16 is none.
        same = artifact.precision in (artifact.requested, "mixed")
        if artifact.format == "onnx" and artifact.requested in _ONNX and same:
            found.setdefault(artifact.requested, artifact)
    return {kind: found[kind] for kind in _ONNX if kind in found}


def _left_out(bundle: Bundle, chosen: Collection[Artifact]) -> list[str]:
    """What the folder has not, a line each."""
    kept = {artifact.name for artifact in chosen}
    first = [artifact for artifact in bundle.manifest.artifacts if artifact.image_size is None]
    others = [artifact.name for artifact in first if artifact.name not in kept]
    notes = []
    if others:
        notes.append(f"left out, as a hub folder has no name for them: {', '.join(others)}")
    if len(bundle.sizes) > 1:
        first_size, *further = map(size_name, bundle.sizes)
        notes.append(f"a hub folder is of one image size: {first_size}, without {', '.join(further)}")
    notes += [
        f"{artifact.name} takes {artifact.batch.min} images at a time, no more and no fewer"
        for artifact in chosen
        if artifact.batch.fixed and artifact.batch.min > 1
    ]
    if not any(artifact.requested == "fp32" for artifact in chosen):
        notes.append(
            "without an fp32 artifact, onnx/model.onnx is missing: programs have to be told the dtype"
        )
    return notes


def _private_notes(manifest: Manifest, needs_code: bool) -> list[str]:
    """What to know before others see the folder, or load it."""
    notes = []
    if HELD_OUT in manifest.files:
        notes.append(
            f"{HELD_OUT} shows images that were calibrated with, on which the int8 file is verified: look at "
            "them before you publish"
        )
    if needs_code:
        notes.append(
            "transformers has no class for a zero-shot head: it loads the one in the folder, with "
            "trust_remote_code=True"
        )
    return notes


# --- files ------------------------------------------------------------------------------------------------


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _write_onnx(job: Job, artifact: Artifact, name: str) -> tuple[str, str | None]:
    """Copy an artifact's files; returns their names, the second that of the weights beside it, if any."""
    target = job.folder / name
    others = [file for file in artifact.files if file != artifact.path]
    if not others:
        copy_listed(job, artifact.path, target)
        return name, None
    (data,) = others
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_listed(job, data, job.folder / f"{name}{_DATA}")
    model = onnx.load(job.bundle.path(artifact.path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{target.name}{_DATA}"
    target.write_bytes(model.SerializeToString(deterministic=True))
    return name, f"{name}{_DATA}"


def _write_manifest(
    folder: Path,
    bundle: Bundle,
    chosen: Mapping[str, Artifact],
    files: Mapping[str, tuple[str, str | None]],
) -> Manifest:
    """The bundle's manifest for these files. The card is none of them: people edit it."""
    records = {
        name: FileRecord(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
        for name in names_below(folder)
    }
    manifest = bundle.manifest.only([artifact.name for artifact in chosen.values()])
    moved = tuple(
        artifact.model_copy(
            update={"path": path, "files": tuple(filter(None, (path, data))), "image_size": None}
        )
        for kind, artifact in chosen.items()
        for path, data in (files[kind],)
    )
    # Choices are of machines that the folder leaves, and a command names places on one.
    provenance = manifest.provenance.model_copy(
        update={"command": "", "source": source_name(manifest.provenance.source)}
    )
    update = {"artifacts": moved, "choices": (), "sizes": (), "provenance": provenance}
    draft = manifest.model_copy(update={**update, "files": {}, "digest": ""})
    sealed = seal(draft, records)
    (folder / MANIFEST).write_bytes(canonical(sealed))
    return sealed


def _what(folder: Path, onnx_files: Mapping[str, str], architecture: str) -> dict[str, str]:
    what = {
        CARD: "the model card: what it is, its proof, how to run it",
        "config.json": f"transformers' {architecture}",
        "preprocessor_config.json": "what AutoImageProcessor reads",
        "model.safetensors": "the weights, under transformers' names",
        "modeling_zero_shot.py": "the class, which transformers has not",
        RESIZE: "resizes images for transformers.js as Pillow does",
        GOLDEN: "inputs and the float64 reference's outputs, for vitdeploy verify",
        HELD_OUT: "the same of images that were held out from calibration",
        MANIFEST: "the bundle: what every file is, and the proof",
        **{name: f"{kind}, for ONNX Runtime and transformers.js" for kind, name in onnx_files.items()},
    }
    there = set(names_below(folder))
    return {name: text for name, text in what.items() if name in there}


def _next(job: Job) -> tuple[str, ...]:
    folder = shlex.quote(str(job.output))
    if job.settings.push:
        return (f"vitdeploy verify {folder}",)
    return (f"vitdeploy verify {folder}", f"hf upload OWNER/{job.name} {folder}")
