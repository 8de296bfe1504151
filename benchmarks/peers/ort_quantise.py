"""ONNX Runtime's own quantiser: static U8S8 of the linear layers, or dynamic (a job says ``dynamic``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(job: dict[str, Any]) -> None:
    """Read ``source`` and ``images``, write ``file``."""
    from onnxruntime import quantization as tools

    if job.get("dynamic"):
        signed = tools.QuantType.QInt8
        tools.quantize_dynamic(job["source"], job["file"], per_channel=True, weight_type=signed)
        return
    prepared = Path(job["file"]).with_name("prepared.onnx")
    tools.quant_pre_process(job["source"], prepared, skip_symbolic_shape=True)
    tools.quantize_static(
        prepared,
        job["file"],
        _images(tools, np.load(job["images"])),
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        calibrate_method=tools.CalibrationMethod.MinMax,
        nodes_to_exclude=_left_out(prepared),
    )
    prepared.unlink()


def _left_out(path: Path) -> list[str]:
    """Products inside of attention, and that of the pixels: in 8 bits they cost the most of the answer."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if node.input[1] not in weights or node is products[0]]


def _images(tools: Any, images: np.ndarray) -> Any:
    class Images(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._left, None)
            return None if image is None else {"pixel_values": image[None]}

    return Images()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
