"""Logits in, the likeliest classes out: the last step of the ensemble. Written by `vitdeploy package`.

Runs inside of Triton's Python backend with numpy alone. `vitdeploy_scores` beside this file is vitdeploy's
own, so that the scores are those of `vitdeploy predict`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server  # type: ignore[import-not-found]
from vitdeploy_scores.scores import scores_of  # type: ignore[import-not-found]


class TritonPythonModel:
    """What the backend calls: `initialize` once, `execute` with the requests of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
        self.labels = settings["labels"]
        self.top_k = settings["top_k"]
        self.scores = settings["scores"]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """One request: (n, classes) logits to (n, k) labels, indices and scores, best first."""
        logits = server.get_input_tensor_by_name(request, "logits").as_numpy()
        if not np.isfinite(logits).all():
            error = server.TritonError("the model gives NaN or infinite logits")
            return server.InferenceResponse(output_tensors=[], error=error)
        scores = scores_of(logits, self.scores)
        order = np.argsort(-scores, axis=-1, kind="stable")[:, : self.top_k]
        names = [[self.label(index).encode() for index in row] for row in order]
        best = np.take_along_axis(scores, order, axis=-1)
        return server.InferenceResponse(
            output_tensors=[
                server.Tensor("labels", np.array(names, dtype=np.object_).reshape(order.shape)),
                server.Tensor("indices", order.astype(np.int32)),
                server.Tensor("scores", best.astype(np.float32)),
            ]
        )

    def label(self, index: int) -> str:
        return str(self.labels[index] if self.labels else index)
