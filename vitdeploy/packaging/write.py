"""Packaging: from a bundle and a target's name to a folder, hashes checked before, all or nothing after."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdeploy._version import __version__
from vitdeploy.backends.base import get_backend
from vitdeploy.bundle.files import names_below, sha256
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.output_folder import GENERATOR, output_folder
from vitdeploy.bundle.staging import StagedFolder
from vitdeploy.errors import ExportError, UsageError
from vitdeploy.images.fitting import require_size
from vitdeploy.packaging.target import WHOLE, Job, Outcome, PackageSettings, get_target
from vitdeploy.predictor import DEFAULT_BACKEND, EXACTNESS

MARKER = "vitdeploy-package.json"
"""Says what a folder was packaged from; a folder without it is never replaced."""

MAX_NAME = 60
"""Longer names, with what targets append, make no DNS label and no comfortable path."""

_NAME = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9_.-]{{0,{MAX_NAME - 2}}}[A-Za-z0-9_-])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")


@dataclass(frozen=True)
class PackagedFile:
    """One file of a package."""

    path: str
    size: int
    sha256: str
    what: str


@dataclass(frozen=True)
class Package:
    """What has been written."""

    folder: Path
    target: str
    name: str
    version: int
    artifact: str
    files: tuple[PackagedFile, ...]
    next: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "ok": True,
            "folder": str(self.folder),
            "target": self.target,
            "name": self.name,
            "version": self.version,
            "artifact": self.artifact,
            "files": [
                {"path": f.path, "size": f.size, "sha256": f.sha256, "what": f.what} for f in self.files
            ],
            "next": list(self.next),
            "notes": list(self.notes),
        }


def write_package(
    bundle: str | Path | Bundle,
    target: str,
    output: str | Path,
    *,
    name: str | None = None,
    version: int = 1,
    artifact: str | None = None,
    settings: PackageSettings | None = None,
    force: bool = False,
) -> Package:
    """Write a folder that another server loads.

    Args:
        target: ``triton-server``, ``kserve``, ``docker``, ``ray`` or ``hub``.
        output: the folder; it appears whole, or not at all.
        name: the model's name there; the bundle's own when omitted.
        version: the model's version there, from 1.
        artifact: its name or precision; the most exact that the runtime reads when omitted.
        force: replace a folder that was packaged before.

    Raises:
        UsageError: the target, a setting, the name or the artifact does not fit, or ``output`` exists.
        BundleError: the bundle is missing or damaged.
        MissingDependency: a library that writes the target's format is not installed.
        ExportError: the disk refuses the package.
    """
    settings = settings or PackageSettings()
    write, taken = get_target(target)
    _check_settings(target, settings, taken)
    for name_of, given in (("--artifact", artifact), ("--model-version", version if version != 1 else None)):
        if given is not None and target in WHOLE:
            raise UsageError(f"the target {target} takes no {name_of} (given: {given})")
    if not 1 <= version <= 2**31 - 1:
        raise UsageError(f"version {version}: a model's version is a whole number from 1")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = artifact_to_package(opened, artifact, settings.backend)
    if artifact is None and chosen.is_quantised:
        quantised = f"{chosen.name} is quantised; the bundle has no other artifact to package"
    else:
        quantised = ""
    if settings.fit is not None and not isinstance(settings.fit, str):
        require_size(settings.fit, opened.sizes)
    called, note = model_name(opened, name)
    folder = output_folder(Path(output), opened, marker=MARKER, kind="package", force=force)
    opened.verify_hashes(opened.manifest.files)
    try:
        with StagedFolder(folder) as staged:
            job = Job(opened, chosen, staged.path, Path(output), called, version, settings)
            outcome = write(job)
            files = _describe(staged.path, outcome)
            marker = _marker(job, target, files)
            (staged.path / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
            staged.commit(replace=force)
    except OSError as error:
        reason = error.strerror or str(error)
        there = isinstance(error, FileExistsError)
        hint = "--force replaces it" if there else "choose a folder you may write to, on a disk with space"
        raise ExportError(f"{folder}: cannot be written: {reason}", hint=hint) from error
    finished = outcome.finish(folder) if outcome.finish else ()
    notes = tuple(filter(None, (note, quantised, *outcome.notes, *finished)))
    return Package(Path(output), target, called, version, chosen.name, files, outcome.next, notes)


def artifact_to_package(bundle: Bundle, name: str | None, backend: str | None) -> Artifact:
    """The artifact to package: the one asked for, else the most exact whose files the backend reads.

    Of several image sizes it is the first one's, which stands for what others have in its place.

    Raises:
        UsageError: there is none, or no such backend.
    """
    if name is not None:
        found = bundle.artifact(name)
        if found.image_size is not None:
            raise UsageError(
                f"{name} is of one image size only, and packages have all",
                hint=f"--artifact {found.requested}, or the name of the first size's: each size gets its own",
            )
        return found
    runtime = get_backend(backend or DEFAULT_BACKEND)
    first = [artifact for artifact in bundle.manifest.artifacts if artifact.image_size is None]
    ranked = sorted(first, key=lambda artifact: EXACTNESS.index(artifact.precision))
    for artifact in ranked:
        if artifact.format in runtime.formats:
            return artifact
    if backend is not None and ranked:  # a backend that takes only the precision and the batch sizes
        return ranked[0]
    names = ", ".join(artifact.name for artifact in ranked)
    raise UsageError(
        f"{bundle.root}: has no artifact for {runtime.name}",
        hint=f"name one: --artifact {names}"
        if names
        else "it has no artifacts at all: export the model again",
    )


def model_name(bundle: Bundle, name: str | None) -> tuple[str, str]:
    """The name that servers, paths and addresses can carry, and a line where it is not the bundle's own.

    Raises:
        UsageError: the one that was asked for cannot be carried.
    """
    rule = f"letters, digits, _ - and . (not first or last), at most {MAX_NAME} characters"
    if name is not None:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be a model's name", hint=f"a name has {rule}")
        return name, ""
    title = bundle.manifest.name
    if _NAME.fullmatch(title):
        return title, ""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", title).strip("_.-")[:MAX_NAME].rstrip(".")
    if not _NAME.fullmatch(plain):
        raise UsageError(f"the bundle's name {title!r} cannot be a model's name", hint=f"--name NAME: {rule}")
    return plain, f"the model is named {plain}, as {title!r} cannot be a path; --name gives another"


def flag(setting: str) -> str:
    """``max_batch`` as ``--max-batch``."""
    return f"--{setting.replace('_', '-')}"


def _check_settings(target: str, settings: PackageSettings, taken: frozenset[str]) -> None:
    for name, value in settings.given().items():
        if name not in taken:
            hint = f"it takes {', '.join(sorted(map(flag, taken)))}" if taken else None
            raise UsageError(f"the target {target} takes no {flag(name)} (given: {value})", hint=hint)
    for name in ("threads", "instances", "max_batch", "top_k", "max_replicas"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag(name)} must be at least 1, not {value}")
    if settings.max_delay_ms is not None and not 0 <= settings.max_delay_ms <= 60_000:
        raise UsageError(f"--max-delay-ms must be from 0 to 60000, not {settings.max_delay_ms}")
    if settings.image is not None and not _IMAGE.fullmatch(settings.image):
        raise UsageError(f"--image {settings.image!r}: no name of a container image", hint="--image NAME:TAG")
    if settings.min_replicas is not None and settings.min_replicas < 0:
        raise UsageError(f"--min-replicas must be at least 0, not {settings.min_replicas}")
    if settings.min_replicas is not None and settings.max_replicas is not None:
        low, high = settings.min_replicas, settings.max_replicas
        if low > high:
            raise UsageError(f"--min-replicas {low} is more than --max-replicas {high}")


def _describe(folder: Path, outcome: Outcome) -> tuple[PackagedFile, ...]:
    names = sorted(names_below(folder), key=lambda name: (name.count("/"), name))
    if unknown := set(outcome.what) - set(names):
        raise AssertionError(f"described, but not written: {sorted(unknown)}")
    return tuple(
        PackagedFile(name, (folder / name).stat().st_size, sha256(folder / name), outcome.what.get(name, ""))
        for name in names
    )


def _marker(job: Job, target: str, files: tuple[PackagedFile, ...]) -> Mapping[str, Any]:
    """The marker's document; no times and no paths of this machine: the same input gives it again."""
    manifest = job.bundle.manifest
    return {
        "generator": f"{GENERATOR} {__version__}",
        "target": target,
        "name": job.name,
        "version": job.version,
        "bundle": {"name": manifest.name, "digest": manifest.digest},
        "artifact": job.artifact.name,
        "precision": job.artifact.precision,
        "settings": {key: value for key, value in job.settings.given().items() if key != "wheel"},
        "files": {file.path: {"size": file.size, "sha256": file.sha256} for file in files},
    }
