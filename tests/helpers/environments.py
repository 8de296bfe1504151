"""Environments made of what is installed here: distributions are linked into them, nothing is downloaded."""

from __future__ import annotations

import re
import venv
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def needed(distribution: metadata.Distribution, extras: set[str]) -> list[metadata.Distribution]:
    """What a distribution with these extras depends on, as installed here, without itself."""
    found: dict[str, metadata.Distribution] = {}
    queue = [(distribution, extras)]
    seen = set()
    while queue:
        one, extras = queue.pop()
        for requirement in map(Requirement, one.requires or ()):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            name = normal(requirement.name)
            if (name, *sorted(requirement.extras)) not in seen:
                seen.add((name, *sorted(requirement.extras)))
                found[name] = metadata.distribution(name)
                queue.append((found[name], requirement.extras))
    return list(found.values())


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Make a distribution's packages and metadata visible in another environment."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(Path(str(distribution.locate_file(name))))


def environment_of(names: Iterable[str], folder: Path, without: Collection[str] = ()) -> Path:
    """The interpreter of a new environment with these distributions and what they need, and nothing else.

    Those that are not installed here are not there either, nor is what it is to be ``without``.
    """
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for name in names:
        found = next(metadata.distributions(name=name), None)
        if found is not None:
            linked = (each for each in (found, *needed(found, set())) if normal(each.name) not in without)
            for each in linked:
                link(each, site)
    return folder / "bin" / "python"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
