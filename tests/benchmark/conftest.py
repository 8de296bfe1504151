"""A real bundle to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import in_a_process


@pytest.fixture(scope="session")
def digits_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, really exported."""
    folder = tmp_path_factory.mktemp("digits") / "digits.bundle"
    result = in_a_process("export", "-m", "digits", "-o", folder, "--format", "onnx", "--batch", "1,8,16")
    assert result.code == 0, result.err
    return folder
