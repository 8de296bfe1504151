"""The fp8 products of an exported file with the numbers that are stored, for who computes them otherwise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitdeploy.errors import BundleError

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fp8Gemm:
    """``(q(x / input_scale) @ weight) input_scale scale + bias``, with q rounding to E4M3.

    Attributes:
        weight: (in, out) uint8, the bits of E4M3 numbers.
        scale: what a number of the weight counts.
        input_scale: what a number of its input counts.
        bias: (out) float32, or None.
    """

    weight: Array
    scale: float
    input_scale: float
    bias: Array | None


def read_fp8_gemms(path: Path, sites: Collection[str]) -> dict[str, Fp8Gemm]:
    """The products of these sites, by name.

    Args:
        path: an ONNX file that vitdeploy exported.
        sites: as the artifact's record names them; products inside of an attention have no weights, and are
            left out.

    Raises:
        BundleError: the file cannot be read, or a site is no fp8 product in it.
    """
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # a protobuf DecodeError, whose class lies in whichever protobuf is installed
        raise BundleError(f"{path.name}: not a readable ONNX file ({error})") from error
    graph = _Graph(model.graph)
    attentions = {node.name.rsplit(".", 1)[0] for node in model.graph.node if node.op_type == "Softmax"}
    found = {site: graph.gemm(site) for site in sites if site not in attentions}
    missing = [site for site, gemm in found.items() if gemm is None]
    if missing:
        raise BundleError(f"{path.name} has no fp8 product of {min(missing)}")
    return {site: gemm for site, gemm in found.items() if gemm is not None}


class _Graph:
    """A graph by the names of what is in it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def gemm(self, site: str) -> Fp8Gemm | None:
        """Of a site; None if it is none of fp8."""
        node = self.producers.get(f"{site}/MatMul")
        if node is None or node.op_type != "MatMul":
            return None
        reads = [self.producers.get(value) for value in node.input]
        if [each and each.op_type for each in reads] != ["DequantizeLinear"] * 2:
            return None
        x, w = reads
        assert x is not None
        assert w is not None
        weight = self.bits(w.input[0])
        scale, input_scale = (self.array(each.input[1]).astype(np.float32) for each in (w, x))
        if weight is None or weight.ndim != 2 or scale.ndim or input_scale.ndim:
            return None
        return Fp8Gemm(weight, float(scale), float(input_scale), self.bias(node))

    def bias(self, node: onnx.NodeProto) -> Array | None:
        """What is added to a product, behind a Reshape to the same shape maybe."""
        followers = self.readers.get(node.output[0], [])
        if [each.op_type for each in followers] == ["Reshape"]:
            followers = self.readers.get(followers[0].output[0], [])
        if [each.op_type for each in followers] != ["Add"]:
            return None
        added = [name for name in followers[0].input if name in self.constants]
        return self.array(added[0]).astype(np.float32) if added else None

    def array(self, name: str) -> Array:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.constants[name]))

    def bits(self, name: str) -> Array | None:
        """Of an E4M3 constant; None if it is none."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT8E4M3FN:
            return None
        return self.array(name).view(np.uint8)
