"""Bundles that are served, and one server for all tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.exports import Exported
from tests.helpers.live_server import Live, scaled, serving


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear classifier of 8x8 images."""
    return write_bundle(tmp_path_factory.mktemp("linear") / "linear.bundle").root


@pytest.fixture(scope="session")
def digits(digits: Exported) -> Path:
    return digits.folder


@pytest.fixture(scope="session")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear classifier with doubled logits."""
    return scaled(tmp_path_factory.mktemp("twice") / "twice.bundle", 2.0)


@pytest.fixture(scope="session")
def shared_live(linear: Path, twice: Path) -> Iterator[Live]:
    with serving(linear, f"both@2={linear}", f"both@7={twice}") as server:
        yield server


@pytest.fixture
def live(shared_live: Live) -> Iterator[Live]:
    """``linear`` in version 1, ``both`` in versions 2 and 7, the latter with doubled logits.

    A test answers for what the server says during it, and for nothing that others made it say.
    """
    with shared_live.watched() as server:
        yield server


@pytest.fixture(scope="session")
def shared_strict(linear: Path) -> Iterator[Live]:
    flags = ("--max-body", "1MiB", "--max-pixels", 63, "--fixed-models", "--no-explain")
    with serving(linear, *flags) as server:
        yield server


@pytest.fixture
def strict(shared_strict: Live) -> Iterator[Live]:
    """``linear``, whose clients may send 1 MiB and images of 63 pixels, and may neither change what is served
    nor ask where it looks."""
    with shared_strict.watched() as server:
        yield server


@pytest.fixture(scope="session")
def shared_digits(digits: Path) -> Iterator[Live]:
    with serving(digits) as server:
        yield server


@pytest.fixture
def live_digits(shared_digits: Live) -> Iterator[Live]:
    with shared_digits.watched() as server:
        yield server
