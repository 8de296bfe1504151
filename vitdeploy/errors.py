"""Every error vitdeploy raises on purpose, with the exit code the command line gives it.

    VitdeployError            1   base class, never raised itself
    ├── UsageError            2   a flag, a name or a combination of them
    │   └── ConfigError       2   a model configuration that cannot be built
    ├── CheckpointError       2   a checkpoint that cannot be read, or is wrong
    │   └── ArchitectureError 2   a checkpoint of an architecture that is not computed here
    ├── ImageError            2   an image that cannot be decoded
    ├── BundleError           2   a bundle that is missing, damaged, unsafe or too new
    ├── ServerError           2   a live server that cannot be reached, or does not speak the protocol
    ├── MissingDependency     3   an optional library that is not installed (names the extra)
    ├── DeviceUnavailable     3   a device or provider this machine does not have
    ├── ExportError           4   an artifact could not be built
    │   └── PrecisionError    4   the graph is not in the precision that was asked for
    ├── ParityError           5   an artifact does not compute what the checkpoint computes
    └── RegressionError       6   slower than the recorded run, beyond noise

A message is one line that says what was wrong and where; ``hint`` says what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class VitdeployError(Exception):
    """Base class: catch it to catch everything vitdeploy raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The stable name of this error in ``--json`` output."""
        return type(self).__name__

    def as_dict(self) -> dict[str, str | None]:
        return {"kind": self.kind, "message": self.message, "hint": self.hint}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> VitdeployError:
        """The error whose ``as_dict`` this is, as it was raised in another process."""
        kinds = {
            name: kind
            for name, kind in globals().items()
            if isinstance(kind, type) and issubclass(kind, VitdeployError)
        }
        kind = kinds.get(record["kind"], VitdeployError)
        error: VitdeployError = kind.__new__(kind)  # some kinds make their message out of other words
        VitdeployError.__init__(error, record["message"], hint=record["hint"])
        return error


class UsageError(VitdeployError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class CheckpointError(VitdeployError):
    exit_code = 2


class ArchitectureError(CheckpointError):
    pass


class ImageError(VitdeployError):
    exit_code = 2


class BundleError(VitdeployError):
    exit_code = 2


class ServerError(VitdeployError):
    exit_code = 2


class MissingDependency(VitdeployError):
    """An optional library is absent; the hint is the command that installs it."""

    exit_code = 3

    def __init__(self, library: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library {library!r}, which is not installed",
            hint=f'pip install "vitdeploy[{extra}]"',
        )


class DeviceUnavailable(VitdeployError):
    exit_code = 3


class ExportError(VitdeployError):
    exit_code = 4


class PrecisionError(ExportError):
    pass


class ParityError(VitdeployError):
    exit_code = 5


class RegressionError(VitdeployError):
    exit_code = 6


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, in any case, or nothing."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""
