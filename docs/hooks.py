"""Pages outside of docs/ become part of the site, and links between all of them keep working.

In the repository a page links to files as GitHub shows them: README.md to docs/cli.md, docs/cli.md to
../CONTRIBUTING.md. On the site docs/ is the root and README.md the first page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "action.yml",
    "benchmarks/README.md",
    "examples/benchmark-workflow.yml",
    "examples/verify-workflow.yml",
    "kernels/README.md",
    "kernels/predictions.json",
    "kernels/resources/triton-3.6.0.csv",
    "kernels/resources/triton-3.9.0.csv",
    "vitdeploy/data/digits/README.md",
)
"""Files that pages link to, by their place in the repository."""

_LINK = re.compile(r"(?<=\]\()(?![a-z+]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, site_path(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's relative links to where their targets are on the site."""
    here = page.file.src_uri
    place = "README.md" if here == "index.md" else here if here in OUTSIDE else f"docs/{here}"
    folder = posixpath.dirname(place)

    def moved(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, link[0])))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def site_path(name: str) -> str:
    """A file of the repository, as mkdocs calls it."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")
