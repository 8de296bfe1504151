"""Image files in, answers out, for a network of several image sizes. Written by `vitdeploy package`.

Chooses the size that fits each image, asks the network of that size, and names the classes. Runs inside of
Triton's Python backend with numpy and Pillow alone. `vitdeploy_images` and `vitdeploy_scores` beside this
file are vitdeploy's own, so that sizes, pixels and scores are those on which the bundle was verified.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server  # type: ignore[import-not-found]
from vitdeploy_images.config import Preprocess  # type: ignore[import-not-found]
from vitdeploy_images.errors import ImageError  # type: ignore[import-not-found]
from vitdeploy_images.images.decode import load_image  # type: ignore[import-not-found]
from vitdeploy_images.images.fitting import fit, parse_rule  # type: ignore[import-not-found]
from vitdeploy_images.images.preprocess import pixel_values, shown_size  # type: ignore[import-not-found]
from vitdeploy_scores.scores import scores_of  # type: ignore[import-not-found]


class Network:
    """The model of one image size."""

    def __init__(self, settings: dict[str, Any]) -> None:
        fields = settings["preprocess"].items()
        self.spec = Preprocess(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields})
        self.model, self.size = settings["model"], settings["image_size"]
        self.least, self.most = settings["batch"]


class Picture:
    """One image on its way."""

    def __init__(self, network: Network, pixels: Any) -> None:
        self.network, self.pixels = network, pixels
        self.outputs: dict[str, Any] = {}
        self.error = ""


class TritonPythonModel:
    """What the backend calls: `initialize` once, `execute` with the requests of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(Path(__file__).with_name("images.json").read_text(encoding="utf-8"))
        networks = [Network(one) for one in settings["networks"]]
        self.networks = {network.spec.size: network for network in networks}
        self.rule = parse_rule(settings["fit"])
        self.input, self.pixels, self.outputs = settings["input"], settings["pixels"], settings["outputs"]
        self.classes, self.labels = settings["classes"], settings["labels"]
        self.scores, self.top_k, self.fixed = settings["scores"], settings["top_k"], settings["fixed"]

    async def execute(self, requests: list[Any]) -> list[Any]:
        asked = [self.read(request) for request in requests]
        pictures = [picture for one in asked if isinstance(one, list) for picture in one]
        await asyncio.gather(*(self.run(together) for together in self.batches(pictures)))
        return [self.answer(one) for one in asked]

    def read(self, request: Any) -> list[Picture] | str:
        """The images of one request, or why it is refused; others' requests are none the worse."""
        files = server.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        pictures = []
        for number, data in enumerate(files, 1):
            which = f"image {number} of {len(files)}: " if len(files) > 1 else ""
            try:
                pictures.append(self.prepared(bytes(data)))
            except ImageError as error:
                return f"{which}{error}"
            except MemoryError:
                return f"{which}too large for this server's memory"
        return pictures

    def prepared(self, data: bytes) -> Picture:
        image, sizes = load_image(data), list(self.networks)
        first = self.networks[sizes[0]]
        network = self.networks[fit(shown_size(image, first.spec), sizes, self.rule)]
        return Picture(network, pixel_values(image, network.spec, self.input))

    def batches(self, pictures: Sequence[Picture]) -> list[list[Picture]]:
        """Those of one size together, as many as its network takes."""
        made = []
        for network in self.networks.values():
            mine = [picture for picture in pictures if picture.network is network]
            made += [mine[begin : begin + network.most] for begin in range(0, len(mine), network.most)]
        return made

    async def run(self, pictures: list[Picture]) -> None:
        """Ask the network; too few images for it are filled up with the last one."""
        network, pixels = pictures[0].network, [picture.pixels for picture in pictures]
        pixels += pixels[-1:] * (network.least - len(pixels))
        response = await server.InferenceRequest(
            model_name=network.model,
            requested_output_names=self.outputs,
            inputs=[server.Tensor(self.pixels, np.stack(pixels))],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU, 0),
        ).async_exec()
        if response.has_error():
            for picture in pictures:
                picture.error = response.error().message()
            return
        for name in self.outputs:
            rows = server.get_output_tensor_by_name(response, name).as_numpy()
            for picture, row in zip(pictures, rows, strict=False):
                picture.outputs[name] = row

    def answer(self, asked: list[Picture] | str) -> Any:
        """One request's response."""
        if isinstance(asked, str):
            return _refusal(asked)
        if broken := [picture.error for picture in asked if picture.error]:
            return _refusal(broken[0])
        if any(len({picture.outputs[name].shape for picture in asked}) > 1 for name in self.outputs):
            return _refusal("the images get several sizes, whose outputs have several shapes: ask one by one")
        outputs = {name: np.stack([picture.outputs[name] for picture in asked]) for name in self.outputs}
        tensors = []
        if self.classes:
            logits = outputs.pop("logits")
            if not np.isfinite(logits).all():
                return _refusal("the model gives NaN or infinite logits")
            tensors += self.named(logits)
        tensors += [server.Tensor(name, array) for name, array in outputs.items()]
        sizes = np.array([[picture.network.size.encode()] for picture in asked], dtype=np.object_)
        tensors.append(server.Tensor("image_size", sizes.reshape(-1) if self.fixed else sizes))
        return server.InferenceResponse(output_tensors=tensors)

    def named(self, logits: Any) -> list[Any]:
        """Labels, indices and scores (n, k) of logits (n, classes), best first."""
        scores = scores_of(logits, self.scores)
        order = np.argsort(-scores, axis=-1, kind="stable")[:, : self.top_k]
        names = [[str(self.labels[i] if self.labels else i).encode() for i in row] for row in order]
        best = np.take_along_axis(scores, order, axis=-1)
        return [
            server.Tensor("labels", np.array(names, dtype=np.object_).reshape(order.shape)),
            server.Tensor("indices", order.astype(np.int32)),
            server.Tensor("scores", best.astype(np.float32)),
        ]


def _refusal(message: str) -> Any:
    return server.InferenceResponse(output_tensors=[], error=server.TritonError(message))
