"""Real exports that several tests look at, each made once for all processes of a test run."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.helpers.commands import Result


@dataclass(frozen=True)
class Exported:
    """A bundle, to look at or to copy and not to change, and what the command that wrote it said."""

    folder: Path
    result: Result


class Exports:
    """Bundles by what was asked for; whoever asks first makes one, the others wait for it.

    Args:
        folder: that all processes share; bundles lie in folders of their own below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, make: Callable[[Path], Result]) -> Exported:
        """The bundle of this key; ``make`` writes it into the folder that it is given.

        Raises:
            AssertionError: if the command that makes it fails.
        """
        place = self._folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
        folder, said = place / "digits.bundle", place / "said.json"
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                result = make(folder)
                assert result.code == 0, result.err
                said.write_text(json.dumps(asdict(result)), encoding="utf-8")
        return Exported(folder, Result(**json.loads(said.read_text(encoding="utf-8"))))
