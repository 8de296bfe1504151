"""What is told of the families is told of every family there is, once, in the documents too."""

from __future__ import annotations

import pytest

from tests.helpers.documents import rows_after
from vitdeploy.checkpoint.catalogue import CATALOGUE, LIBRARIES, Entry, models_of
from vitdeploy.checkpoint.families import FAMILIES
from vitdeploy.config import OUTPUTS


def test_every_family_has_its_entry_and_no_other() -> None:
    names = {family.name for family in FAMILIES}
    missing, superfluous = sorted(names - CATALOGUE.keys()), sorted(CATALOGUE.keys() - names)
    assert not missing, f"families without an entry: {', '.join(missing)}"
    assert not superfluous, f"entries of no family: {', '.join(superfluous)}"


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_an_entry_names_what_there_is(entry: Entry) -> None:
    assert entry.library in LIBRARIES
    assert list(entry.outputs) == [output for output in OUTPUTS if output in entry.outputs]
    assert entry.models
    assert entry.on_disk


def code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def readme_row(library: str) -> str:
    return f"| {LIBRARIES[library].title}: {', '.join(models_of(library))} | {LIBRARIES[library].proof} |"


def checkpoints_row(library: str) -> str:
    return f"| {LIBRARIES[library].title} | {', '.join(models_of(library))} | {LIBRARIES[library].how} |"


def families_row(name: str, entry: Entry) -> str:
    cells = (code((name,)), ", ".join(entry.models), code(entry.on_disk), entry.reads, code(entry.outputs))
    return f"| {' | '.join(cells)} |"


def test_the_readme_lists_the_libraries_and_their_models() -> None:
    expected = [readme_row(library) for library in LIBRARIES if library != "vitdeploy"]
    assert rows_after("README.md", "| checkpoints | state |")[: len(expected)] == expected


def test_the_page_on_checkpoints_lists_the_libraries_and_their_models() -> None:
    expected = [checkpoints_row(library) for library in LIBRARIES]
    assert rows_after("docs/checkpoints.md", "| from | what | how |")[: len(expected)] == expected


def test_the_page_on_families_lists_them_all() -> None:
    expected = [families_row(name, entry) for name, entry in CATALOGUE.items()]
    header = "| family | models | recognised by | read | outputs |"
    assert rows_after("docs/families.md", header) == expected
