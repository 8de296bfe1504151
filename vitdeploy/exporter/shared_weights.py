"""Weights that the graphs of several image sizes have in common: one file beside them, each tensor once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

LEAST = 4096
"""Bytes of a tensor below which it stays in the graph."""
_PAGE = 4096
"""Tensors begin at one, so that runtimes can map them."""


class SharedWeights:
    """The file of one precision.

    The first graph fills it. The others refer to what they have in common with the first; what depends on the
    size stays inside of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        """Where in the file, by the sha256 of what stands there."""

    def take(self, model: ir.Model) -> bool:
        """Make the constants of a graph that lies beside the file refer to it; whether any does.

        Raises:
            OSError: the file cannot be written.
        """
        filling = not self.path.exists()
        refers = False
        with self.path.open("ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < LEAST:
                    continue
                data = tensor.tobytes()
                digest = hashlib.sha256(data).digest()
                if filling and digest not in self._places:
                    file.write(b"\0" * (-file.tell() % _PAGE))
                    self._places[digest] = file.tell()
                    file.write(data)
                if (offset := self._places.get(digest)) is not None:
                    value.const_value = self._reference(tensor, offset)
                    refers = True
        return refers

    def _reference(self, tensor: ir.TensorProtocol, offset: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.path.name,
            offset,
            tensor.nbytes,
            ir.DataType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self.path.parent,
        )
