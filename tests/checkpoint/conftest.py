"""Every refusal that a test of this room meets is one line and a hint, at most 400 characters together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitdeploy.errors import CheckpointError, VitdeployError


@pytest.fixture(autouse=True)
def short_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    met: list[VitdeployError] = []
    initialise = VitdeployError.__init__

    def remember(self: VitdeployError, *args: Any, **keywords: Any) -> None:
        initialise(self, *args, **keywords)
        met.append(self)

    monkeypatch.setattr(VitdeployError, "__init__", remember)
    yield
    for error in met:
        if not isinstance(error, CheckpointError):
            continue
        # The folder of a test is longer than what people call theirs.
        text = f"{error.message}{error.hint or ''}".replace(str(tmp_path), "models")
        assert "\n" not in text
        assert len(text) <= 400, text
        assert error.hint, text
