"""Where the limit lies: what the model computes and reads, and what the processors can compute and move.

A product of the shape of the model's largest GEMM, by the same runtime with the same threads, says how many
operations a second are to be had at all; a copy between two large arrays, what memory gives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.settings import Plan
from benchmarks.serving.subjects import Subject
from benchmarks.spread import quartiles

_TIMES = 11
_SECONDS = 0.05
"""Of each of them, at least."""
_COPIED = 1 << 27
"""Bytes of an array: beyond any cache."""


def measure(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The numbers of one model on this machine."""
    manifest = subject.bundle.manifest
    config: Any = manifest.model
    rows, columns, outputs = max(plan.batches) * config.tokens, config.width, config.mlp_width
    products = _timed(_product(rows, columns, outputs, plan.threads))
    operations = 2 * rows * columns * outputs
    copies = _timed(_copying(plan.threads))
    return {
        "flops": manifest.flops,
        "weights_bytes": 4 * manifest.parameters,
        "gemm": {
            "rows": rows,
            "columns": columns,
            "outputs": outputs,
            "gflop_per_s": quartiles([operations / one / 1e9 for one in products]),
        },
        "copy_gb_per_s": quartiles([2 * _COPIED / one / 1e9 for one in copies]),
    }


def _product(rows: int, columns: int, outputs: int, threads: int) -> Callable[[], object]:
    """What multiplies (rows, columns) by (columns, outputs), fp32, on ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [numpy_helper.from_array(draw.standard_normal((columns, outputs), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = draw.standard_normal((rows, columns), np.float32)
    return lambda: session.run(None, {"x": left})


def _copying(threads: int) -> Callable[[], object]:
    """What copies an array, a part of it on each thread; numpy holds no lock meanwhile."""
    source, target = (np.zeros(_COPIED, np.uint8) for _ in range(2))
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))

    def copy() -> None:
        parts = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        for part in parts:
            part.start()
        for part in parts:
            part.join()

    return copy


def _timed(run: Callable[[], object]) -> Sequence[float]:
    """Seconds of a run, several times over."""
    run()
    begin = time.perf_counter()
    run()
    count = max(1, round(_SECONDS / (time.perf_counter() - begin)))
    found = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        for _ in range(count):
            run()
        found.append((time.perf_counter() - begin) / count)
    return found
