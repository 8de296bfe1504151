"""Whether TensorRT for RTX runs on the GPU that is here: builds a small engine for it, and runs it once.

Prints a document: what it said, and whether the result was right. GPUs that are no RTX have no name among its
targets; for them it is asked to build for "the current one".
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from vitdeploy.machine.gpus import find_gpus
from vitdeploy.tensorrt.builder import Log, make_logger
from vitdeploy.tensorrt.cuda import CudaDevice

WIDTH = 64


def model() -> onnx.ModelProto:
    """Twice the input, as a product."""
    weight = numpy_helper.from_array(2 * np.eye(WIDTH, dtype=np.float16), "weight")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], name="double")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [8, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph([node], "double", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def build(library: Any, logger: Any) -> Any:
    """The engine's bytes for the GPU that is here, or None."""
    builder = library.Builder(logger)
    network = builder.create_network(0)
    parser = library.OnnxParser(network, logger)
    if not parser.parse(model().SerializeToString()):
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.CURRENT, 0)
    return builder.build_serialized_network(network, config)


def run(library: Any, logger: Any, data: Any) -> bool:
    """Whether the engine computes what it should."""
    engine = library.Runtime(logger).deserialize_cuda_engine(data)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        return False
    device = CudaDevice(0)
    x, y = (device.stage(8 * WIDTH * 2) for _ in range(2))
    values = np.arange(8 * WIDTH, dtype=np.float16).reshape(8, WIDTH) / 64
    x.host[:] = values.reshape(-1).view(np.uint8)
    device.upload(x)
    context.set_tensor_address("x", x.address)
    context.set_tensor_address("y", y.address)
    done = context.execute_async_v3(device.handle)
    device.download(y)
    device.synchronize()
    return bool(done) and np.array_equal(y.host.view(np.float16), 2 * values.reshape(-1))


def main() -> int:
    log = Log()
    logger = make_logger(tensorrt_rtx, log)
    gpus = find_gpus()
    data = build(tensorrt_rtx, logger)
    right = data is not None and run(tensorrt_rtx, logger, data)
    document = {
        "ok": right,
        "gpu": gpus[0].name if gpus else None,
        "version": tensorrt_rtx.__version__,
        "built": data is not None,
        "ran": right,
        "said": [text for _, text in log.lines[-5:]],
    }
    print(json.dumps(document))
    return 0 if right else 4


if __name__ == "__main__":
    sys.exit(main())
