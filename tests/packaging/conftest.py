"""Bundles to package, and a short way to package them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.exports import Exported
from vitdeploy.bundle.folder import Bundle
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import Package, write_package

Make = Callable[..., Package]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier, in fp32 and fp16."""
    return write_bundle(tmp_path / "linear.bundle", precisions=("fp32", "fp16"))


@pytest.fixture(scope="session")
def digits(digits: Exported) -> Bundle:
    return Bundle.open(digits.folder)


@pytest.fixture
def package(tmp_path: Path) -> Make:
    """``package(bundle, "docker", threads=2)`` writes ``out/``; takes ``name``, ``version``..., too."""

    def make(bundle: Bundle, target: str = "triton-server", folder: str = "out", **given: Any) -> Package:
        whole = {key: given.pop(key) for key in ("name", "version", "artifact", "force") if key in given}
        return write_package(bundle, target, tmp_path / folder, settings=PackageSettings(**given), **whole)

    return make
