"""Small graphs, and a build of them with the double or with the real TensorRT for RTX."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.tensorrt import make_tensorrt
from tests.helpers.bundles import SIZE, WEIGHT, graph

SHAPES = [(size, 3, SIZE, SIZE) for size in (1, 2, 8)]


def attention(dtype: int = TensorProto.FLOAT16) -> bytes:
    """LayerNorm, one head's attention on a projection, and a GELU with its bias."""
    width, kind = 4, helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"scale": np.ones(width), "weight": np.eye(width), "bias": np.ones(width)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["normed"], name="norm", axis=-1),
        helper.make_node("MatMul", ["normed", "weight"], ["q"], name="attn.q"),
        helper.make_node("Transpose", ["normed"], ["k"], name="attn.k", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="attn/MatMul"),
        helper.make_node("Softmax", ["scores"], ["rows"], name="attn/Softmax", axis=-1),
        helper.make_node("MatMul", ["rows", "normed"], ["mixed"], name="attn/MatMul_2"),
        helper.make_node("Add", ["mixed", "bias"], ["sum"], name="mlp/Add"),
        helper.make_node("Gelu", ["sum"], ["y"], name="mlp/Gelu"),
    ]
    made = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", dtype, ["N", 3, width])],
        [helper.make_tensor_value_info("y", dtype, ["N", 3, width])],
        [numpy_helper.from_array(array.astype(kind), name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def logger(library: ModuleType) -> Any:
    """A logger that keeps what it hears."""

    class Keeping(library.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            self.heard.append(f"{severity.name}: {msg}")

    return Keeping()


class Built:
    """A network of one ONNX graph with a configuration for it."""

    def __init__(self, library: ModuleType, model: bytes, name: str = "pixel_values", shapes: Any = SHAPES):
        self.library, self.log = library, logger(library)
        self.builder = library.Builder(self.log)
        flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flags)
        self.parser = library.OnnxParser(self.network, self.log)
        assert self.parser.parse(model)
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        self.profile = self.builder.create_optimization_profile()
        self.profile.set_shape(name, *shapes)
        assert self.config.add_optimization_profile(self.profile) == 0
        if library.__name__ == "tensorrt_rtx":
            self.config.num_compute_capabilities = 2
            self.config.set_compute_capability(library.ComputeCapability.SM89, 0)
            self.config.set_compute_capability(library.ComputeCapability.SM120, 1)

    def plan(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)

    def engine(self) -> Any:
        return self.library.Runtime(self.log).deserialize_cuda_engine(self.plan())


def linear(version: str, **options: Any) -> Built:
    return Built(make_tensorrt(version, **options), graph("fp32", "float", WEIGHT))
