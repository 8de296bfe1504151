"""TensorRT's place in Triton's server where there is no GPU: opens the plan, and answers with zeros.

The server reads and judges the configuration of a `tensorrt_plan` model before any backend does.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as server  # type: ignore[import-not-found]


class TritonPythonModel:
    def initialize(self, args):  # type: ignore[no-untyped-def]
        self.config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / "model.plan"
        assert path.stat().st_size

    def execute(self, requests):  # type: ignore[no-untyped-def]
        return [self.answer(request) for request in requests]

    def answer(self, request):  # type: ignore[no-untyped-def]
        images = len(server.get_input_tensor_by_name(request, self.config["input"][0]["name"]).as_numpy())
        tensors = []
        for one in self.config["output"]:
            dtype = server.triton_string_to_numpy(one["data_type"])
            tensors.append(server.Tensor(one["name"], np.zeros((images, *map(int, one["dims"])), dtype)))
        return server.InferenceResponse(output_tensors=tensors)
