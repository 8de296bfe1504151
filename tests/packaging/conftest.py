"""A bundle to package, the real digits model, and a short way to package either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import in_a_process
from vitdeploy.bundle.folder import Bundle
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import Package, write_package

Make = Callable[..., Package]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier, in fp32 and fp16."""
    return write_bundle(tmp_path / "linear.bundle", precisions=("fp32", "fp16"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits model, really exported."""
    folder = tmp_path_factory.mktemp("digits") / "digits.bundle"
    result = in_a_process("export", "-m", "digits", "-o", folder, "--fp32")
    assert result.code == 0, result.err
    return Bundle.open(folder)


@pytest.fixture
def package(tmp_path: Path) -> Make:
    """``package(bundle, "docker", threads=2)`` writes ``out/``; takes ``name``, ``version``..., too."""

    def make(bundle: Bundle, target: str = "triton-server", folder: str = "out", **given: Any) -> Package:
        whole = {key: given.pop(key) for key in ("name", "version", "artifact", "force") if key in given}
        return write_package(bundle, target, tmp_path / folder, settings=PackageSettings(**given), **whole)

    return make
