"""The documents lead where they say: links, anchors, the site, and the files that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "kernels/*.md", "vitdeploy/data/digits/*.md")
    for path in ROOT.glob(pattern)
)

_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(document: str) -> list[str]:
    """Targets of a document's links that are not addresses."""
    text = _CODE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if "://" not in target]


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: str) -> list[str]:
    found = []
    for target in links(document):
        name, _, anchor = target.partition("#")
        path = ((ROOT / document).parent / name) if name else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert broken(document) == []


def test_a_broken_link_would_be_seen() -> None:
    assert "how-fast-it-is" in anchors(ROOT / "docs/serving.md")
    assert "what-to-run---pick" in anchors(ROOT / "docs/benchmark.md")
    assert "no-such-heading" not in anchors(ROOT / "docs/serving.md")
    assert len(links("README.md")) > 20


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in links("README.md")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages <= linked


def test_the_map_names_files_that_are_there() -> None:
    """docs/architecture.md names files by their last parts."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paths = [*ROOT.glob("vitdeploy/**/*.py"), *ROOT.glob("docs/*.py")]
    files = [f"/{path.relative_to(ROOT).as_posix()}" for path in paths]
    named = set(re.findall(r"[\w/]+\.py\b", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)] == []
    rooms = re.findall(r"^ .*?(?<![\w/.])([a-z]+/)", text, re.MULTILINE)
    assert [room for room in rooms if not any(f"/{room}" in file for file in files)] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "In 60 seconds" in first
    assert 'href="quickstart/"' in first
    assert (tmp_path / "site/results.schema.json").is_file()
