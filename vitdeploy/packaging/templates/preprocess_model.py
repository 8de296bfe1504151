"""Image files in, the network's input out: the first step of the ensemble. Written by `vitdeploy package`.

Runs inside of Triton's Python backend with numpy and Pillow alone. `vitdeploy_images` beside this file is
vitdeploy's own preprocessing, so that the pixels are those on which the bundle was verified.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server  # type: ignore[import-not-found]
from vitdeploy_images.config import Preprocess  # type: ignore[import-not-found]
from vitdeploy_images.errors import ImageError  # type: ignore[import-not-found]
from vitdeploy_images.images.decode import load_image  # type: ignore[import-not-found]
from vitdeploy_images.images.preprocess import pixel_values  # type: ignore[import-not-found]


class TritonPythonModel:
    """What the backend calls: `initialize` once, `execute` with the requests of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(Path(__file__).with_name("preprocess.json").read_text(encoding="utf-8"))
        fields = settings["preprocess"].items()
        self.spec = Preprocess(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields})
        self.input = settings["input"]
        self.output = settings["output"]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """One request: pixels, or an error of its own that leaves the others' answers alone."""
        files = server.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        pixels = []
        for number, data in enumerate(files, 1):
            which = f"image {number} of {len(files)}: " if len(files) > 1 else ""
            try:
                pixels.append(pixel_values(load_image(bytes(data)), self.spec, self.input))
            except ImageError as error:
                return _refusal(f"{which}{error}")
            except MemoryError:
                return _refusal(f"{which}too large for this server's memory")
        tensor = server.Tensor(self.output, np.stack(pixels))
        return server.InferenceResponse(output_tensors=[tensor])


def _refusal(message: str) -> Any:
    return server.InferenceResponse(output_tensors=[], error=server.TritonError(message))
