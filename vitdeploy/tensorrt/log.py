"""What TensorRT says while it works, kept so that an error can quote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vitdeploy.tensorrt.api import TensorRt

_KEPT = 40
"""Lines of the log that an error may quote."""
_ERRORS = ("INTERNAL_ERROR", "ERROR")


@dataclass
class Log:
    """What TensorRT says."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """Severity and text."""

    def add(self, severity: str, text: str) -> None:
        self.lines.append((severity, " ".join(text.split())))
        del self.lines[:-_KEPT]

    def last_errors(self, count: int = 3) -> str:
        """The newest errors; where there are none, the newest lines."""
        errors = [text for severity, text in self.lines if severity in _ERRORS]
        texts = dict.fromkeys((errors or [text for _, text in self.lines])[-count:])
        return "; ".join(texts) or "its log is empty"


def make_logger(library: TensorRt, log: Log) -> Any:
    """A logger of TensorRT's kind that keeps what is worth quoting."""

    class Logger(library.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in (*_ERRORS, "WARNING"):
                log.add(severity.name, msg)

    return Logger()
