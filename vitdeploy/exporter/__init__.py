"""From a model to a bundle. Everything in here needs PyTorch; import it within ``exporting()``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vitdeploy.errors import MissingDependency


@contextmanager
def exporting(purpose: str = "exporting") -> Iterator[None]:
    """Surround an import of what exports: says which extra to install where PyTorch is missing.

    Raises:
        MissingDependency: PyTorch, or what its ONNX exporter is made of, is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] not in ("torch", "onnxscript", "onnx_ir"):
            raise
        raise MissingDependency(error.name, extra="export", purpose=purpose) from error
