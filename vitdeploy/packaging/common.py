"""What several targets need: copies of the bundle's files, texts from templates, names that clusters take."""

from __future__ import annotations

import re
import shutil
from importlib import resources
from pathlib import Path
from string import Template

from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.manifest import MANIFEST
from vitdeploy.errors import BundleError
from vitdeploy.packaging.target import Job

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


def render(name: str, /, **values: object) -> str:
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


def label(name: str) -> str:
    """A model's name as a DNS label (RFC 1035), which images and services in clusters are named by."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_LABEL].rstrip("-")
    return plain if plain[:1].isalpha() else f"m-{plain}"[:MAX_LABEL].rstrip("-")
