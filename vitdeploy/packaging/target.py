"""What every package is: a folder made from a bundle for another server, written whole or not at all.

To add a target: a module here with ``write(job) -> Outcome`` and ``SETTINGS``, and a line in the table below.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal, Protocol

from vitdeploy.backends.base import Backend, get_backend, reader_of, require_support
from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import MANIFEST, Artifact
from vitdeploy.config import size_name
from vitdeploy.errors import BundleError, UsageError, did_you_mean
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, rule_name

TARGETS = {
    "triton-server": "vitdeploy.packaging.triton_server:write",
    "kserve": "vitdeploy.packaging.kserve:write",
    "docker": "vitdeploy.packaging.docker:write",
    "ray": "vitdeploy.packaging.ray:write",
    "hub": "vitdeploy.packaging.hub:write",
}
"""Each target's function; beside it in its module, ``SETTINGS`` names the settings that it takes."""

WHOLE = frozenset(("hub",))
"""Targets that take all artifacts of a bundle, and know no versions of a model."""

Device = Literal["cpu", "gpu"]
_DEVICES: Mapping[str, Device] = {"cpu": "cpu", "gpu": "gpu"}

MAX_LABEL = 53
"""Longest name of a service in a cluster: with what KServe appends to it, it has to stay a DNS label."""

COMPOSE_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""
"""What a service in a compose file needs to see a GPU."""


@dataclass(frozen=True)
class PackageSettings:
    """How the model is to run there. None is the target's own choice; what it does not take is refused."""

    backend: str | None = None
    """The runtime inside of our own server."""
    device: Device | None = None
    threads: int | None = None
    """CPU threads per model instance."""
    instances: int | None = None
    """Copies of the model in one server."""
    max_batch: int | None = None
    max_delay_ms: float | None = None
    """How long a request waits for company."""
    top_k: int | None = None
    """Classes per image."""
    min_replicas: int | None = None
    max_replicas: int | None = None
    storage_uri: str | None = None
    """Where the cluster will find the model repository."""
    namespace: str | None = None
    image: str | None = None
    """The container image to use instead of the target's own."""
    wheel: str | None = None
    """A wheel of vitdeploy to install in the image, in place of the package index's."""
    tensors_only: bool | None = None
    """Leave out what takes image files: tensors in, tensors out."""
    fit: Rule | None = None
    """How an image gets one of several sizes."""
    push: str | None = None
    """The hub's repository to upload the folder to, ``owner/name``; it is made where there is none."""
    private: bool | None = None
    """Whether a repository that is made shows to its owner alone."""
    license: str | None = None
    """What the model card says: the hub's name of a licence."""
    base_model: str | None = None
    """What the model card says: the hub's model that this one was made from."""

    def given(self) -> dict[str, object]:
        """The settings that are not None, by name."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}


@dataclass(frozen=True)
class Job:
    """One package to write."""

    bundle: Bundle
    """Opened, every hash checked."""
    artifact: Artifact
    """What is to run there."""
    folder: Path
    """An empty folder to write into; it is moved to ``output`` when all is written."""
    output: Path
    """Where the package will be: for what the user is told, not for writing."""
    name: str
    """The model's name there: letters, digits, ``_``, ``-``, ``.``, beginning with a letter or digit."""
    version: int = 1
    settings: PackageSettings = field(default_factory=PackageSettings)

    @property
    def several(self) -> bool:
        """Whether there are several image sizes to choose from."""
        return len(self.bundle.sizes) > 1

    @property
    def fit(self) -> str:
        """The name of the rule that chooses."""
        return rule_name(self.settings.fit or DEFAULT_RULE)

    def at_sizes(self) -> tuple[Job, ...]:
        """The same for each image size alone, the default under this name, others with their size behind it.

        Raises:
            UsageError: a size has no artifact that was asked for as this one was.
        """
        names = [self.name, *(f"{self.name}_{size_name(size)}" for size in self.bundle.sizes[1:])]
        return tuple(
            replace(self, bundle=view, artifact=view.artifact(self.artifact.name), name=name)
            for name, view in zip(names, self.bundle.views, strict=True)
        )

    def backend(self) -> Backend:
        """The runtime inside of our own server: the one asked for, else the first that reads the artifact.

        Raises:
            UsageError: there is no such backend, or it cannot run the artifact.
        """
        name = self.settings.backend
        backend = get_backend(name) if name else reader_of(self.artifact)
        require_support(backend, self.bundle, self.artifact)
        return backend


