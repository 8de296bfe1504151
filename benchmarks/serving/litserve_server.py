"""LitServe with dynamic batching.

python litserve_server.py BUNDLE PORT WORKERS THREADS BATCH
"""

import base64
import sys
from typing import Any

import litserve
import numpy as np

import vitdeploy


class Classifier(litserve.LitAPI):
    """Takes {"tensor": base64 of the pixels} or {"image": base64 of a file}; it has no binary requests."""

    def __init__(self, bundle: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.bundle, self.threads = bundle, threads

    def setup(self, device: str) -> None:
        self.predictor = vitdeploy.load(self.bundle, backend="onnxruntime", threads=self.threads)
        facts = self.predictor.session.facts
        (self.source,), (self.result,) = facts.inputs, facts.outputs

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        if "image" in request:
            return self.predictor.preprocess(base64.b64decode(request["image"]))
        pixels = np.frombuffer(base64.b64decode(request["tensor"]), self.source.dtype)
        return pixels.reshape([int(size) for size in self.source.shape[1:]])

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        return self.predictor.session.run({self.source.name: pixels})[self.result.name]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, logits: np.ndarray) -> dict[str, Any]:
        return {self.result.name: logits.tolist()}


if __name__ == "__main__":
    bundle, port, workers, threads, batch = sys.argv[1:]
    api = Classifier(
        bundle, int(threads), api_path="/predict", max_batch_size=int(batch), batch_timeout=0.002
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers))
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)
