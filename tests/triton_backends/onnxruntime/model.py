"""ONNX Runtime as a backend of Triton's server, in Python: the wheel that the tests start has no other.

It loads `platform: "onnxruntime_onnx"` models unchanged, one request after the other.
"""

import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as server  # type: ignore[import-not-found]


class TritonPythonModel:
    def initialize(self, args):  # type: ignore[no-untyped-def]
        config = json.loads(args["model_config"])
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        settings = onnxruntime.SessionOptions()
        if (config.get("optimization") or {}).get("graph", {}).get("level") == -1:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def execute(self, requests):  # type: ignore[no-untyped-def]
        return [self.answer(request) for request in requests]

    def answer(self, request):  # type: ignore[no-untyped-def]
        feed = {name: server.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        wanted = [name for name in self.outputs if name in request.requested_output_names()]
        found = self.session.run(wanted, feed)
        tensors = [server.Tensor(name, array) for name, array in zip(wanted, found, strict=True)]
        return server.InferenceResponse(output_tensors=tensors)