@dataclass(frozen=True)
class Outcome:
    """What a target has to say about the files it wrote."""

    what: Mapping[str, str]
    """What a file is, by its path in the folder; files without a word here are listed all the same."""
    next: tuple[str, ...] = ()
    """Commands to type next."""
    notes: tuple[str, ...] = ()
    """What the user should know: one line each."""
    finish: Callable[[Path], tuple[str, ...]] | None = None
    """What is done with the folder once it is in its place; returns further notes."""


class Write(Protocol):
    """Fills ``job.folder``.

    Raises:
        UsageError: this bundle, artifact or setting is not for this target.
        MissingDependency: a library that writes the target's format is not installed.
    """

    def __call__(self, job: Job) -> Outcome: ...


def checked_device(name: str | None) -> Device | None:
    """A device by its name.

    Raises:
        UsageError: neither cpu nor gpu.
    """
    if name is None:
        return None
    if name not in _DEVICES:
        suggestion = did_you_mean(name, _DEVICES)
        raise UsageError(f"unknown device {name!r}{suggestion}", hint=f"known: {', '.join(_DEVICES)}")
    return _DEVICES[name]


def target_names() -> tuple[str, ...]:
    return tuple(TARGETS)


def get_target(name: str) -> tuple[Write, frozenset[str]]:
    """A target's function and the names of the settings it takes.

    Raises:
        UsageError: there is none (with a suggestion).
    """
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise UsageError(f"unknown target {name!r}{did_you_mean(name, TARGETS)}", hint=f"known: {known}")
    path, _, attribute = TARGETS[name].partition(":")
    module = importlib.import_module(path)
    return getattr(module, attribute), frozenset(module.SETTINGS)


def copy_listed(job: Job, name: str, target: Path) -> None:
    """Copy a file that the bundle lists, and hold the copy against the manifest.

    Raises:
        BundleError: the file was changed meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.bundle.path(name), target)
    if sha256(target) != job.bundle.manifest.files[name].sha256:
        raise BundleError(f"{job.bundle.root}: {name} changed while it was copied", hint="run it again")


def copy_bundle(job: Job, folder: Path) -> None:
    """Copy the whole bundle: its manifest and what that lists, nothing else.

    Raises:
        BundleError: it was changed meanwhile.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(job.bundle.root / MANIFEST, folder / MANIFEST)
    for name in job.bundle.manifest.files:
        copy_listed(job, name, folder / name)


def template(name: str) -> str:
    """The text of a file in ``templates/``."""
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def fill_template(name: str, /, **values: object) -> str:
    """A template with ``${name}`` filled in; ``$$`` is a dollar sign. Every value has to have a place.

    Raises:
        KeyError: a value that the template names is not given.
    """
    made = Template(template(name))
    if unused := set(values) - set(made.get_identifiers()):
        raise KeyError(f"{name} has no place for {sorted(unused)}")
    return made.substitute(values)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with plain newlines, and the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def fitting_words(job: Job) -> str:
    """Which of several sizes an image gets, in a sentence."""
    words = {
        "aspect": "the one of the nearest aspect ratio, and of several such of the nearest area",
        "area": "the one of the nearest area",
    }
    return words.get(job.fit, f"{job.fit}, whatever its shape")


def sizes_text(job: Job, field: str, tensors: str = "") -> str:
    """What a README says of several image sizes; empty of one."""
    if not job.several:
        return ""
    sizes = " and ".join(map(size_name, job.bundle.sizes))
    words = {"sizes": sizes, "rule": fitting_words(job), "field": field, "tensors": tensors}
    return fill_template("sizes.md", **words)


def label(name: str) -> str:
    """A model's name as a DNS label (RFC 1035), which images and services in clusters are named by."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_LABEL].rstrip("-")
    return plain if plain[:1].isalpha() else f"m-{plain}"[:MAX_LABEL].rstrip("-")
