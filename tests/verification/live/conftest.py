"""A bundle to hold servers against."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from vitdeploy.bundle.folder import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier in fp32."""
    return write_bundle(tmp_path / "linear.bundle")
